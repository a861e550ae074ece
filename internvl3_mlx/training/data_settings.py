"""How rows become samples and samples become batches, each default in one place."""

from dataclasses import dataclass
from typing import Literal

from internvl3_mlx.errors import UserError
from internvl3_mlx.prompt.v2pe import parse_delta

RANDOM: Literal["random"] = "random"
AUTO: Literal["auto"] = "auto"
PREFERENCE = "mpo"  # the method that reads pairs of answers; all others read conversations
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
        if self.loss_reduction not in WEIGHTS:
            raise UserError(
                f"loss_reduction {self.loss_reduction!r}: wanted one of {', '.join(WEIGHTS)}"
            )
        if self.delta == AUTO:
            raise UserError("v2pe_delta auto is for prompts; give a step, or random")

    @property
    def delta(self) -> float | str:
        """The step of image tokens as a number, or "random"."""
        return RANDOM if self.v2pe_delta == RANDOM else parse_delta(self.v2pe_delta)

    @property
    def pairs(self) -> bool:
        """Whether rows hold two answers to compare."""
        return self.method == PREFERENCE


# loss_reduction -> what each of an answer's l supervised tokens weighs
WEIGHTS = {
    "token": lambda l: 1.0,  # noqa: E741
    "sample": lambda l: 1.0 / l,  # noqa: E741
    "square": lambda l: l**-0.5,  # noqa: E741
}
