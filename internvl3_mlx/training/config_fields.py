"""What one setting of a recipe can be, and the names that settings choose from."""

from dataclasses import Field, dataclass, field
from typing import Any, Literal

from internvl3_mlx.errors import UserError

SETTING = "setting"  # where a field keeps its Setting
METHODS = ("sft", "mpo", "pretrain")
OPTIMIZERS = (
    "adamw", "adam", "adamax", "adafactor", "adagrad", "adadelta", "lion", "muon", "rmsprop", "sgd",
)  # fmt: skip
SCHEDULES = ("cosine", "linear", "constant")
REDUCTIONS = ("token", "sample", "square")
LOGGERS = ("wandb", "tensorboard", "swanlab")
DTYPES = ("float32", "bfloat16", "float16")
LORA = "lora"
PARTS = (LORA, "language_model", "mlp1", "vision_model", "lm_head")
ALL_PARTS = PARTS[1:4]
SHIFTS = ("running", "zero")
RANDOM: Literal["random"] = "random"  # of V2PE: another step for every picture


@dataclass(frozen=True)
class Setting:
    """What a reader of flags or YAML must know of one field. Bounds: low <= value <= high."""

    section: str
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str = ""
    unset: str = ""  # what no value stands for, in words


def setting(default: Any, section: str, text: str, **about: Any) -> Any:
    """Declare one field with its default and its place in the help."""
    return field(default=default, metadata={SETTING: Setting(section, text, **about)})


def about(entry: Field[Any]) -> Setting:
    """Give the ``Setting`` of a field."""
    found: Setting = entry.metadata[SETTING]
    return found


def check_bounds(entry: Field[Any], value: Any) -> None:
    """Refuse a value outside of what its field can be."""
    known, name = about(entry), entry.name
    if value is None:
        return
    if known.choices and str(value) not in known.choices:
        raise UserError(f"{name} is {value}; known are {', '.join(known.choices)}")
    low, high = known.low, known.high
    if low is not None and not value >= low:  # NaN is refused as well
        raise UserError(f"{name} is {value}; it must be at least {low:g}")
    if high is not None and not value <= high:
        raise UserError(f"{name} is {value}; it must be at most {high:g}")
