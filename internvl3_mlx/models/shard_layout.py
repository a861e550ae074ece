"""How the tensors of a decoder are divided among ranks, as a table (ADR 17).

Layers that read the hidden state are cut by output rows, those that write it by input columns, so
that a layer sums twice: after attention and after the MLP. Queries, keys and values are cut by
heads. What has no row here is held by all ranks: vision tower, projector, embedding and norms.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx

from internvl3_mlx.config import ModelConfig, Quantization, TextConfig
from internvl3_mlx.errors import UserError

MODULE_TENSORS = r"\.(?:weight|bias|scales|biases)"
MATRIX_TENSORS = r"\.(?:weight|scales|biases)"
TEXT_LAYER = r"language_model\.model\.layers\.\d+\."
EXPERTS = TEXT_LAYER + r"mlp\.(?:switch_mlp|experts)\."
HEAD = "language_model.lm_head"
# rows of a part of the head: MLX's fast kernel of a quantized matrix takes them in eights
HEAD_ROW_MULTIPLE = 8
GROUP_SIZES = (32, 64, 128)  # that MLX quantizes by
MOST_RANKS = 64

# even: the parts are equal. padded: all but the last have the same length, and zeros complete it.
# first: one rank holds the whole tensor, the others zeros, so that a sum adds it once.
Division = Literal["even", "padded", "first"]
Choose = Callable[[str], Quantization | None]  # how a module is quantized; None: not at all


@dataclass(frozen=True)
class Cut:
    """How the tensors of ``pattern`` are divided: along ``axis`` of the model's own shape."""

    pattern: re.Pattern[str]
    axis: int
    division: Division = "even"


def cut(pattern: str, axis: int, division: Division = "even") -> Cut:
    return Cut(re.compile(pattern), axis, division)


CUTS = (
    cut(TEXT_LAYER + r"self_attn\.[qkv]_proj" + MODULE_TENSORS, 0),
    cut(TEXT_LAYER + r"self_attn\.sinks", 0),
    cut(TEXT_LAYER + r"self_attn\.o_proj" + MATRIX_TENSORS, -1),
    cut(TEXT_LAYER + r"self_attn\.o_proj\.bias", 0, "first"),
    cut(TEXT_LAYER + r"mlp\.(?:gate|up)_proj" + MODULE_TENSORS, 0),
    cut(TEXT_LAYER + r"mlp\.down_proj" + MATRIX_TENSORS, -1),
    cut(EXPERTS + r"(?:gate|up)_proj" + MODULE_TENSORS, 1),  # (E, out, in), biases (E, out)
    cut(EXPERTS + r"down_proj" + MATRIX_TENSORS, -1),
    cut(EXPERTS + r"down_proj\.bias", 0, "first"),
    cut(re.escape(HEAD) + MODULE_TENSORS, 0, "padded"),
)


@dataclass(frozen=True)
class TensorPart:
    """What one rank holds of a tensor: ``start`` to ``stop`` along ``axis``, then ``zeros``."""

    axis: int
    start: int
    stop: int
    zeros: int = 0

    def take(self, whole: mx.array) -> mx.array:
        """Return the part of an array."""
        index = [slice(None)] * whole.ndim
        index[self.axis] = slice(self.start, self.stop)
        return self.pad(whole[tuple(index)])

    def pad(self, part: mx.array) -> mx.array:
        """Append the zeros to what was read."""
        if not self.zeros:
            return part
        widths = [(0, 0)] * part.ndim
        widths[self.axis] = (0, self.zeros)
        return mx.pad(part, widths)


def tensor_part(name: str, shape: tuple[int, ...], rank: int, size: int) -> TensorPart | None:
    """Return which part of a tensor a rank holds; None for all of it.

    name, shape: in the model, of the whole tensor. Raises ValueError where equal parts are needed
    and ``size`` does not divide the axis; ``check_divisible`` finds that before.
    """
    own = next((entry for entry in CUTS if entry.pattern.fullmatch(name)), None)
    if own is None or size == 1:
        return None
    axis = own.axis % len(shape)
    length = shape[axis]
    if own.division == "first":
        return TensorPart(axis, 0, length) if rank == 0 else TensorPart(axis, 0, 0, length)
    if own.division == "padded":
        height = head_part_rows(length, size)
        start, stop = min(rank * height, length), min((rank + 1) * height, length)
        return TensorPart(axis, start, stop, height - (stop - start))
    if length % size:
        raise ValueError(f"{name} {shape} has no {size} equal parts along axis {axis}")
    each = length // size
    return TensorPart(axis, rank * each, (rank + 1) * each)


def is_cut_by_columns(module: str) -> bool:
    """Tell whether the weight of a module is divided by its input columns."""
    return any(entry.axis == -1 and entry.pattern.fullmatch(f"{module}.weight") for entry in CUTS)


def head_part_rows(vocab_size: int, size: int) -> int:
    """Return the rows of the head on each rank, those of zeros at the end included."""
    if size == 1:
        return vocab_size
    return -(-vocab_size // (size * HEAD_ROW_MULTIPLE)) * HEAD_ROW_MULTIPLE


def local_config(config: ModelConfig, size: int) -> ModelConfig:
    """Return the config of what each rank computes: its heads, and its part of the MLP's width.

    Hidden size and vocabulary stay whole.
    """
    if size == 1:
        return config
    text, experts = config.text, config.text.experts
    if experts is not None:
        experts = replace(experts, intermediate_size=experts.intermediate_size // size)
    local = replace(
        text,
        num_attention_heads=text.num_attention_heads // size,
        num_key_value_heads=text.num_key_value_heads // size,
        intermediate_size=text.intermediate_size // size,
        experts=experts,
    )
    return replace(config, text=local)


def whole_config(config: ModelConfig, size: int) -> ModelConfig:
    """Undo ``local_config``."""
    if size == 1:
        return config
    text, experts = config.text, config.text.experts
    if experts is not None:
        experts = replace(experts, intermediate_size=experts.intermediate_size * size)
    whole = replace(
        text,
        num_attention_heads=text.num_attention_heads * size,
        num_key_value_heads=text.num_key_value_heads * size,
        intermediate_size=text.intermediate_size * size,
        experts=experts,
    )
    return replace(config, text=whole)


def check_divisible(config: ModelConfig, size: int, choose: Choose | None = None) -> None:
    """Raise UserError unless a model can be divided among ``size`` ranks.

    The error names the numbers of ranks that are possible, and where only groups of quantized
    weights are in the way, the sizes of groups that are not. ``choose``: how a module is quantized;
    by default what config.json says, so that no tensor need be there.
    """

    def found(ranks: int) -> list[str]:
        groups = group_obstacles(config, ranks, choose or stored_quantization(config))
        return [*head_obstacles(config.text, ranks), *groups]

    reasons = found(size)
    if not reasons:
        return
    possible = [ranks for ranks in range(1, MOST_RANKS + 1) if not found(ranks)]
    advice = f"use {join_or(possible)} rank{'s' * (possible != [1])}"
    if groups := dividing_groups(config.text, size):
        advice += f", or a conversion with --q-group-size {join_or(groups)}"
    raise UserError(f"this model cannot be divided among {size} ranks: {reasons[0]}; {advice}")


def dividing_groups(text: TextConfig, size: int) -> list[int]:
    """Return the quantization groups by which a model can be divided, if its heads can."""
    if head_obstacles(text, size):
        return []
    widths = {width for _, width in column_cut_modules(text)}
    return [group for group in GROUP_SIZES if not any(width % (size * group) for width in widths)]


def head_obstacles(text: TextConfig, size: int) -> list[str]:
    """Say which counts of heads and columns are not multiples of ``size``."""
    counts = {
        "attention heads": text.num_attention_heads,
        "key-value heads": text.num_key_value_heads,
        "columns of the MLP": mlp_width(text),
    }
    return [f"it has {count:,} {what}" for what, count in counts.items() if count % size]


def mlp_width(text: TextConfig) -> int:
    """Return the width of the MLP of a layer, or of one of its experts."""
    return text.experts.intermediate_size if text.experts else text.intermediate_size


def group_obstacles(config: ModelConfig, size: int, choose: Choose) -> list[str]:
    """Say whose part is not a multiple of the groups that it is quantized in."""
    found = []
    for module, width in column_cut_modules(config.text):
        quantization = choose(module)
        if quantization is None or width % quantization.group_size:  # then it is not quantized
            continue
        group = quantization.group_size
        if width % (size * group):
            found.append(
                f"{module.rpartition('.')[2]} would have {width / size:,g} of its {width:,} "
                f"columns on each, which is not a multiple of the quantization group of {group}"
            )
    return found


def stored_quantization(config: ModelConfig) -> Choose:
    """Return how each module is quantized as far as config.json says."""
    plan = config.quantization

    def choose(module: str) -> Quantization | None:
        excepted = plan is None or plan.modules.get(module) is False
        return None if plan is None or excepted else plan.for_module(module)

    return choose


def column_cut_modules(text: TextConfig) -> Iterator[tuple[str, int]]:
    """Yield the modules that are cut by their columns, and how many they have."""
    mlp = f"mlp.{text.experts.module}" if text.experts else "mlp"
    for layer in range(text.num_hidden_layers):
        prefix = f"language_model.model.layers.{layer}."
        yield f"{prefix}self_attn.o_proj", text.num_attention_heads * text.head_dim
        yield f"{prefix}{mlp}.down_proj", mlp_width(text)


def join_or(numbers: list[int]) -> str:
    """Write a list of choices: 1, 2 or 4."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
