"""Train adapters of a model that is divided among ranks (ADR 17).

Every rank keeps the whole adapter and its optimizer state, and the model holds the rank's part.
Optimizers, clipping, checkpoints and adapters are then those of one process, and no file shows how
many ranks made it. After the micro-steps of an update one sum makes the gradients whole.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.distributed.process_group import ProcessGroup
from internvl3_mlx.distributed.shard import Shard
from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.shard_layout import CUTS, HEAD, TensorPart, head_part_rows, tensor_part
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.params import Arrays, named_arrays
from internvl3_mlx.training.trainable import ParameterCounts, count_parameters, parameter_counts

LORA_A = "lora_A"
# settings that compute on one rank alone, read from one rank's disk what others compute, or load a
# second model that is not divided
UNSUITABLE = ("compile", "eval_metric", "cache_reference", "teacher")


def check_tensor_parallel(config: TrainConfig, ranks: ProcessGroup) -> None:
    """Raise UserError for settings and processes that a divided model cannot be trained with."""
    size = config.tensor_parallel
    if size == 1:
        return
    if size != ranks.size:
        raise UserError(
            f"tensor_parallel is {size}, but there are {ranks.size} processes; start {size} of "
            "them with mlx.launch, or set it to their number: MLX's ring has no groups within it"
        )
    if not config.adapters_only:
        raise UserError(
            f"train is {','.join(config.train)}, but on a divided model (tensor_parallel) only "
            "adapters are trained; train lora only"
        )
    if names := [name for name in UNSUITABLE if getattr(config, name)]:
        raise UserError(f"{names[0]} cannot be combined with tensor_parallel; drop one")


def tensor_shard(config: TrainConfig, ranks: ProcessGroup) -> Shard:
    """Return the part of the model that this process trains; all of it by default."""
    if config.tensor_parallel == 1:
        return Shard()
    return Shard(ranks.rank, ranks.size, ranks.group, ranks.stream)


@dataclass(frozen=True)
class TrainedPart:
    """What a rank has of a trained tensor of ``shape``.

    part: where it lies in the whole; None if all ranks hold the tensor. summed: the gradient of
    such a tensor is the sum of what the ranks find; otherwise they find the same.
    """

    shape: tuple[int, ...]
    part: TensorPart | None = None
    summed: bool = False


def trained_part(name: str, shape: tuple[int, ...], shard: Shard, vocab_size: int) -> TrainedPart:
    """Return how a trained tensor of this rank, of a given shape, lies in the whole one."""
    path, _, factor = name.rpartition(".")
    own = next((cut for cut in CUTS if cut.pattern.fullmatch(f"{path}.weight")), None)
    if own is None or shard.size == 1:
        return TrainedPart(shape)
    axis = 0 if own.axis == 0 else 1
    if (factor == LORA_A) != (axis == 1):  # all hold it, and use it for their parts
        return TrainedPart(shape, summed=True)
    length = vocab_size if path == HEAD else shape[axis] * shard.size
    whole = (*shape[:axis], length, *shape[axis + 1 :])
    # B and magnitudes are cut as the weight's rows, A as its columns
    placed = tensor_part(f"{path}.weight", (length, length), shard.rank, shard.size)
    return TrainedPart(whole, placed)


def trained_parts(model: InternVL) -> dict[str, TrainedPart]:
    """Return how the trained tensors of a rank lie in the whole ones."""
    trained = named_arrays(model.trainable_parameters())
    vocab = model.config.text.vocab_size
    return {name: trained_part(name, x.shape, model.shard, vocab) for name, x in trained}


def count_whole(model: InternVL) -> ParameterCounts:
    """Count the parameters of the whole model, of which this one may be a rank's part."""
    if model.shard.size == 1:
        return count_parameters(model)
    trained = {name: math.prod(own.shape) for name, own in trained_parts(model).items()}
    total = sum(
        trained.get(name) or whole_count(name.replace(".base.", "."), count, model)
        for name, count in parameter_counts(model)
    )
    return ParameterCounts(sum(trained.values()), total)


def whole_count(name: str, count: int, model: InternVL) -> int:
    """Return how many parameters a frozen tensor has, given how many of them a rank holds."""
    own = next((cut for cut in CUTS if cut.pattern.fullmatch(name)), None)
    if own is None or own.division == "first":  # rank 0's numbers, or as many zeros
        return count
    if own.division == "even":
        return count * model.shard.size
    vocab = model.config.text.vocab_size
    return count * vocab // head_part_rows(vocab, model.shard.size)


def take_parts(weights: Arrays, model: InternVL) -> Arrays:
    """Return a rank's parts of whole trained tensors."""
    if model.shard.size == 1:
        return weights
    held = {name: own.part for name, own in trained_parts(model).items()}
    return {name: part.take(x) if (part := held[name]) else x for name, x in weights.items()}


def whole_weights(model: InternVL, weights: Arrays, ranks: ProcessGroup) -> Arrays:
    """Return the whole trained tensors, given those of this rank; all ranks must call it."""
    if model.shard.size == 1:
        return weights
    return sum_over_ranks(model, weights, ranks, summed=False)


def whole_gradients(model: InternVL, gradients: Arrays, ranks: ProcessGroup) -> Arrays:
    """Return the gradients of the whole tensors, given those of this rank's parts."""
    return sum_over_ranks(model, gradients, ranks, summed=True)


def sum_over_ranks(model: InternVL, arrays: Arrays, ranks: ProcessGroup, *, summed: bool) -> Arrays:
    """Sum what each rank contributes to whole tensors, in one message.

    A part counts at its place. Of a tensor that all ranks hold, rank 0's counts alone, unless its
    gradient is ``summed``.
    """
    parts = trained_parts(model)
    placed = {
        name: contribution(
            x, parts[name], everyone=ranks.is_main or (summed and parts[name].summed)
        )
        for name, x in arrays.items()
    }
    found: Arrays = ranks.all_sum(placed)
    return found


def contribution(x: mx.array, own: TrainedPart, *, everyone: bool) -> mx.array:
    """Return an array of the whole shape with what this rank adds to the sum."""
    if own.part is None:
        return x if everyone else mx.zeros_like(x)
    axis, start, stop = own.part.axis, own.part.start, own.part.stop
    held = mx.split(x, [stop - start], axis=axis)[0]  # without the rows of zeros
    widths = [(0, 0)] * x.ndim
    widths[axis] = (start, own.shape[axis] - stop)
    return mx.pad(held, widths)
