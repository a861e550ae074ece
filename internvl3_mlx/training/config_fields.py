"""What one setting of a recipe can be, and the names that settings choose from."""

from dataclasses import Field, dataclass, field
from typing import Any, Literal

from internvl3_mlx.errors import UserError

METADATA_KEY = "setting"  # where a field keeps its Setting
METHODS = ("sft", "mpo", "pretrain")
OPTIMIZERS = (
    "adamw", "adam", "adamax", "adafactor", "adagrad", "adadelta", "lion", "muon", "rmsprop", "sgd",
)  # fmt: skip
SCHEDULES = ("cosine", "linear", "constant")
REDUCTIONS = ("token", "sample", "square")
LOGGERS = ("wandb", "tensorboard", "swanlab")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
LORA = "lora"
TRAINABLE_PARTS = (LORA, "language_model", "mlp1", "vision_model", "lm_head")
MODEL_PARTS = TRAINABLE_PARTS[1:4]
REWARD_SHIFTS = ("running", "zero")
RANDOM: Literal["random"] = "random"  # of V2PE: another step for every picture


@dataclass(frozen=True)
class FieldInfo:
    """What a reader of flags or YAML must know of one field. Bounds: low <= value <= high."""

    section: str
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str = ""
    default_text: str = ""  # what no value stands for, in words


def config_field(default: Any, section: str, help: str, **about: Any) -> Any:
    """Declare one field with its default and its place in the help."""
    return field(default=default, metadata={METADATA_KEY: FieldInfo(section, help, **about)})


def field_info(entry: Field[Any]) -> FieldInfo:
    """Give the ``Setting`` of a field."""
    found: FieldInfo = entry.metadata[METADATA_KEY]
    return found


def check_bounds(entry: Field[Any], value: Any) -> None:
    """Refuse a value outside of what its field can be."""
    known, name = field_info(entry), entry.name
    if value is None:
        return
    if known.choices and str(value) not in known.choices:
        raise UserError(f"{name} is {value}; known are {', '.join(known.choices)}")
    low, high = known.low, known.high
    if low is not None and not value >= low:  # NaN is refused as well
        raise UserError(f"{name} is {value}; it must be at least {low:g}")
    if high is not None and not value <= high:
        raise UserError(f"{name} is {value}; it must be at most {high:g}")
