"""A whole training run as one value that checks itself.

The fields below are the one table of settings: the command line makes its flags of them, a YAML
file names them with underscores, and each default is written here and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

from internvl3_mlx.errors import UserError
from internvl3_mlx.option_fields import check_bounds, config_field
from internvl3_mlx.training.config_fields import (
    COMPUTE_DTYPES,
    LOGGERS,
    LORA,
    METHODS,
    MODEL_PARTS,
    OPTIMIZERS,
    RANDOM,
    REDUCTIONS,
    REWARD_SHIFTS,
    SCHEDULES,
    TRAINABLE_PARTS,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes, and where it goes. The defaults are ``sft``'s;
    ``PRESETS`` says what other methods change."""

    model: str | None = config_field(
        None,
        "Model",
        "A folder, a hub repository, a size such as 2b, or demo.",
        metavar="PATH|REPO|SIZE",
    )
    q_bits: int | None = config_field(
        None,
        "Model",
        "Pack the frozen language model: 4 or 8 bits (QLoRA).",
        choices=("4", "8"),
        default_text="as stored",
    )
    dtype: str | None = config_field(
        None,
        "Model",
        "What is computed in.",
        choices=COMPUTE_DTYPES,
        default_text="the model's own, float32 on a CPU",
    )
    adapter_path: str = config_field(
        "adapters", "Model", "Where adapter, checkpoints and figures go.", metavar="FOLDER"
    )
    resume_adapter_file: str | None = config_field(
        None, "Model", "Begin with this adapter's weights.", metavar="FOLDER"
    )
    data: str | None = config_field(
        None,
        "Data",
        "A folder with train.jsonl and valid.jsonl, one JSONL file, or a meta JSON.",
        metavar="PATH",
    )
    valid_data: str | None = config_field(
        None,
        "Data",
        "Rows to validate on.",
        metavar="PATH",
        default_text="valid.jsonl of the folder",
    )
    max_seq_length: int = config_field(
        16384, "Data", "Longest sample in tokens; with --packing, of a row.", low=8
    )
    packing: bool = config_field(
        False, "Data", "Lay samples end to end in rows of --max-seq-length."
    )
    max_tiles: int | None = config_field(
        None, "Data", "Most tiles a picture is cut into.", low=1, default_text="the model's own"
    )
    max_packed_tiles: int = config_field(48, "Data", "Most tiles of a packed row.", low=1)
    num_frames: int = config_field(8, "Data", "Frames taken from each video.", low=1)
    augment: bool | None = config_field(
        None,
        "Data",
        "Re-encode tiles as JPEG of random quality, 75 to 100.",
        default_text="as a meta JSON says",
    )
    grouping: bool = config_field(True, "Data", "Bring samples of like length together.")
    system: str | None = config_field(
        None,
        "Data",
        "System text of rows that have none.",
        metavar="TEXT",
        default_text="the model's own",
    )
    v2pe_delta: str = config_field(
        "1", "Data", "Position step of an image token: 1, 1/2 ... 1/256 or random.", metavar="STEP"
    )
    loss_reduction: str = config_field(
        "token",
        "Data",
        "What a token of an answer of l tokens weighs: 1, 1/l or 1/sqrt(l).",
        choices=REDUCTIONS,
    )
    text_ratio: float | None = config_field(
        None,
        "Data",
        "Share of text-only samples, drawn anew as they run out.",
        low=0,
        high=1,
        default_text="as the data has it",
    )
    cache_features: bool = config_field(
        True, "Data", "Keep what a frozen tower saw on disk; it is computed once."
    )
    method: str = config_field("sft", "Training", "What is learned, and how.", choices=METHODS)
    iters: int | None = config_field(
        None, "Training", "Updates of the weights.", low=1, default_text="what --epochs make"
    )
    epochs: float = config_field(1.0, "Training", "Times that all samples are seen.", low=0)
    batch_size: int = config_field(
        4, "Training", "Samples, pairs or packed rows read at once.", low=1
    )
    grad_accumulation_steps: int = config_field(
        4, "Training", "Batches to an update; 4 of 2 equal 1 of 8.", low=1
    )
    learning_rate: float = config_field(4e-5, "Training", "Highest step size.", low=0)
    lr_schedule: str = config_field(
        "cosine", "Training", "How the step size falls after the warm-up.", choices=SCHEDULES
    )
    lr_end: float = config_field(
        0.0, "Training", "Where it falls to, as a share of the highest.", low=0, high=1
    )
    warmup_ratio: float = config_field(
        0.03, "Training", "Share of the updates in which it rises.", low=0, high=1
    )
    warmup_steps: int | None = config_field(
        None, "Training", "Updates in which it rises.", low=0, default_text="by --warmup-ratio"
    )
    optimizer: str = config_field(
        "adamw", "Training", "One of MLX's optimizers.", choices=OPTIMIZERS
    )
    weight_decay: float = config_field(
        0.05, "Training", "Shrinking of matrices; biases and norms are left alone.", low=0
    )
    max_grad_norm: float = config_field(
        1.0, "Training", "Longest gradient over all weights; 0 for any.", low=0
    )
    seed: int = config_field(0, "Training", "The same seed gives the same run.", low=0)
    train: tuple[str, ...] = config_field(
        (LORA,),
        "Weights",
        f"What is trained: {', '.join(TRAINABLE_PARTS)} or patterns, with commas.",
        metavar="PARTS",
    )
    lora_keys: tuple[str, ...] = config_field(
        ("language",),
        "Weights",
        "Layers that are adapted: language, vision, projector, all, names or patterns.",
        metavar="KEYS",
    )
    num_layers: int | None = config_field(
        None,
        "Weights",
        "Adapt only the last N layers of the language model.",
        low=1,
        default_text="all",
    )
    lora_rank: int = config_field(16, "Weights", "Rank of the adapters.", low=1)
    lora_alpha: float = config_field(
        32.0, "Weights", "Scale of the adapters; it is divided by the rank.", low=0
    )
    lora_dropout: float = config_field(
        0.05, "Weights", "Share of an adapter's inputs left out.", low=0, high=1
    )
    dora: bool = config_field(False, "Weights", "Train magnitude and direction apart (DoRA).")
    rslora: bool = config_field(False, "Weights", "Divide by the root of the rank (rsLoRA).")
    drop_path: float | None = config_field(
        None,
        "Weights",
        "Share of a trained tower's branches left out.",
        low=0,
        high=1,
        default_text="the checkpoint's",
    )
    dpo_weight: float = config_field(0.8, "Preference", "Weight of the preference term.", low=0)
    bco_weight: float = config_field(0.2, "Preference", "Weight of the quality term.", low=0)
    sft_weight: float = config_field(1.0, "Preference", "Weight of the chosen answer's NLL.", low=0)
    beta: float = config_field(0.1, "Preference", "How far from the reference it may move.", low=0)
    label_smoothing: float = config_field(
        0.0, "Preference", "Share of pairs thought to be swapped.", low=0, high=0.5
    )
    reward_shift: str = config_field(
        "running",
        "Preference",
        "What the quality term compares with: the mean reward so far, or zero.",
        choices=REWARD_SHIFTS,
    )
    cache_reference: bool = config_field(
        False, "Preference", "Compute the reference once and keep it on disk."
    )
    grad_checkpoint: bool = config_field(
        False, "Memory", "Compute activations twice rather than keep them."
    )
    memory_limit: float | None = config_field(
        None,
        "Memory",
        "Stop and save above this many GB.",
        low=0,
        default_text="what the GPU may take",
    )
    compile: bool = config_field(
        False, "Memory", "Compile the step; samples are rounded up to few lengths."
    )
    steps_per_report: int = config_field(10, "Run", "Updates between two lines of figures.", low=1)
    steps_per_eval: int = config_field(100, "Run", "Updates between two validations.", low=1)
    val_batches: int | None = config_field(
        None, "Run", "Batches of a validation.", low=1, default_text="all"
    )
    eval_accuracy: bool = config_field(
        False, "Run", "Answer the validation rows and count those that are right."
    )
    patience: int | None = config_field(
        None,
        "Run",
        "Stop after this many validations without a better loss.",
        low=1,
        default_text="never",
    )
    save_every: int = config_field(100, "Run", "Updates between two checkpoints.", low=1)
    keep_last: int = config_field(2, "Run", "Checkpoints that are kept.", low=1)
    report_to: tuple[str, ...] = config_field(
        (), "Run", f"Loggers beside the CSV: {', '.join(LOGGERS)}, with commas.", metavar="NAMES"
    )  # fmt: skip

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_bounds(entry, getattr(self, entry.name))
        check_conflicts(self)

    @property
    def uses_adapters(self) -> bool:
        """Whether there are adapters, rather than whole parts alone."""
        return LORA in self.train

    @property
    def adapters_only(self) -> bool:
        """Whether the base stays as it is below its adapters."""
        return self.train == (LORA,)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model before training."""
        return self.method == "mpo" and bool(self.dpo_weight or self.bco_weight)

    def to_dict(self) -> dict[str, Any]:
        """Give all settings as YAML and JSON can hold them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


# What a method changes of the defaults above, which are those of sft.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "sft": {},
    "mpo": {
        "learning_rate": 5e-6,
        "batch_size": 1,
        "grad_accumulation_steps": 16,
        "max_seq_length": 12288,
    },
    "pretrain": {
        "train": MODEL_PARTS,
        "packing": True,
        "loss_reduction": "square",
        "v2pe_delta": RANDOM,
        "text_ratio": 0.25,
        "batch_size": 1,
        "grad_accumulation_steps": 8,
    },
})  # fmt: skip


def check_conflicts(config: "TrainConfig") -> None:
    """Refuse settings that contradict each other."""
    if not config.train:
        raise UserError(f"train names nothing; wanted are {', '.join(TRAINABLE_PARTS)} or patterns")
    if unknown := [name for name in config.report_to if name not in LOGGERS]:
        raise UserError(f"report_to is {unknown[0]}; known are {', '.join(LOGGERS)}")
    if config.iters is None and config.epochs == 0:
        raise UserError("epochs is 0; give epochs above 0, or iters")
    if not config.uses_adapters and (config.dora or config.rslora):
        raise UserError("dora and rslora shape adapters; add lora to train")
    if config.dora and config.rslora:
        raise UserError("dora and rslora both set the scale of adapters; choose one")
    if config.compile and (config.packing or config.grad_checkpoint or config.method == "mpo"):
        raise UserError(
            "compile is for samples of few lengths; leave out packing, grad_checkpoint and mpo"
        )
    if config.compile and "lm_head" in config.lora_keys:
        raise UserError("compile cannot take an adapted lm_head; leave one of them out")
    if config.method == "mpo":
        check_preference(config)


def check_preference(config: "TrainConfig") -> None:
    if config.packing:
        raise UserError("packing is for samples; mpo lays each pair behind its prompt already")
    if not (config.dpo_weight or config.bco_weight or config.sft_weight):
        raise UserError("dpo_weight, bco_weight and sft_weight are all 0; nothing would be learned")
    if config.needs_reference and not (config.adapters_only or config.cache_reference):
        raise UserError(
            f"train is {','.join(config.train)}: once more than lora moves, the base is gone that "
            "mpo compares with; add cache_reference, which asks it beforehand"
        )
    if config.needs_reference and not config.adapters_only and config.v2pe_delta == RANDOM:
        raise UserError("v2pe_delta random cannot be asked beforehand; train lora alone, or fix it")
    if config.augment:
        check_fixed_images(config)


def check_fixed_images(config: "TrainConfig") -> None:
    """Refuse pictures that are drawn anew where the reference knows only those it was asked of."""
    if config.needs_reference and not config.adapters_only:
        raise UserError(
            "augment draws pictures anew, and the reference is asked beforehand; "
            "train lora alone, or leave augment out"
        )


AUTO: Literal["auto"] = "auto"
PREFERENCE_METHOD = "mpo"  # the method that reads pairs of answers; all others read conversations
TEXT_SHARE = 0.25  # of the samples in native pre-training: text to image-text is 1 to 3


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What decides which batches a run reads. ``None`` means: as the model or the data has it.

    batch_size: samples, pairs or packed rows in a micro-batch. packing: lay samples into rows of at
    most ``max_seq_length`` tokens and ``max_packed_tiles`` tiles.
    v2pe_delta: one step for all pictures, or "random": one of the nine for each picture.
    augment: re-encode tiles as JPEG; None leaves it to a meta JSON's ``data_augment``.
    loss_reduction: what a token of an answer of l tokens weighs: 1, 1/l or 1/sqrt(l).
    text_ratio: share of text-only samples; the kind that runs out is begun anew.
    grouping: samples of like length come together.
    """

    method: str = "sft"
    batch_size: int = 1
    packing: bool = False
    max_seq_length: int = 16384
    max_packed_tiles: int = 48
    max_tiles: int | None = None
    num_frames: int = 8
    v2pe_delta: str | float = 1
    augment: bool | None = None
    loss_reduction: Literal["token", "sample", "square"] = "token"
    text_ratio: float | None = None
    grouping: bool = False
    system: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_seq_length", "max_packed_tiles", "num_frames"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.loss_reduction not in TOKEN_WEIGHTS:
            raise UserError(
                f"loss_reduction {self.loss_reduction!r}: wanted one of {', '.join(TOKEN_WEIGHTS)}"
            )
        if self.position_delta == AUTO:
            raise UserError("v2pe_delta auto is for prompts; give a step, or random")

    @property
    def position_delta(self) -> float | str:
        """The step of image tokens as a number, or "random"."""
        from internvl3_mlx.prompt.v2pe import parse_delta

        return RANDOM if self.v2pe_delta == RANDOM else parse_delta(self.v2pe_delta)

    @property
    def reads_pairs(self) -> bool:
        """Whether rows hold two answers to compare."""
        return self.method == PREFERENCE_METHOD


# loss_reduction -> what each of an answer's l supervised tokens weighs
TOKEN_WEIGHTS = {
    "token": lambda l: 1.0,  # noqa: E741
    "sample": lambda l: 1.0 / l,  # noqa: E741
    "square": lambda l: l**-0.5,  # noqa: E741
}
