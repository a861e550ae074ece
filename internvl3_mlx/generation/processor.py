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
from internvl3_mlx.generation.generation_config import Delta, Settings
from internvl3_mlx.images.fetch import short
from internvl3_mlx.images.load import Picture, open_picture
from internvl3_mlx.images.tiling import TilePolicy, normalize, to_tiles
from internvl3_mlx.prompt.messages import Media, Turn, shown_order
from internvl3_mlx.prompt.template import Template
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.prompt.v2pe import (
    auto_delta,
    image_runs,
    next_position,
    parse_delta,
    visual_positions,
)

AUTO: Literal["auto"] = "auto"
KEY_BYTES = 16  # of a picture's digest: none is ever met twice by chance


@dataclass(frozen=True)
class ImageInfo:
    """What became of one picture or frame."""

    source: str
    width: int
    height: int
    tiles: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Seen:
    """One picture or frame, cut for the tower. tiles: raw colours (T, S, S, 3) uint8."""

    tiles: np.ndarray
    info: ImageInfo

    @cached_property
    def key(self) -> bytes:
        """Name the content: equal for equal tiles, whatever the file is called."""
        digest = blake2b(str(self.tiles.shape).encode(), digest_size=KEY_BYTES)
        digest.update(np.ascontiguousarray(self.tiles).data)
        return digest.digest()


@dataclass(frozen=True, eq=False)
class Film:
    """A video as it was taken in: its frames, and when they are shown if the prompt tells."""

    name: str
    frames: tuple[Seen, ...]
    times: tuple[float, ...] | None = None

    @property
    def media(self) -> Media:
        return Media(tiles=(1,) * len(self.frames), kind="video", times=self.times)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the model reads. ``seen``: the pictures and frames in the order of their tokens."""

    token_ids: list[int]
    seen: tuple[Seen, ...]
    positions: np.ndarray
    deltas: tuple[float, ...] = ()
    seconds: float = 0.0

    @property
    def images(self) -> tuple[ImageInfo, ...]:
        return tuple(seen.info for seen in self.seen)

    @property
    def tiles(self) -> np.ndarray | None:
        """(T, S, S, 3) uint8, raw colours of all pictures; None without pictures."""
        return np.concatenate([seen.tiles for seen in self.seen]) if self.seen else None

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
        pictures = [self.look(source, settings) for source in images]
        films = [self.watch(source, settings) for source in settings.video]
        counts = [picture.info.tiles for picture in pictures]
        history = [given_tiles(turn, counts) for turn in settings.history]
        told = pictures[: len(pictures) - len(counts)]
        turn, rest = asked(question, pictures[len(told) :], films)
        inputs = self.lay([*history, turn], [*told, *rest], settings)
        return replace(inputs, seconds=time.perf_counter() - started)

    def look(self, source: Any, settings: Settings) -> Seen:
        """Open one picture and cut it; one that was looked at before is taken as it is."""
        if isinstance(source, Seen):
            return source
        return self.cut(open_picture(source, upright=settings.upright), self.policy(settings))

    def lay(self, turns: Sequence[Turn], seen: Sequence[Seen], settings: Settings) -> Inputs:
        """Write the prompt of some turns. ``seen``: what they show, in the order of the prompt."""
        segments = self.template.render(turns, settings.system)
        ids = self.tokenizer.encode(segments, self.config.num_image_token)
        positions, deltas = self.positions(ids, settings)
        return Inputs(ids, tuple(seen), positions, deltas)

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

    def cut(self, picture: Picture, policy: TilePolicy) -> Seen:
        tiles = to_tiles(picture.image, policy)
        tokens = len(tiles) * self.config.num_image_token
        info = ImageInfo(picture.name, picture.width, picture.height, len(tiles), tokens)
        return Seen(tiles, info)

    def watch(self, source: Any, settings: Settings) -> Film:
        """Read a video: each frame is one tile, without a thumbnail."""
        if isinstance(source, Film):
            return source
        from internvl3_mlx.images.video import read_frames

        frames = read_frames(source, settings.num_frames, upright=settings.upright)
        policy = TilePolicy(tile_size=self.config.force_image_size, max_tiles=1, dynamic=False)
        seen = tuple(self.cut(frame.picture, policy) for frame in frames)
        times = tuple(frame.seconds for frame in frames) if settings.frame_times else None
        return Film(short_name(source), seen, times)

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
                f"{len(given)} V2PE steps for {runs} pictures or frames; give one, or one for each"
            )
        return tuple(self.delta(delta, ids) for delta in given)

    def delta(self, given: Delta, ids: list[int]) -> float:
        """Read one step; ``auto`` is the largest that keeps the prompt in the trained window."""
        step = parse_delta(given)
        if step != AUTO:
            return step
        return auto_delta(ids, self.tokenizer.image_id, self.config.text.max_position_embeddings)


def asked(
    question: str, pictures: Sequence[Seen], films: Sequence[Film]
) -> tuple[Turn, list[Seen]]:
    """Make the user's turn, and put what it shows in the order of the prompt."""
    shown = [*((picture,) for picture in pictures), *(film.frames for film in films)]
    media = [*(Media((picture.info.tiles,)) for picture in pictures), *(f.media for f in films)]
    turn = Turn("user", question, tuple(media))
    return turn, [seen for n in shown_order(turn) for seen in shown[n]]


def short_name(source: Any) -> str:
    return short(str(source)) if isinstance(source, str | Path) else "video"


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
    return replace(turn, media=tuple(media))
