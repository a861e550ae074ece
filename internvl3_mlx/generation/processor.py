"""From a question, pictures and settings to what the model reads: ids, tiles and positions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.errors import PromptError, UserError
from internvl3_mlx.generation.generation_config import GenerationConfig, V2PEDelta
from internvl3_mlx.images.fetch import shorten_name
from internvl3_mlx.images.load import LoadedImage, open_image
from internvl3_mlx.images.tiling import TilePolicy, normalize, to_tiles
from internvl3_mlx.prompt.messages import Message, MessageMedia, media_order
from internvl3_mlx.prompt.template import Template
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.prompt.v2pe import (
    auto_delta,
    image_spans,
    next_position,
    parse_delta,
    visual_positions,
)

AUTO: Literal["auto"] = "auto"
HASH_BYTES = 16  # of a picture's digest: none is ever met twice by chance


@dataclass(frozen=True)
class ImageInfo:
    """What became of one picture or frame."""

    source: str
    width: int
    height: int
    tiles: int
    tokens: int


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """One picture or frame, cut for the tower. tiles: raw colours (T, S, S, 3) uint8."""

    tiles: np.ndarray
    info: ImageInfo

    @cached_property
    def content_hash(self) -> bytes:
        """Name the content: equal for equal tiles, whatever the file is called."""
        digest = blake2b(str(self.tiles.shape).encode(), digest_size=HASH_BYTES)
        digest.update(np.ascontiguousarray(self.tiles).data)
        return digest.digest()


@dataclass(frozen=True, eq=False)
class ProcessedVideo:
    """A video as it was taken in: its frames, and when they are shown if the prompt tells."""

    name: str
    frames: tuple[ProcessedImage, ...]
    times: tuple[float, ...] | None = None

    @property
    def media(self) -> MessageMedia:
        return MessageMedia(tiles=(1,) * len(self.frames), kind="video", times=self.times)


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """What the model reads. ``seen``: the pictures and frames in the order of their tokens."""

    token_ids: list[int]
    processed_images: tuple[ProcessedImage, ...]
    positions: np.ndarray
    deltas: tuple[float, ...] = ()
    preprocess_s: float = 0.0

    @property
    def images(self) -> tuple[ImageInfo, ...]:
        return tuple(seen.info for seen in self.processed_images)

    @property
    def tiles(self) -> np.ndarray | None:
        """(T, S, S, 3) uint8, raw colours of all pictures; None without pictures."""
        return (
            np.concatenate([seen.tiles for seen in self.processed_images])
            if self.processed_images
            else None
        )

    @property
    def input_ids(self) -> mx.array:
        """(L,) int32."""
        return mx.array(self.token_ids, dtype=mx.int32)

    @property
    def pixel_values(self) -> mx.array | None:
        """(T, S, S, 3) float32, normalised, equal to the published pipeline's to the bit."""
        return mx.array(normalize(self.tiles)) if self.tiles is not None else None

    @property
    def position_ids(self) -> mx.array:
        """(L,) float32."""
        return mx.array(self.positions)

    @property
    def num_tiles(self) -> list[int]:
        """Tiles of each picture, thumbnails counted."""
        return [image.tiles for image in self.images]

    @property
    def image_tokens(self) -> int:
        return sum(image.tokens for image in self.images)

    @property
    def uses_unit_positions(self) -> bool:
        """True when every token takes one whole position, so that the fused rotary serves."""
        return all(delta == 1 for delta in self.deltas)

    @property
    def next_position(self) -> float:
        """Where the first generated token stands."""
        return next_position(self.positions)


@dataclass(frozen=True)
class Processor:
    """Turns questions into inputs for one model."""

    config: ModelConfig
    tokenizer: Tokenizer
    template: Template

    def __call__(
        self, question: str, images: Sequence[Any], settings: GenerationConfig
    ) -> ModelInputs:
        started = time.perf_counter()
        pictures = [self.process_image(source, settings) for source in images]
        films = [self.process_video(source, settings) for source in settings.video]
        counts = [picture.info.tiles for picture in pictures]
        history = [retile_message(turn, counts) for turn in settings.history]
        told = pictures[: len(pictures) - len(counts)]
        turn, rest = make_user_message(question, pictures[len(told) :], films)
        inputs = self.build([*history, turn], [*told, *rest], settings)
        return replace(inputs, preprocess_s=time.perf_counter() - started)

    def process_image(self, source: Any, settings: GenerationConfig) -> ProcessedImage:
        """Open one picture and cut it; one that was looked at before is taken as it is."""
        if isinstance(source, ProcessedImage):
            return source
        return self.tile_image(
            open_image(source, upright=settings.upright), self.tile_policy(settings)
        )

    def build(
        self, turns: Sequence[Message], seen: Sequence[ProcessedImage], settings: GenerationConfig
    ) -> ModelInputs:
        """Write the prompt of some turns. ``seen``: what they show, in the order of the prompt."""
        segments = self.template.render(turns, settings.system)
        ids = self.tokenizer.encode(segments, self.config.num_image_token)
        positions, deltas = self.compute_positions(ids, settings)
        return ModelInputs(ids, tuple(seen), positions, deltas)

    def tile_policy(self, settings: GenerationConfig) -> TilePolicy:
        """Take what the settings leave open from the checkpoint's config."""
        config = self.config
        most = config.max_dynamic_patch if settings.max_tiles is None else settings.max_tiles
        least = config.min_dynamic_patch if settings.min_tiles is None else settings.min_tiles
        if least > most:
            raise UserError(
                f"min_tiles {least} is more than max_tiles {most}; lower one or raise the other"
            )
        return TilePolicy(
            tile_size=config.force_image_size,
            min_tiles=least,
            max_tiles=most,
            thumbnail=config.use_thumbnail if settings.thumbnail is None else settings.thumbnail,
            dynamic=config.dynamic_image_size or settings.max_tiles is not None,
        )

    def tile_image(self, picture: LoadedImage, policy: TilePolicy) -> ProcessedImage:
        tiles = to_tiles(picture.image, policy)
        tokens = len(tiles) * self.config.num_image_token
        info = ImageInfo(picture.name, picture.width, picture.height, len(tiles), tokens)
        return ProcessedImage(tiles, info)

    def process_video(self, source: Any, settings: GenerationConfig) -> ProcessedVideo:
        """Read a video: each frame is one tile, without a thumbnail."""
        if isinstance(source, ProcessedVideo):
            return source
        from internvl3_mlx.images.video import read_frames

        frames = read_frames(source, settings.num_frames, upright=settings.upright)
        policy = TilePolicy(tile_size=self.config.force_image_size, max_tiles=1, dynamic=False)
        seen = tuple(self.tile_image(frame.loaded_image, policy) for frame in frames)
        times = tuple(frame.seconds for frame in frames) if settings.frame_times else None
        return ProcessedVideo(video_name(source), seen, times)

    def compute_positions(
        self, ids: list[int], settings: GenerationConfig
    ) -> tuple[np.ndarray, tuple[float, ...]]:
        """Place every token; return the step of each image run beside."""
        image_id = self.tokenizer.image_id
        runs = len(image_spans(ids, image_id))
        deltas = self.resolve_deltas(ids, runs, settings)
        return visual_positions(ids, image_id, deltas if runs else 1.0), deltas

    def resolve_deltas(
        self, ids: list[int], runs: int, settings: GenerationConfig
    ) -> tuple[float, ...]:
        given = settings.v2pe_delta
        if not isinstance(given, list | tuple):
            return (self.resolve_delta(given, ids),) * runs
        if len(given) != runs:
            raise PromptError(
                f"{len(given)} V2PE steps for {runs} pictures or frames; give one, or one for each"
            )
        return tuple(self.resolve_delta(delta, ids) for delta in given)

    def resolve_delta(self, given: V2PEDelta, ids: list[int]) -> float:
        """Read one step; ``auto`` is the largest that keeps the prompt in the trained window."""
        step = parse_delta(given)
        if step != AUTO:
            return step
        return auto_delta(ids, self.tokenizer.image_id, self.config.text.max_position_embeddings)


def make_user_message(
    question: str, pictures: Sequence[ProcessedImage], films: Sequence[ProcessedVideo]
) -> tuple[Message, list[ProcessedImage]]:
    """Make the user's turn, and put what it shows in the order of the prompt."""
    shown = [*((picture,) for picture in pictures), *(film.frames for film in films)]
    media = [
        *(MessageMedia((picture.info.tiles,)) for picture in pictures),
        *(f.media for f in films),
    ]
    turn = Message("user", question, tuple(media))
    return turn, [seen for n in media_order(turn) for seen in shown[n]]


def video_name(source: Any) -> str:
    return shorten_name(str(source)) if isinstance(source, str | Path) else "video"


def retile_message(turn: Message, rest: list[int]) -> Message:
    """Give a past turn as many pictures as it showed, tiled as they are now."""
    media = []
    for shown in turn.media:
        if shown.kind == "image":
            if not rest:
                raise PromptError(
                    "the history shows more pictures than were given; pass all of them in images"
                )
            media.append(MessageMedia(tiles=(rest.pop(0),)))
        else:
            raise PromptError(
                "a video in the history cannot be shown again; ask about it in the last turn"
            )
    return replace(turn, media=tuple(media))
