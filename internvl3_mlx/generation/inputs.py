"""From a question, pictures and settings to what the model reads: ids, tiles and positions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.errors import PromptError, UserError
from internvl3_mlx.generation.settings import Delta, Settings
from internvl3_mlx.images.pixels import TilePolicy, normalize, to_tiles
from internvl3_mlx.images.source import Picture, open_picture
from internvl3_mlx.prompt.positions import (
    auto_delta,
    image_runs,
    next_position,
    parse_delta,
    visual_positions,
)
from internvl3_mlx.prompt.template import Media, Template, Turn
from internvl3_mlx.prompt.tokens import Tokenizer

AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class ImageInfo:
    """What became of one picture or frame."""

    source: str
    width: int
    height: int
    tiles: int
    tokens: int


@dataclass(frozen=True)
class Inputs:
    """What the model reads. ``tiles``: raw colours (T, S, S, 3) uint8; None without pictures."""

    token_ids: list[int]
    tiles: np.ndarray | None
    positions: np.ndarray
    images: tuple[ImageInfo, ...]
    deltas: tuple[float, ...]
    seconds: float = 0.0

    @property
    def input_ids(self) -> mx.array:
        """(L,) int32."""
        return mx.array(self.token_ids, dtype=mx.int32)

    @property
    def pixel_values(self) -> mx.array | None:
        """(T, S, S, 3) float32, normalised, equal to the published pipeline's to the bit."""
        return None if self.tiles is None else mx.array(normalize(self.tiles))

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
    def is_ordinary(self) -> bool:
        """True when every token takes one whole position, so that the fused rotary serves."""
        return all(delta == 1 for delta in self.deltas)

    @property
    def next_position(self) -> float:
        """Where the first generated token stands."""
        return next_position(self.positions)


@dataclass(frozen=True)
class Preparer:
    """Turns questions into inputs for one model."""

    config: ModelConfig
    tokenizer: Tokenizer
    template: Template

    def __call__(self, question: str, images: Sequence[Any], settings: Settings) -> Inputs:
        started = time.perf_counter()
        policy = self.policy(settings)
        pictures = [
            self.see(open_picture(source, upright=settings.upright), policy) for source in images
        ]
        videos = [self.watch(source, settings) for source in settings.video]
        turns = self.turns(question, [info.tiles for _, info in pictures], videos, settings)
        seen = [*pictures, *(frame for frames, _ in videos for frame in frames)]
        ids = self.tokenizer.encode(
            self.template.render(turns, settings.system), self.config.num_image_token
        )
        tiles = np.concatenate([tile for tile, _ in seen]) if seen else None
        infos = tuple(info for _, info in seen)
        positions, deltas = self.positions(ids, settings)
        return Inputs(ids, tiles, positions, infos, deltas, time.perf_counter() - started)

    def policy(self, settings: Settings) -> TilePolicy:
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

    def see(self, picture: Picture, policy: TilePolicy) -> tuple[np.ndarray, ImageInfo]:
        tiles = to_tiles(picture.image, policy)
        tokens = len(tiles) * self.config.num_image_token
        return tiles, ImageInfo(picture.name, picture.width, picture.height, len(tiles), tokens)

    def watch(
        self, source: Any, settings: Settings
    ) -> tuple[list[tuple[np.ndarray, ImageInfo]], Media]:
        """Read a video: each frame is one tile, without a thumbnail."""
        from internvl3_mlx.images.video import read_frames

        frames = read_frames(source, settings.num_frames, upright=settings.upright)
        policy = TilePolicy(tile_size=self.config.force_image_size, max_tiles=1, dynamic=False)
        seen = [self.see(frame.picture, policy) for frame in frames]
        times = tuple(frame.seconds for frame in frames) if settings.frame_times else None
        return seen, Media(tiles=(1,) * len(frames), kind="video", times=times)

    def turns(
        self,
        question: str,
        tiles: list[int],
        videos: Sequence[tuple[Any, Media]],
        settings: Settings,
    ) -> list[Turn]:
        """Share the pictures out: to the history's turns in order, the rest to this question."""
        rest = list(tiles)
        history = [given_tiles(turn, rest) for turn in settings.history]
        media = tuple(Media(tiles=(count,)) for count in rest)
        return [*history, Turn("user", question, media + tuple(media for _, media in videos))]

    def positions(self, ids: list[int], settings: Settings) -> tuple[np.ndarray, tuple[float, ...]]:
        """Place every token; return the step of each image run beside."""
        image_id = self.tokenizer.image_id
        runs = len(image_runs(ids, image_id))
        deltas = self.deltas(ids, runs, settings)
        return visual_positions(ids, image_id, deltas if runs else 1.0), deltas

    def deltas(self, ids: list[int], runs: int, settings: Settings) -> tuple[float, ...]:
        given = settings.v2pe_delta
        if not isinstance(given, list | tuple):
            return (self.delta(given, ids),) * runs
        if len(given) != runs:
            raise PromptError(
                f"{len(given)} values of v2pe_delta for {runs} pictures and frames; give one or all"
            )
        return tuple(self.delta(delta, ids) for delta in given)

    def delta(self, given: Delta, ids: list[int]) -> float:
        """Read one step; ``auto`` is the largest that keeps the prompt in the trained window."""
        step = parse_delta(given)
        if step != AUTO:
            return step
        return auto_delta(ids, self.tokenizer.image_id, self.config.text.max_position_embeddings)


def given_tiles(turn: Turn, rest: list[int]) -> Turn:
    """Give a past turn as many pictures as it showed, tiled as they are now."""
    media = []
    for shown in turn.media:
        if shown.kind == "image":
            if not rest:
                raise PromptError(
                    "the history shows more pictures than were given; pass all of them in images"
                )
            media.append(Media(tiles=(rest.pop(0),)))
        else:
            raise PromptError(
                "a video in the history cannot be shown again; ask about it in the last turn"
            )
    return Turn(turn.role, turn.text, tuple(media))
