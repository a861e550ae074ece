"""The pictures and videos of a row: how many tiles they take, and the tiles themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from internvl3_mlx.errors import ImageError, UserError
from internvl3_mlx.generation.generation_config import Settings
from internvl3_mlx.generation.processor import Preparer, Seen
from internvl3_mlx.images.fetch import ADDRESS, short
from internvl3_mlx.images.load import picture_size
from internvl3_mlx.images.tiling import TilePolicy, as_jpeg
from internvl3_mlx.prompt.messages import Media, Turn, shown_order
from internvl3_mlx.training.config import DataSettings
from internvl3_mlx.training.data.dataset import Source
from internvl3_mlx.training.data.schema import Row, RowFault

IMAGE, VIDEO = Media((1,)), Media((1,), "video")  # for their order alone


@dataclass(frozen=True)
class Shape:
    """What the prompt must know of a row's media: tiles of each picture, frames of each video."""

    images: tuple[int, ...] = ()
    films: tuple[int, ...] = ()

    @property
    def tiles(self) -> int:
        return sum(self.images) + sum(self.films)


@dataclass(frozen=True, eq=False)
class Looked:
    """The media of a row, cut into tiles."""

    images: tuple[Seen, ...] = ()
    films: tuple[tuple[Seen, ...], ...] = ()

    @property
    def shape(self) -> Shape:
        tiles = tuple(seen.info.tiles for seen in self.images)
        return Shape(tiles, tuple(len(film) for film in self.films))

    def in_order(self, row: Row) -> Iterator[Seen]:
        """Give pictures and frames in the order of their tokens."""
        images = iter((seen,) for seen in self.images)
        films = iter(self.films)
        for said in row.turns:
            shown = [*islice(images, said.images), *islice(films, said.videos)]
            media = [*[IMAGE] * said.images, *[VIDEO] * said.videos]
            if media:
                for n in shown_order(Turn("user", said.text, tuple(media))):
                    yield from shown[n]


@dataclass(frozen=True)
class Looker:
    """Looks at the media of rows, as a chat with the model would."""

    preparer: Preparer
    settings: DataSettings

    def look(self, row: Row, source: Source, draw: np.random.Generator) -> Looked:
        """Read pictures and frames. ``draw`` gives the qualities of augmented tiles."""
        asked = self.asked(source)
        images = [self.preparer.look(place(name, source), asked) for name in row.images]
        wanted = self.settings.augment
        if wanted or (wanted is None and source.augment):
            images = [augmented(seen, draw) for seen in images]
        films = [self.watch(name, source, row.bound) for name in row.videos]
        return Looked(tuple(images), tuple(films))

    def measure(self, row: Row, source: Source) -> Shape:
        """Count tiles and frames from headers; raise ``RowFault`` with all files at fault."""
        policy = self.preparer.policy(self.asked(source))
        faults: list[str] = []
        images: list[int] = []
        for name in row.images:
            with collected(faults):
                images.append(policy.count(*picture_size(place(name, source))))
        for name in row.videos:
            with collected(faults):
                check_video(place(name, source), row.bound)
        if faults:
            raise RowFault("; ".join(faults))
        return Shape(tuple(images), (self.settings.num_frames,) * len(row.videos))

    def asked(self, source: Source) -> Settings:
        """Take the lower of the limits that the command and the meta JSON set."""
        limits = [n for n in (self.settings.max_tiles, source.max_tiles) if n is not None]
        return Settings(max_tiles=min(limits, default=None), num_frames=self.settings.num_frames)

    def watch(
        self, name: str, source: Source, bound: tuple[float, float] | None
    ) -> tuple[Seen, ...]:
        """Read a video's frames: one tile each, none of them augmented."""
        from internvl3_mlx.images.video import read_frames

        frames = read_frames(place(name, source), self.settings.num_frames, bound=bound)
        policy = TilePolicy(
            tile_size=self.preparer.config.force_image_size, max_tiles=1, dynamic=False
        )
        return tuple(self.preparer.cut(frame.picture, policy) for frame in frames)


def place(name: str, source: Source) -> str | Path:
    """Say where a picture lies: beside its file of rows, or in the root of a meta JSON."""
    if address := ADDRESS.match(name):
        if (address[1] or address[2]).lower() not in ("data", "file"):
            raise ImageError(
                f"cannot train on {short(name)}: pictures are read once an epoch; "
                "download it and give its path"
            )
        return name
    return source.root / Path(name).expanduser()


def check_video(video: str | Path, bound: tuple[float, float] | None) -> None:
    """See that a video is there, and long enough for the part that is wanted."""
    from internvl3_mlx.images.video import read_frames

    read_frames(video, 1, bound=bound)


@contextmanager
def collected(faults: list[str]) -> Iterator[None]:
    """Note what is wrong with a file and go on."""
    try:
        yield
    except UserError as error:
        faults.append(str(error))


LOWEST, HIGHEST = 75, 100  # quality; whole numbers, both ends drawn


def augmented(seen: Seen, draw: np.random.Generator) -> Seen:
    """Write each tile of a picture as JPEG of a quality of its own."""
    qualities = draw.integers(LOWEST, HIGHEST + 1, size=len(seen.tiles))
    return replace(seen, tiles=as_jpeg(seen.tiles, qualities.tolist()))
