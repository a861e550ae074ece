"""Images and videos of a record: how many tiles they have, and the tiles themselves."""

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
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.dataset import DataFile
from internvl3_mlx.training.data.schema import ParsedRecord, RecordError

ONE_IMAGE, ONE_VIDEO = MessageMedia((1,)), MessageMedia((1,), "video")  # to ask for their order
MIN_JPEG_QUALITY, MAX_JPEG_QUALITY = 75, 100  # integers, both ends included


@dataclass(frozen=True)
class MediaShape:
    """What the prompt depends on: the tiles of each image and the frames of each video."""

    image_tiles: tuple[int, ...] = ()
    video_frames: tuple[int, ...] = ()

    @property
    def num_tiles(self) -> int:
        return sum(self.image_tiles) + sum(self.video_frames)


@dataclass(frozen=True, eq=False)
class LoadedMedia:
    """The media of a record as tiles; a video is a tuple of frames."""

    images: tuple[ProcessedImage, ...] = ()
    videos: tuple[tuple[ProcessedImage, ...], ...] = ()

    @property
    def shape(self) -> MediaShape:
        tiles = tuple(image.info.tiles for image in self.images)
        return MediaShape(tiles, tuple(len(frames) for frames in self.videos))

    def in_token_order(self, record: ParsedRecord) -> Iterator[ProcessedImage]:
        """Yield images and frames in the order of their tokens in the prompt."""
        images = iter((image,) for image in self.images)
        videos = iter(self.videos)
        for message in record.messages:
            shown = [*islice(images, message.num_images), *islice(videos, message.num_videos)]
            media = [*[ONE_IMAGE] * message.num_images, *[ONE_VIDEO] * message.num_videos]
            if media:
                for index in media_order(Message("user", message.text, tuple(media))):
                    yield from shown[index]


@dataclass(frozen=True)
class MediaLoader:
    """Loads the media of records as a chat with the model would."""

    processor: Processor
    config: TrainConfig

    def load(
        self, record: ParsedRecord, file: DataFile, generator: np.random.Generator
    ) -> LoadedMedia:
        """Decode and tile images and frames. ``generator`` draws JPEG qualities if augmenting."""
        options = self.processing_config(file)
        images = [
            self.processor.process_image(resolve_media_path(name, file), options)
            for name in record.images
        ]
        if file.augment if self.config.augment is None else self.config.augment:
            images = [augment_jpeg(image, generator) for image in images]
        videos = [self.load_video(name, file, record.clip) for name in record.videos]
        return LoadedMedia(tuple(images), tuple(videos))

    def measure(self, record: ParsedRecord, file: DataFile) -> MediaShape:
        """Count tiles and frames from file headers; raise ``RecordError`` naming all bad files."""
        policy = self.processor.tile_policy(self.processing_config(file))
        errors: list[str] = []
        tiles: list[int] = []
        for name in record.images:
            with collect_errors(errors):
                tiles.append(policy.count(*image_size(resolve_media_path(name, file))))
        for name in record.videos:
            with collect_errors(errors):
                check_video(resolve_media_path(name, file), record.clip)
        if errors:
            raise RecordError("; ".join(errors))
        return MediaShape(tuple(tiles), (self.config.num_frames,) * len(record.videos))

    def processing_config(self, file: DataFile) -> GenerationConfig:
        """Combine the tile limits of the run and of the meta JSON: the lower one counts."""
        limits = [n for n in (self.config.max_tiles, file.max_tiles) if n is not None]
        return GenerationConfig(
            max_tiles=min(limits, default=None), num_frames=self.config.num_frames
        )

    def load_video(
        self, name: str, file: DataFile, clip: tuple[float, float] | None
    ) -> tuple[ProcessedImage, ...]:
        """Read the frames of a video, one tile each. Frames are never augmented."""
        from internvl3_mlx.images.video import read_frames

        frames = read_frames(resolve_media_path(name, file), self.config.num_frames, bound=clip)
        model_config = self.processor.config
        policy = TilePolicy(tile_size=model_config.force_image_size, max_tiles=1, dynamic=False)
        return tuple(self.processor.tile_image(frame.loaded_image, policy) for frame in frames)


def resolve_media_path(name: str, file: DataFile) -> str | Path:
    """Return where an image is: relative to its JSONL file, or to the root that a meta JSON sets.

    Data and file URLs are returned as they are; raises ``ImageError`` for other URLs.
    """
    if url := URL_PATTERN.match(name):
        if (url[1] or url[2]).lower() not in ("data", "file"):
            raise ImageError(
                f"cannot train on {shorten_name(name)}: images are read once per epoch; "
                "download it and use its path"
            )
        return name
    return file.root / Path(name).expanduser()


def check_video(video: str | Path, clip: tuple[float, float] | None) -> None:
    """Check that a video can be read and is long enough for the clip."""
    from internvl3_mlx.images.video import read_frames

    read_frames(video, 1, bound=clip)


@contextmanager
def collect_errors(errors: list[str]) -> Iterator[None]:
    """Append a user error to ``errors`` instead of raising it."""
    try:
        yield
    except UserError as error:
        errors.append(str(error))


def augment_jpeg(image: ProcessedImage, generator: np.random.Generator) -> ProcessedImage:
    """Re-encode each tile as JPEG, at a random quality of its own."""
    qualities = generator.integers(MIN_JPEG_QUALITY, MAX_JPEG_QUALITY + 1, size=len(image.tiles))
    return replace(image, tiles=jpeg_roundtrip(image.tiles, qualities.tolist()))
