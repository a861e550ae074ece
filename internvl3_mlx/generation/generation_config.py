"""Everything that can be asked for besides the question itself, each default in one place."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from internvl3_mlx.errors import UserError
from internvl3_mlx.prompt.messages import Message

KV_BITS = (4, 8)
KV_GROUP_SIZES = (32, 64, 128)

V2PEDelta = float | int | str | Fraction


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a question is put and an answer generated. ``None`` means: as the model itself has it.

    history: earlier turns, their pictures counted in ``images`` before this turn's.
    v2pe_delta: position step of image tokens, one of 1, 1/2 ... 1/256, ``"auto"``, or one a
    picture.
    lookup: guess ahead what followed the same words before; the answer stays the same.
    draft: a smaller model, or its name, that guesses ahead; the answer stays the same.
    json_schema, regex, choice: the form the answer must have; at most one. A schema is a
    dictionary or JSON text.
    ntk: stretch the rotary base beyond the trained window, as the checkpoint's rope_scaling says.
    """

    system: str | None = None
    history: tuple[Message, ...] = ()
    video: tuple[Any, ...] = ()
    num_frames: int = 8
    frame_times: bool = False
    max_tiles: int | None = None
    min_tiles: int | None = None
    thumbnail: bool | None = None
    upright: bool = True
    v2pe_delta: V2PEDelta | list[V2PEDelta] | tuple[V2PEDelta, ...] = 1
    ntk: bool = True
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    keep_boxes: bool = False
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    prefill_step_size: int | None = None
    lookup: bool = False
    draft: Any = None
    num_draft_tokens: int = 4
    json_schema: Any = None
    regex: str | None = None
    choice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "video", "history", "choice"):  # one string or path is a list of one
            value = getattr(self, name)
            alone = isinstance(value, str | bytes) or not isinstance(value, Sequence)
            object.__setattr__(self, name, (value,) if alone else tuple(value))
        for name, (lowest, highest) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                raise UserError(f"{name} is {value}; it goes from {lowest:g} to {highest:g}")
        if self.kv_bits is not None and self.kv_bits not in KV_BITS:
            raise UserError(f"kv_bits is {self.kv_bits}; the cache packs to 4 or 8 bits, or None")
        forms = [name for name in ("json_schema", "regex", "choice") if getattr(self, name)]
        if len(forms) > 1:
            raise UserError(f"{' and '.join(forms)} at once; an answer has one form, choose one")
        if forms and (self.lookup or self.draft is not None):
            raise UserError(f"guessing ahead knows no {forms[0]}; leave lookup and draft away")
        if self.kv_group_size not in KV_GROUP_SIZES:
            raise UserError(f"kv_group_size is {self.kv_group_size}; MLX has 32, 64 and 128")


UNBOUNDED = 1_000_000_000
RANGES = {
    "num_frames": (1, 4096),
    "max_tiles": (1, 4096),
    "min_tiles": (1, 4096),
    "max_tokens": (1, UNBOUNDED),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, UNBOUNDED),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "seed": (0, 2**63),
    "quantized_kv_start": (0, UNBOUNDED),
    "prefill_step_size": (1, UNBOUNDED),
    "num_draft_tokens": (1, 16),
}


def with_overrides(config: GenerationConfig, overrides: dict[str, Any]) -> GenerationConfig:
    """Return ``settings`` with ``changes``; an unknown one raises with the nearest name."""
    names = [field.name for field in fields(GenerationConfig)]
    for name in overrides.keys() - set(names):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
        raise UserError(f"no setting {name!r}; {hint}")
    return replace(config, **overrides)
