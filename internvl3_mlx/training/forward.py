"""From a batch to the states that predict its targets; everything is inside the graph.

ids (L,) -> embeddings, pictures in their places -> decoder over spans -> (N, D), the states of
``batch.rows`` alone. The head is not here: ``losses`` runs it a few states at a time.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from internvl3_mlx.errors import PromptError
from internvl3_mlx.models.internvl import TILES_PER_CHUNK, InternVL
from internvl3_mlx.models.layers import BlockRunner, run_block
from internvl3_mlx.models.packed_sequences import PackedSequences
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.grad_checkpoint import checkpointed_runner, is_trainable

TILE_NDIM = 4  # (T, S, S, 3)


@dataclass(frozen=True)
class ForwardOptions:
    """How the model is run. ``recompute``: keep only each block's input, in decoder and tower.

    ``drop_path_rate``: of a tower that is trained; None takes the checkpoint's.
    """

    grad_checkpoint: bool = False
    drop_path_rate: float | None = None


def target_states(
    model: InternVL, batch: Batch, vision: mx.array | None, how: ForwardOptions | None = None
) -> mx.array:
    """Compute the normed states that predict the batch's targets: -> (N, D).

    vision: what is known of the pictures, all of them in order: features (T, V, D), the tower's
    states (T, 1 + G*G, C), tiles (T, S, S, 3), or None for the batch's own tiles. Positions are
    taken as they are, also beyond the trained window: the published training never stretched them.
    """
    how = how or ForwardOptions()
    run = checkpointed_runner() if how.grad_checkpoint and is_trainable(model) else run_block
    ids = mx.array(batch.input_ids)[None]
    seen = batch_tiles(batch) if vision is None else vision
    features = None if seen is None else visual_features(model, seen, how, run)
    check_feature_count(batch, model.image_id, 0 if features is None else features.shape[0])
    language = model.language_model
    rotary = language.rotary(mx.array(batch.positions), ids.shape[1], ntk=False)
    kept = [PackedSequences(batch.spans)] * len(language.model.layers)
    rows = mx.array(batch.target_positions)
    return language.model(model.embed(ids, features), rotary, kept, rows, run)[0]


def batch_tiles(batch: Batch) -> mx.array | None:
    """Give the tiles of all pictures, raw colours (T, S, S, 3); None without pictures."""
    tiles = [seen.tiles for seen in batch.images]
    return mx.array(np.concatenate(tiles)) if tiles else None


def visual_features(
    model: InternVL, seen: mx.array, how: ForwardOptions, run: BlockRunner
) -> mx.array:
    """Bring pictures from the stage they are at to the decoder's width: -> (V, D)."""
    if seen.ndim == TILE_NDIM:
        seen = vision_states(model, seen, how, run)
    if seen.shape[-2] == 1 + model.config.vision.grid**2:
        seen = model.project(seen)
    return seen.reshape(-1, seen.shape[-1])


def vision_states(
    model: InternVL, tiles: mx.array, how: ForwardOptions, run: BlockRunner
) -> mx.array:
    """Run the tower on a few tiles at a time: (T, S, S, 3) -> (T, 1 + G*G, C).

    Of a frozen tower each chunk is computed before the next begins: no gradient asks for it.
    Stochastic depth is for a tower that is trained.
    """
    trained, layer = is_trainable(model.vision_model), model.config.select_layer
    options: tuple[Any, ...] = (current_drop_path_rate(model, how), run) if trained else ()
    chunks = (tiles[i : i + TILES_PER_CHUNK] for i in range(0, tiles.shape[0], TILES_PER_CHUNK))
    states = (model.vision_model(chunk, layer, *options) for chunk in chunks)
    return mx.concatenate([x if trained else evaluate_and_detach(x) for x in states])


def evaluate_and_detach(x: mx.array) -> mx.array:
    """Compute now, and forget how: while gradients are taken MLX keeps all that led to an array.

    Inside a compiled step nothing can be computed; x stays as it is.
    """
    with contextlib.suppress(ValueError):
        return mx.array(np.array(x.view(mx.uint8))).view(x.dtype)
    return x


def current_drop_path_rate(model: InternVL, how: ForwardOptions) -> float:
    """Say how likely the last block's branches are left out: never in evaluation."""
    if not model.training:
        return 0.0
    given = how.drop_path_rate
    return model.config.vision.drop_path_rate if given is None else given


def check_feature_count(batch: Batch, image_id: int, features: int) -> None:
    """Raise when a batch's image tokens and its pictures' visual tokens differ in number; inside a
    compiled step none can be counted."""
    try:
        tokens = int((np.asarray(batch.input_ids) == image_id).sum())
    except ValueError:  # ids are being traced
        return
    if tokens != features:
        raise PromptError(
            f"{', '.join(batch.locations)}: {tokens} image tokens but {features} visual tokens from "
            "its pictures; they must agree. Empty the feature cache if the pictures have changed"
        )
