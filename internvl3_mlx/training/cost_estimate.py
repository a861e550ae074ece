"""What a run will cost before its first update: peak memory and seconds, from shapes alone.

The model is built without reading its weights, with the adapters and trained parts of the run; the
longest micro-batch comes from the data check. ``activation_memory`` counts the rest. Time is a
count of operations over what this machine does in a fraction of a second, so it is rough.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.checkpoints.build_model import assemble_model, class_predicate
from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.activation_memory import (
    FLOAT32,
    BatchShape,
    activation_bytes,
    array_bytes,
    chunk_scores,
    element_bytes,
)
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.batch_sampler import SampleSizes, rank_batches
from internvl3_mlx.training.feature_cache import MEMORY_BYTES
from internvl3_mlx.training.grad_checkpoint import is_trainable, seeded
from internvl3_mlx.training.lora_setup import add_lora, lora_config
from internvl3_mlx.training.optimizers import build_optimizer, master_weights
from internvl3_mlx.training.params import named_arrays
from internvl3_mlx.training.setup import RunSetup
from internvl3_mlx.training.step_cost import seconds_per_update
from internvl3_mlx.training.trainable import set_trainable

GB = 1e9
UPDATE_COPIES = 2.4  # of the gradients, while an update is applied, beside a new optimizer state
MAX_REMEDIES = 6
FEWER_TILES_FROM = 12  # the published limit, where none is set
ROUGHLY = 0.8  # of a peak: what is asked for after memory has run out


@dataclass(frozen=True)
class CostEstimate:
    """Predicted peak memory in bytes, and seconds of an update.

    weights: of the model. training: master weights and optimizer state. activations: of the largest
    micro-batch with its gradients. features: of images, kept in memory. limit: what this machine
    may use. remedies: flags that would make it fit, the cheapest first, with the memory they leave.
    """

    weights: int
    training: int
    activations: int
    features: int
    limit: int
    seconds: float
    longest_tokens: int
    remedies: tuple[tuple[str, int], ...] = ()

    @property
    def memory(self) -> int:
        return self.weights + self.training + self.activations + self.features

    @property
    def fits(self) -> bool:
        return self.memory <= self.limit


def estimate_cost(setup: RunSetup, processes: int = 1) -> CostEstimate | None:
    """Predict what a run takes, and which flags would make it fit if it does not.

    None for a divided model, of which each process holds a part: this counts the whole one.
    """
    if setup.config.tensor_parallel > 1:
        return None
    found = estimate(setup, setup.config, processes)
    if found.fits:
        return found
    remedies = []
    for flags, config in cheaper_configs(setup, setup.config):
        memory = estimate(setup, config, processes).memory
        remedies.append((flags, memory))
        if memory <= found.limit or len(remedies) == MAX_REMEDIES:
            break
    return replace(found, remedies=tuple(remedies))


def flags_for_less(setup: RunSetup, peak: int) -> str:
    """Return the flags to try after an update has used too much memory: "" if there are none."""
    goal = ROUGHLY * (estimate(setup, setup.config, 1).memory or peak)
    tried = ""
    for flags, config in cheaper_configs(setup, setup.config):
        tried = flags
        if estimate(setup, config, 1).memory <= goal:
            break
    return tried


def estimate(setup: RunSetup, config: TrainConfig, processes: int) -> CostEstimate:
    """Predict memory and time of a run with a configuration that may differ from its own."""
    model = planned_model(setup, config)
    shape = largest_batch(setup, config, model, processes)
    trained = dict(named_arrays(model.trainable_parameters()))
    gradients = FLOAT32 * sum(x.size for x in trained.values())
    micro_steps = config.grad_accumulation_steps
    activations = activation_bytes(
        model,
        shape,
        dropout=config.lora_dropout if config.uses_adapters else 0.0,
        grad_checkpoint=config.grad_checkpoint,
    )
    earlier = gradients if micro_steps > 1 else 0
    copies, optimizer = training_bytes(config, trained)
    limit = int(config.memory_limit * GB) if config.memory_limit else gpu_memory_limit()
    return CostEstimate(
        weights=array_bytes(x for _, x in named_arrays(model.parameters())),
        training=copies + optimizer,
        activations=round(max(activations + earlier, UPDATE_COPIES * gradients + optimizer)),
        features=feature_bytes(setup, config, model, shape),
        limit=limit,
        seconds=micro_steps * seconds_per_update(model, mean_shape(setup, config, model), config),
        longest_tokens=shape.tokens,
    )


def planned_model(setup: RunSetup, config: TrainConfig) -> InternVL:
    """Build the model of a run with what is trained; no weights are read or computed."""
    with seeded(config.seed):  # the random state of the program stays as it is
        model = assemble_model(setup.model_folder, dtype=config.dtype, for_training=True).model
        recipe = setup.local_model.recipe
        if config.q_bits is not None and config.q_bits != setup.config.q_bits:
            nn.quantize(model.language_model, bits=config.q_bits)
        elif recipe is not None:
            nn.quantize(model, class_predicate=class_predicate(recipe.choose))
        if config.uses_adapters:
            add_lora(model, lora_config(config))
        set_trainable(model, config.train)
        return model


def training_bytes(config: TrainConfig, trained: dict[str, mx.array]) -> tuple[int, int]:
    """Return the size of the master weights, where they are copies, and of the optimizer state."""
    masters = master_weights(trained)
    copies = sum(x.nbytes for name, x in masters.items() if trained[name].dtype != mx.float32)
    optimizer = build_optimizer(config)
    optimizer.init(masters)
    return copies, array_bytes(x for _, x in named_arrays(optimizer.state))


def largest_batch(
    setup: RunSetup, config: TrainConfig, model: InternVL, processes: int
) -> BatchShape:
    """Return the shape of the micro-batch with the most tokens of the first epoch."""
    sizes = reduced_sizes(setup, config, model)
    shapes = batch_shapes(sizes, config, model, processes)
    return max(shapes, key=lambda shape: (shape.tokens, shape.tiles))


def mean_shape(setup: RunSetup, config: TrainConfig, model: InternVL) -> BatchShape:
    """Return the mean shape of a micro-batch: what its time depends on."""
    shapes = [*batch_shapes(reduced_sizes(setup, config, model), config, model, 1)]
    count = len(shapes)
    totals = (
        sum(getattr(shape, name) for shape in shapes) // count
        for name in ("tokens", "longest", "targets", "tiles", "scores")
    )
    return BatchShape(*totals)


def batch_shapes(
    sizes: SampleSizes, config: TrainConfig, model: InternVL, processes: int
) -> Iterator[BatchShape]:
    """Yield the shapes of the micro-batches of one epoch. All tokens but images may be trained."""
    per_tile = model.config.num_image_token
    for members in rank_batches(sizes, config, 0, 0, processes):
        chosen = [*members]
        tokens, tiles = sizes.tokens[chosen], sizes.tiles[chosen]
        total, images = int(tokens.sum()), int(tiles.sum())
        targets = max(total - images * per_tile, 1)
        scores = chunk_scores(tokens.tolist())
        yield BatchShape(total, int(tokens.max()), targets, images, scores)


def reduced_sizes(setup: RunSetup, config: TrainConfig, model: InternVL) -> SampleSizes:
    """Return the sizes of the samples, with fewer tiles if the configuration has fewer."""
    sizes = setup.train.report.sizes
    own, asked = setup.config.max_tiles, config.max_tiles
    if asked == own or asked is None:
        return sizes
    tiles = (sizes.tiles * asked // (own or model.config.max_dynamic_patch)).clip(max=sizes.tiles)
    tokens = sizes.tokens - (sizes.tiles - tiles) * model.config.num_image_token
    return replace(sizes, tokens=tokens, tiles=tiles)


def feature_bytes(setup: RunSetup, config: TrainConfig, model: InternVL, shape: BatchShape) -> int:
    """Return the size of the features of images in memory: cached ones, and those of a batch."""
    if is_trainable(model.vision_model):
        return shape.tiles * 3 * model.config.vision.image_size**2  # the tiles themselves
    if any(map(is_trainable, model.mlp1)):
        rows, width = model.config.vision.grid**2 + 1, model.config.vision.hidden_size
    else:
        rows, width = model.config.num_image_token, model.config.text.hidden_size
    per_tile = rows * width * element_bytes(model)
    unique = 0 if setup.images_vary else unique_tiles(setup)
    return min(unique * per_tile, MEMORY_BYTES) + shape.tiles * per_tile


def unique_tiles(setup: RunSetup) -> int:
    """Return the tiles of all splits; an image in several records is counted as often."""
    return sum(int(split.report.sizes.tiles.sum()) for split in setup.splits.values())


Remedy = Callable[[TrainConfig], tuple[str, TrainConfig] | None]


def smaller_batches(config: TrainConfig) -> tuple[str, TrainConfig] | None:
    """One sample at a time: the same update, in more steps."""
    if config.batch_size == 1:
        return None
    steps = config.batch_size * config.grad_accumulation_steps
    flags = f"--batch-size 1 --grad-accumulation-steps {steps}"
    return flags, with_settings(config, batch_size=1, grad_accumulation_steps=steps)


def recomputed_activations(config: TrainConfig) -> tuple[str, TrainConfig] | None:
    """A third more time."""
    if config.grad_checkpoint or config.compile:
        return None
    return "--grad-checkpoint", with_settings(config, grad_checkpoint=True)


def shorter_sequences(config: TrainConfig) -> tuple[str, TrainConfig] | None:
    """Packed sequences of half the length: the same samples."""
    if not config.packing:
        return None
    length = config.max_seq_length // 2
    return f"--max-seq-length {length}", with_settings(config, max_seq_length=length)


def quantized(config: TrainConfig) -> tuple[str, TrainConfig] | None:
    """Some accuracy of the frozen weights."""
    if config.q_bits is not None or not config.adapters_only:
        return None
    return "--q-bits 4", with_settings(config, q_bits=4)


def fewer_tiles(config: TrainConfig) -> tuple[str, TrainConfig] | None:
    """Detail of the images."""
    tiles = (config.max_tiles or FEWER_TILES_FROM) // 2
    if tiles < 1:
        return None
    return f"--max-tiles {tiles}", with_settings(config, max_tiles=tiles)


REMEDIES: tuple[Remedy, ...] = (
    smaller_batches, shorter_sequences, recomputed_activations, quantized, fewer_tiles,
)  # fmt: skip


def cheaper_configs(setup: RunSetup, config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Yield flags that save memory, each with those before it, in the order of what they cost."""
    flags: list[str] = []
    for remedy in REMEDIES:
        step = remedy(config)
        if step is None or (remedy is quantized and is_quantized(setup)):
            continue
        flag, config = step
        flags.append(flag)
        yield " ".join(flags), config


def is_quantized(setup: RunSetup) -> bool:
    """Whether the model is quantized already."""
    return setup.preprocessor.processor.config.quantization is not None


def with_settings(config: TrainConfig, **settings: object) -> TrainConfig:
    """Return a configuration with other settings, all of them given."""
    return TrainConfig(**{**config.__dict__, **settings})
