"""The configuration of a training run.

The fields of ``TrainConfig`` are the only table of settings: the command line derives its flags
from them, a YAML file names them with underscores, and each default is written here and nowhere
else.
"""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from internvl3_mlx.errors import UserError
from internvl3_mlx.option_fields import check_bounds, config_field
from internvl3_mlx.training.config_fields import (
    COMPUTE_DTYPES,
    LOGGERS,
    LORA,
    METHODS,
    OPTIMIZERS,
    PAIR_METHODS,
    RANDOM,
    SCHEDULES,
    TRAINABLE_PARTS,
)
from internvl3_mlx.training.data_config import DataConfig, check_data_conflicts
from internvl3_mlx.training.grpo_config import GRPOSettings
from internvl3_mlx.training.preference_config import PreferenceSettings, check_weights
from internvl3_mlx.training.presets import PRESETS
from internvl3_mlx.training.run_config import RunConfig

GRPO_METHOD = "grpo"  # the method that learns from answers of its own
KTO_METHOD = "kto"  # the method that reads answers with labels
DISTILL_METHOD = "distill"  # the method that learns from a teacher's probabilities
CRITIC_METHOD = "prm"  # the method whose answers are all + or -


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig, GRPOSettings, PreferenceSettings, RunConfig):
    """Everything that decides what a training run computes and where it writes.

    A setting that is not given takes the preset of its ``method`` (``PRESETS``), and without one
    the default below, which is that of ``sft``. Raises ``UserError`` for values that are out of
    range or contradict each other.
    """

    model: str | None = config_field(
        None,
        "Model",
        "Folder, Hub repository, size such as 2b, or demo.",
        metavar="PATH|REPO|SIZE",
    )
    q_bits: int | None = config_field(
        None,
        "Model",
        "Quantize the frozen language model to 4 or 8 bits (QLoRA).",
        choices=("4", "8"),
        default_text="as stored",
    )
    dtype: str | None = config_field(
        None,
        "Model",
        "Data type to compute in.",
        choices=COMPUTE_DTYPES,
        default_text="the model's own, float32 on a CPU",
    )
    adapter_path: str = config_field(
        "adapters", "Model", "Folder for the adapter, checkpoints and metrics.", metavar="FOLDER"
    )
    resume_adapter_file: str | None = config_field(
        None, "Model", "Start from the weights of this adapter.", metavar="FOLDER"
    )
    method: str = config_field("sft", "Training", "Training method.", choices=METHODS)
    iters: int | None = config_field(
        None, "Training", "Number of optimizer updates.", low=1, default_text="from --epochs"
    )
    epochs: float = config_field(1.0, "Training", "Number of passes over the training data.", low=0)
    batch_size: int = config_field(
        4, "Training", "Micro-batch size (samples, pairs or packed sequences).", low=1
    )
    grad_accumulation_steps: int = config_field(
        4, "Training", "Micro-batches per update; 4 of size 2 equal 1 of size 8.", low=1
    )
    learning_rate: float = config_field(4e-5, "Training", "Peak learning rate.", low=0)
    vision_learning_rate: float | None = config_field(
        None,
        "Training",
        "Peak learning rate of the vision encoder.",
        low=0,
        default_text="--learning-rate",
    )
    projector_learning_rate: float | None = config_field(
        None,
        "Training",
        "Peak learning rate of the projector.",
        low=0,
        default_text="--learning-rate",
    )
    lora_plus_ratio: float = config_field(
        1.0,
        "Training",
        "LoRA+: learning rate of the B matrices over that of the A matrices; 16 is usual.",
        low=0,
    )
    lr_schedule: str = config_field(
        "cosine", "Training", "Learning rate decay after the warmup.", choices=SCHEDULES
    )
    lr_end: float = config_field(
        0.0, "Training", "Final learning rate, as a fraction of the peak.", low=0, high=1
    )
    warmup_ratio: float = config_field(
        0.03, "Training", "Fraction of the updates used for warmup.", low=0, high=1
    )
    warmup_steps: int | None = config_field(
        None, "Training", "Number of warmup updates.", low=0, default_text="from --warmup-ratio"
    )
    optimizer: str = config_field(
        "adamw",
        "Training",
        f"MLX optimizer: {', '.join(OPTIMIZERS)}.",
        choices=OPTIMIZERS,
        metavar="NAME",
    )
    weight_decay: float = config_field(
        0.05, "Training", "Weight decay of matrices; biases and norms have none.", low=0
    )
    max_grad_norm: float = config_field(
        1.0, "Training", "Clip the global gradient norm to this value; 0 disables clipping.", low=0
    )
    seed: int = config_field(0, "Training", "Random seed; the same seed reproduces a run.", low=0)
    train: tuple[str, ...] = config_field(
        (LORA,),
        "Weights",
        f"Parts to train: {', '.join(TRAINABLE_PARTS)} or patterns, comma-separated.",
        metavar="PARTS",
    )
    lora_keys: tuple[str, ...] = config_field(
        ("language",),
        "Weights",
        "Layers to adapt: language, vision, projector, all, layer names or patterns.",
        metavar="KEYS",
    )
    num_layers: int | None = config_field(
        None,
        "Weights",
        "Adapt only the last N layers of the language model.",
        low=1,
        default_text="all",
    )
    vision_layers: int | None = config_field(
        None,
        "Weights",
        "Adapt only the last N layers of the vision encoder.",
        low=1,
        default_text="all",
    )
    lora_rank: int = config_field(16, "Weights", "LoRA rank.", low=1)
    lora_alpha: float = config_field(
        32.0, "Weights", "LoRA alpha; the scale is alpha / rank.", low=0
    )
    lora_dropout: float = config_field(
        0.05, "Weights", "Dropout on the input of an adapter.", low=0, high=1
    )
    dora: bool = config_field(
        False, "Weights", "Use DoRA: train magnitude and direction separately."
    )
    rslora: bool = config_field(False, "Weights", "Use rsLoRA: the scale is alpha / sqrt(rank).")
    drop_path: float | None = config_field(
        None,
        "Weights",
        "Stochastic depth rate of a trained vision encoder.",
        low=0,
        high=1,
        default_text="the checkpoint's",
    )
    teacher: str | None = config_field(
        None,
        "Distillation",
        "The model to learn from with --method distill: folder, Hub repository or size.",
        metavar="PATH|REPO|SIZE",
    )
    distill_weight: float = config_field(
        1.0, "Distillation", "Weight of the divergence from the teacher.", low=0
    )
    distill_top_k: int = config_field(
        32, "Distillation", "Tokens of the teacher that are kept for each target.", low=1, high=1024
    )
    distill_temperature: float = config_field(
        1.0, "Distillation", "Temperature of teacher and student.", low=0.1, high=100
    )
    if not TYPE_CHECKING:  # editors and type checkers read the signature of __init__

        def __new__(cls, **given):
            """Remember which settings are given, so that presets fill in only the others."""
            self = super().__new__(cls)
            object.__setattr__(self, "_given", frozenset(given))
            return self

    def __post_init__(self) -> None:
        given: frozenset[str] = self.__dict__.pop("_given")
        for name, value in PRESETS.get(self.method, {}).items():
            if name not in given:
                object.__setattr__(self, name, value)
        for entry in fields(self):
            check_bounds(entry, getattr(self, entry.name))
        check_conflicts(self)

    @property
    def uses_adapters(self) -> bool:
        """Whether LoRA adapters are trained, alone or besides whole parts."""
        return LORA in self.train

    @property
    def adapters_only(self) -> bool:
        """Whether nothing but LoRA adapters is trained."""
        return self.train == (LORA,)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model before training."""
        if self.samples_answers:
            return bool(self.beta)
        return self.reads_labels or (self.reads_pairs and bool(self.dpo_weight or self.bco_weight))

    @property
    def reads_pairs(self) -> bool:
        """Whether the training data are preference pairs."""
        return self.method in PAIR_METHODS

    @property
    def reads_labels(self) -> bool:
        """Whether the training data are unpaired preferences: answers with labels."""
        return self.method == KTO_METHOD

    @property
    def samples_answers(self) -> bool:
        """Whether the model learns from answers that it samples itself."""
        return self.method == GRPO_METHOD

    @property
    def reads_preferences(self) -> bool:
        """Whether the training data are preferences, paired or not, rather than conversations."""
        return self.reads_pairs or self.reads_labels

    @property
    def trains_critic(self) -> bool:
        """Whether a process reward model is trained, which replies + or - to each step."""
        return self.method == CRITIC_METHOD

    @property
    def position_delta(self) -> float | str:
        """The V2PE position increment of image tokens as a number, or "random"."""
        from internvl3_mlx.prompt.v2pe import parse_delta

        return RANDOM if self.v2pe_delta == RANDOM else parse_delta(self.v2pe_delta)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as values that YAML and JSON can hold."""
        return {
            name: [*cast(tuple[str, ...], value)] if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def check_conflicts(config: TrainConfig) -> None:
    """Raise ``UserError`` for settings that contradict each other."""
    if not config.train:
        raise UserError(
            f"train is empty; expected one or more of {', '.join(TRAINABLE_PARTS)}, or patterns"
        )
    if unknown := [name for name in config.report_to if name not in LOGGERS]:
        raise UserError(
            f"unknown logger {unknown[0]!r} in report_to; choose from {', '.join(LOGGERS)}"
        )
    if config.position_delta == "auto":
        raise UserError("v2pe_delta auto is for generation only; set a number, or random")
    if config.iters is None and config.epochs == 0:
        raise UserError("epochs is 0; set epochs above 0, or iters")
    if not config.uses_adapters and (config.dora or config.rslora):
        raise UserError("dora and rslora apply to LoRA adapters only; add lora to train")
    if config.compile and (config.packing or config.grad_checkpoint or config.reads_preferences):
        method = config.method if config.reads_preferences else "mpo"
        raise UserError(
            f"compile cannot be combined with packing, grad_checkpoint or method {method}; drop one"
        )
    if config.compile and "lm_head" in config.lora_keys:
        raise UserError("compile cannot be combined with an adapted lm_head; drop one")
    check_data_conflicts(config)
    check_distillation(config)
    check_grpo(config)
    if config.reads_preferences:
        check_preference(config)


def check_distillation(config: TrainConfig) -> None:
    """Raise ``UserError`` for settings that distillation cannot use."""
    if config.method != DISTILL_METHOD:
        if config.teacher is not None:
            raise UserError("teacher needs method distill; set it, or drop teacher")
        return
    if not (config.sft_weight or config.distill_weight):
        raise UserError("sft_weight and distill_weight are both 0; set at least one above 0")
    if config.compile:
        raise UserError("compile cannot be combined with method distill; drop it")
    varying = {
        "v2pe_delta random": config.v2pe_delta == RANDOM,
        "min_frames": config.min_frames is not None,
        "augment": bool(config.augment),
    }
    if names := [name for name, varies in varying.items() if varies]:
        raise UserError(
            f"{names[0]} changes the prompts, and the teacher reads them before training; drop it"
        )


def check_grpo(config: TrainConfig) -> None:
    """Raise ``UserError`` for settings that sampling answers cannot use."""
    from internvl3_mlx.training.rewards import check_reward

    if not config.samples_answers:
        if config.reward is not None:
            raise UserError("reward needs method grpo; set it, or drop reward")
        return
    if config.reward is not None:
        check_reward(config.reward)
    unsuitable = ("packing", "compile", "cache_reference", "eval_accuracy")
    if names := [name for name in unsuitable if getattr(config, name)]:
        raise UserError(f"{names[0]} cannot be combined with method grpo; drop it")
    if config.beta and not config.adapters_only:
        raise UserError(
            f"train is {','.join(config.train)}, and the KL divergence of grpo compares with the "
            "model without its adapters; train lora only, or set beta to 0"
        )


def check_preference(config: TrainConfig) -> None:
    """Raise ``UserError`` for settings that preference optimization cannot use."""
    if config.packing:
        raise UserError(f"packing cannot be combined with method {config.method}; drop packing")
    check_weights(config, reads_labels=config.reads_labels)
    if config.reads_labels and not config.adapters_only:
        raise UserError(
            f"train is {','.join(config.train)}: with method kto the reference is computed during "
            "training, by disabling the adapters; train lora only"
        )
    if config.kto_weight and config.batch_size == 1:
        raise UserError(
            "batch_size is 1, but kto estimates the KL divergence from answers to other prompts of "
            "the same batch; set batch_size to 2 or more"
        )
    if config.needs_reference and not (config.adapters_only or config.cache_reference):
        raise UserError(
            f"train is {','.join(config.train)}: training more than adapters changes the reference "
            f"model that {config.method} compares with; add cache_reference to compute it before "
            "training"
        )
    if config.needs_reference and not config.adapters_only and config.v2pe_delta == RANDOM:
        raise UserError(
            "v2pe_delta random changes the prompts, and the reference is computed before training; "
            "train lora only, or set a number"
        )
    if config.needs_reference and not config.adapters_only and config.min_frames is not None:
        raise UserError(
            "min_frames changes the prompts, and the reference is computed before training; train "
            "lora only, or drop min_frames"
        )
    if config.augment:
        check_fixed_images(config)


def check_fixed_images(config: TrainConfig) -> None:
    """Raise ``UserError`` if augmented images would not match a reference computed in advance."""
    if config.needs_reference and not config.adapters_only:
        raise UserError(
            "augment changes the images, and the reference is computed before training; train lora "
            "only, or drop augment"
        )
