"""Flash: decide which tiles of a prompt are compressed, and shorten the prompt accordingly.

The prompt is built with the full number of context tokens for every tile. Once the router has seen
the tiles, those of compressed ones are cut off behind the first quarter, and positions count on
without a gap. Each prompt is decided alone, message by message: what earlier messages were given
stays, whatever follows them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.generation_config import FLASH_OPTIONS, GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs, ProcessedImage
from internvl3_mlx.generation.prompt_cache import ImageFeatureCache, probability_key
from internvl3_mlx.models.flash import compressed_tiles
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.prompt.v2pe import image_spans, visual_positions

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class FlashThresholds:
    """When a tile is compressed; see ``compressed_tiles``."""

    relative: float
    absolute: float


def flash_thresholds(model: ModelConfig, config: GenerationConfig) -> FlashThresholds | None:
    """Return the thresholds in use: the options', else the checkpoint's. None: no compression."""
    if not (model.flash_mode and config.visual_compression):
        return None
    relative, absolute = (
        own if given is None else given
        for given, own in (
            (config.flash_relative_threshold, model.flash_relative_threshold),
            (config.flash_absolute_threshold, model.flash_absolute_threshold),
        )
    )
    assert relative is not None
    assert absolute is not None
    return FlashThresholds(relative, absolute)


def check_flash_options(model: ModelConfig, config: GenerationConfig, name: str) -> None:
    """Raise UserError for thresholds that are given to a model without a router."""
    given = [option for option in FLASH_OPTIONS if getattr(config, option) is not None]
    if given and not model.flash_mode:
        raise UserError(
            f"{given[0]} is {getattr(config, given[0])}, but {name} has no visual resolution "
            "router; drop it, or use a Flash model (InternVL3_5-8B-Flash)"
        )


def is_routable(model: ModelConfig, inputs: ModelInputs, config: GenerationConfig) -> bool:
    """Tell whether a prompt is to be decided about; one that is built by hand is left alone."""
    if not inputs.processed_images or flash_thresholds(model, config) is None:
        return False
    return bool(inputs.message_images) and not inputs.is_routed


def route_inputs(
    model: InternVL, inputs: ModelInputs, config: GenerationConfig, features: ImageFeatureCache
) -> ModelInputs:
    """Encode the images that are not in ``features``, decide, and shorten the prompt.

    Inputs of a model without a router, and those that were decided before, are returned as they
    are.
    """
    thresholds = flash_thresholds(model.config, config)
    if thresholds is None or not is_routable(model.config, inputs, config):
        return inputs
    images = inputs.processed_images
    probabilities = tile_probabilities(model, images, features)
    bounds = pairwise(accumulate(inputs.message_images, initial=0))
    by_message = [join(probabilities[start:stop]) for start, stop in bounds]
    masks = compressed_tiles(by_message, thresholds.relative, thresholds.absolute)
    ends = np.cumsum([len(image.tiles) for image in images])[:-1]
    return compress_inputs(inputs, np.split(np.concatenate(masks), ends), model)


def route_known(
    model: InternVL, inputs: ModelInputs, config: GenerationConfig, features: ImageFeatureCache
) -> ModelInputs:
    """Shorten the prompt if that needs no image to be encoded; else return it as it is."""
    keys = map(probability_key, inputs.processed_images)
    known = all(key in features.entries for key in keys)
    return route_inputs(model, inputs, config, features) if known else inputs


def tile_probabilities(
    model: InternVL, images: Sequence[ProcessedImage], features: ImageFeatureCache
) -> list[NDArray[np.float32]]:
    """Return how likely each tile of each image may be compressed, (T,) each."""
    found = list[NDArray[np.float32]]()
    for image in images:
        probability = features.entries.get(probability_key(image))
        if probability is None:
            routed = model.route_images(mx.array(image.tiles))
            mx.eval(*routed)  # what is lazy could not be read in another thread
            probability = routed.probability
            features.put(image.content_hash, routed.features)
        features.put(probability_key(image), probability)
        found.append(np.array(probability))
    return found


def encode_into(
    features: ImageFeatureCache,
    model: InternVL,
    images: Sequence[ProcessedImage],
    config: GenerationConfig,
) -> None:
    """Compute into ``features`` what a prompt with these images asks for first."""
    if flash_thresholds(model.config, config) is None:
        features.get(images, model.encode_images)
    else:
        tile_probabilities(model, images, features)


def join(probabilities: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([np.zeros(0, np.float32), *probabilities])


def compress_inputs(inputs: ModelInputs, masks: Sequence[Mask], model: InternVL) -> ModelInputs:
    """Cut the context tokens of compressed tiles. masks: (T,) for each image."""
    full, short = model.config.num_image_token, model.config.num_compressed_token
    ids = np.array(inputs.token_ids, dtype=np.int32)
    kept = np.ones(len(ids), dtype=np.bool_)
    spans = image_spans(ids, model.image_id)
    for (start, stop), mask in zip(spans, masks, strict=True):
        rows = np.arange(full) < np.where(mask, short, full)[:, None]  # (T, V)
        kept[start:stop] = rows.reshape(-1)
    remaining = ids[kept].tolist()
    images = tuple(
        compress_image(image, mask, full, short)
        for image, mask in zip(inputs.processed_images, masks, strict=True)
    )
    positions = visual_positions(remaining, model.image_id, inputs.deltas)
    return replace(inputs, token_ids=remaining, processed_images=images, positions=positions)


def compress_image(image: ProcessedImage, mask: Mask, full: int, short: int) -> ProcessedImage:
    """Return an image with the decision about its tiles, and the tokens that they take."""
    count = int(mask.sum())
    tokens = (len(mask) - count) * full + count * short
    info = replace(image.info, tokens=tokens, compressed_tiles=count)
    compressed = replace(image, info=info, compressed=tuple(map(bool, mask)))
    compressed.__dict__["content_hash"] = image.content_hash  # of the same tiles
    return compressed
