"""The pictures and videos of a row: how many tiles they take, and the tiles themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from internvl3_mlx.errors import ImageError, UserError
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ProcessedImage, Processor
from internvl3_mlx.images.fetch import URL_PATTERN, shorten_name
from internvl3_mlx.images.load import image_size
from internvl3_mlx.images.tiling import TilePolicy, jpeg_roundtrip
from internvl3_mlx.prompt.messages import Message, MessageMedia, media_order
from internvl3_mlx.training.config import DataSettings
from internvl3_mlx.training.data.dataset import DataFile
from internvl3_mlx.training.data.schema import ParsedRecord, RecordError

ONE_IMAGE, ONE_VIDEO = MessageMedia((1,)), MessageMedia((1,), "video")  # for their order alone


@dataclass(frozen=True)
class MediaShape:
    """What the prompt must know of a row's media: tiles of each picture, frames of each video."""

    image_tiles: tuple[int, ...] = ()
    video_frames: tuple[int, ...] = ()

    @property
    def num_tiles(self) -> int:
        return sum(self.image_tiles) + sum(self.video_frames)


@dataclass(frozen=True, eq=False)
class LoadedMedia:
    """The media of a row, cut into tiles."""

    images: tuple[ProcessedImage, ...] = ()
    videos: tuple[tuple[ProcessedImage, ...], ...] = ()

    @property
    def shape(self) -> MediaShape:
        tiles = tuple(seen.info.tiles for seen in self.images)
        return MediaShape(tiles, tuple(len(film) for film in self.videos))

    def in_token_order(self, record: ParsedRecord) -> Iterator[ProcessedImage]:
        """Give pictures and frames in the order of their tokens."""
        images = iter((seen,) for seen in self.images)
        films = iter(self.videos)
        for said in record.messages:
            shown = [*islice(images, said.num_images), *islice(films, said.num_videos)]
            media = [*[ONE_IMAGE] * said.num_images, *[ONE_VIDEO] * said.num_videos]
            if media:
                for n in media_order(Message("user", said.text, tuple(media))):
                    yield from shown[n]


@dataclass(frozen=True)
class MediaLoader:
    """Looks at the media of rows, as a chat with the model would."""

    processor: Processor
    config: DataSettings

    def load(
        self, record: ParsedRecord, file: DataFile, generator: np.random.Generator
    ) -> LoadedMedia:
        """Read pictures and frames. ``draw`` gives the qualities of augmented tiles."""
        asked = self.processing_config(file)
        images = [
            self.processor.process_image(resolve_media_path(name, file), asked)
            for name in record.images
        ]
        wanted = self.config.augment
        if wanted or (wanted is None and file.augment):
            images = [augment_jpeg(seen, generator) for seen in images]
        films = [self.load_video(name, file, record.clip) for name in record.videos]
        return LoadedMedia(tuple(images), tuple(films))

    def measure(self, record: ParsedRecord, file: DataFile) -> MediaShape:
        """Count tiles and frames from headers; raise ``RowFault`` with all files at fault."""
        policy = self.processor.tile_policy(self.processing_config(file))
        faults: list[str] = []
        images: list[int] = []
        for name in record.images:
            with collect_errors(faults):
                images.append(policy.count(*image_size(resolve_media_path(name, file))))
        for name in record.videos:
            with collect_errors(faults):
                check_video(resolve_media_path(name, file), record.clip)
        if faults:
            raise RecordError("; ".join(faults))
        return MediaShape(tuple(images), (self.config.num_frames,) * len(record.videos))

    def processing_config(self, file: DataFile) -> GenerationConfig:
        """Take the lower of the limits that the command and the meta JSON set."""
        limits = [n for n in (self.config.max_tiles, file.max_tiles) if n is not None]
        return GenerationConfig(
            max_tiles=min(limits, default=None), num_frames=self.config.num_frames
        )

    def load_video(
        self, name: str, file: DataFile, clip: tuple[float, float] | None
    ) -> tuple[ProcessedImage, ...]:
        """Read a video's frames: one tile each, none of them augmented."""
        from internvl3_mlx.images.video import read_frames

        frames = read_frames(resolve_media_path(name, file), self.config.num_frames, bound=clip)
        policy = TilePolicy(
            tile_size=self.processor.config.force_image_size, max_tiles=1, dynamic=False
        )
        return tuple(self.processor.tile_image(frame.loaded_image, policy) for frame in frames)


def resolve_media_path(name: str, file: DataFile) -> str | Path:
    """Say where a picture lies: beside its file of rows, or in the root of a meta JSON."""
    if address := URL_PATTERN.match(name):
        if (address[1] or address[2]).lower() not in ("data", "file"):
            raise ImageError(
                f"cannot train on {shorten_name(name)}: pictures are read once an epoch; "
                "download it and give its path"
            )
        return name
    return file.root / Path(name).expanduser()


def check_video(video: str | Path, clip: tuple[float, float] | None) -> None:
    """See that a video is there, and long enough for the part that is wanted."""
    from internvl3_mlx.images.video import read_frames

    read_frames(video, 1, bound=clip)


@contextmanager
def collect_errors(errors: list[str]) -> Iterator[None]:
    """Note what is wrong with a file and go on."""
    try:
        yield
    except UserError as error:
        errors.append(str(error))


MIN_JPEG_QUALITY, MAX_JPEG_QUALITY = 75, 100  # quality; whole numbers, both ends drawn


def augment_jpeg(image: ProcessedImage, generator: np.random.Generator) -> ProcessedImage:
    """Write each tile of a picture as JPEG of a quality of its own."""
    qualities = generator.integers(MIN_JPEG_QUALITY, MAX_JPEG_QUALITY + 1, size=len(image.tiles))
    return replace(image, tiles=jpeg_roundtrip(image.tiles, qualities.tolist()))
