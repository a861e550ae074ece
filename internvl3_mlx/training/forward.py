"""From a batch to the hidden states that predict its targets, all inside the gradient graph.

input_ids (L,) -> embeddings, with image features in place -> decoder over packed sequences ->
(N, D), the states at ``batch.target_positions`` only. The head is not applied here:
``token_log_probs`` runs it on a few states at a time.
"""

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from internvl3_mlx.errors import PromptError
from internvl3_mlx.models.chunked_attention import chunked_attention
from internvl3_mlx.models.internvl import InternVL, tiles_per_chunk
from internvl3_mlx.models.layers import BlockRunner, run_block
from internvl3_mlx.models.packed_sequences import PackedSequences
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.grad_checkpoint import checkpointed_runner, is_trainable

TRAINED_TOWER_ATTENTION = partial(chunked_attention, causal=False)
TILE_NDIM = 4  # (T, S, S, 3)


@dataclass(frozen=True)
class ForwardOptions:
    """How to run the model.

    grad_checkpoint: store only each block's input, in the decoder and the vision tower.
    drop_path_rate: stochastic depth of a trained vision tower; None uses the checkpoint's rate.
    """

    grad_checkpoint: bool = False
    drop_path_rate: float | None = None


def target_states(
    model: InternVL,
    batch: Batch,
    vision_features: mx.array | None,
    options: ForwardOptions | None = None,
) -> mx.array:
    """Compute the normalized hidden states that predict the batch's targets: -> (N, D).

    vision_features: all images in order, at any stage: features (T, V, D), vision tower states
    (T, 1 + G*G, C) or tiles (T, S, S, 3); None reads the batch's own tiles. Positions are used as
    they are, even beyond the training window: the published training never rescaled them.
    """
    options = options or ForwardOptions()
    checkpoints = options.grad_checkpoint and is_trainable(model)
    run = checkpointed_runner() if checkpoints else run_block
    ids = mx.array(batch.input_ids)[None]
    vision = batch_tiles(batch) if vision_features is None else vision_features
    features = None if vision is None else visual_features(model, vision, options, run)
    check_feature_count(batch, model.image_id, 0 if features is None else features.shape[0])
    language = model.language_model
    rotary = language.rotary(mx.array(batch.positions), ids.shape[1], ntk=False)
    sequences = [PackedSequences(batch.spans)] * len(language.model.layers)
    positions = mx.array(batch.target_positions)
    return language.model(model.embed(ids, features), rotary, sequences, positions, run)[0]


def batch_tiles(batch: Batch) -> mx.array | None:
    """Return the tiles of all images, unnormalized (T, S, S, 3); None without images."""
    tiles = [image.tiles for image in batch.images]
    return mx.array(np.concatenate(tiles)) if tiles else None


def visual_features(
    model: InternVL, vision: mx.array, options: ForwardOptions, run: BlockRunner
) -> mx.array:
    """Bring images from whatever stage they are at to the decoder's width: -> (V, D)."""
    if vision.ndim == TILE_NDIM:
        vision = vision_states(model, vision, options, run)
    if vision.shape[-2] == 1 + model.config.vision.grid**2:
        vision = model.project(vision)
    return vision.reshape(-1, vision.shape[-1])


def vision_states(
    model: InternVL, tiles: mx.array, options: ForwardOptions, run: BlockRunner
) -> mx.array:
    """Run the vision tower on a few tiles at a time: (T, S, S, 3) -> (T, 1 + G*G, C).

    With a frozen tower, each chunk is evaluated before the next begins, since no gradient needs its
    graph. Stochastic depth applies to a trained tower only, and so does the attention that is the
    same inside and outside gradients.
    """
    trained, layer = is_trainable(model.vision_model), model.config.select_layer
    extra: tuple[Any, ...] = ()
    if trained:
        extra = (current_drop_path_rate(model, options), run, TRAINED_TOWER_ATTENTION)
    step = tiles_per_chunk()
    chunks = (tiles[i : i + step] for i in range(0, tiles.shape[0], step))
    states = (model.vision_model(chunk, layer, *extra) for chunk in chunks)
    return mx.concatenate([x if trained else evaluate_and_detach(x) for x in states])


def evaluate_and_detach(x: mx.array) -> mx.array:
    """Evaluate x and drop its graph, which MLX would keep alive while gradients are traced.

    Inside a compiled step nothing can be evaluated; x is returned unchanged.
    """
    with contextlib.suppress(ValueError):
        return mx.array(np.array(x.view(mx.uint8))).view(x.dtype)
    return x


def current_drop_path_rate(model: InternVL, options: ForwardOptions) -> float:
    """Return the stochastic-depth rate of the last block: 0 in evaluation mode."""
    if not model.training:
        return 0.0
    rate = options.drop_path_rate
    return model.config.vision.drop_path_rate if rate is None else rate


def check_feature_count(batch: Batch, image_id: int, features: int) -> None:
    """Raise PromptError unless there is one feature per image token.

    Inside a compiled step the ids are traced and cannot be counted.
    """
    try:
        tokens = int((np.asarray(batch.input_ids) == image_id).sum())
    except ValueError:  # ids are being traced
        return
    if tokens != features:
        raise PromptError(
            f"{', '.join(batch.locations)}: {tokens} image tokens but {features} image features; "
            "the two must match. If the images have changed, delete the feature cache"
        )
