"""Images and videos of a record: how many tiles they have, and the tiles themselves."""

import os
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
from internvl3_mlx.images.load import image_size, open_image
from internvl3_mlx.images.tiling import TilePolicy, jpeg_roundtrip
from internvl3_mlx.prompt.messages import Message, MessageMedia, media_order
from internvl3_mlx.records.json_values import RecordError
from internvl3_mlx.records.media_refs import MediaRef
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.dataset import expand_user
from internvl3_mlx.training.data.record_files import DataFile
from internvl3_mlx.training.data.schema import ParsedRecord

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
        options = self.processing_config(file, len(record.images))
        frames = self.draw_num_frames(len(record.videos), generator)
        images = [
            self.processor.process_image(resolve_media_path(name, file), options)
            for name in record.images
        ]
        if file.augment if self.config.augment is None else self.config.augment:
            images = [augment_jpeg(image, generator) for image in images]
        videos = [
            self.load_video(resolve_video_path(name, file), count, record.clip)
            for name, count in zip(record.videos, frames, strict=True)
        ]
        return LoadedMedia(tuple(images), tuple(videos))

    def measure(self, record: ParsedRecord, file: DataFile) -> MediaShape:
        """Count tiles and frames from file headers; raise ``RecordError`` naming all bad files.

        Where the number of frames is drawn, this is the largest one.
        """
        policy = self.processor.tile_policy(self.processing_config(file, len(record.images)))
        errors: list[str] = []
        tiles: list[int] = []
        for name in record.images:
            with collect_errors(errors):
                tiles.append(policy.count(*image_size(resolve_media_path(name, file))))
        for name in record.videos:
            with collect_errors(errors):
                read_video(resolve_video_path(name, file), 1, record.clip)
        if errors:
            raise RecordError("; ".join(errors))
        return MediaShape(tuple(tiles), (self.config.num_frames,) * len(record.videos))

    def image_sizes(self, record: ParsedRecord, file: DataFile) -> list[tuple[int, int]]:
        """Return (width, height) of each image, upright, from the headers."""
        return [image_size(resolve_media_path(name, file)) for name in record.images]

    def has_all_files(self, record: ParsedRecord, file: DataFile) -> bool:
        """Whether all media that are named by a path are there."""
        images = [resolve_media_path(name, file) for name in record.images]
        videos = [resolve_video_path(name, file) for name in record.videos]
        return all(os.path.isfile(path) for path in images if isinstance(path, Path)) and all(
            os.path.exists(path) for path in videos if isinstance(path, Path)
        )

    def decode(self, record: ParsedRecord, file: DataFile) -> None:
        """Decode all media as the run will; raise ``RecordError`` naming all damaged files."""
        errors: list[str] = []
        for name in record.images:
            with collect_errors(errors):
                open_image(resolve_media_path(name, file))
        for name in record.videos:
            with collect_errors(errors):
                read_video(resolve_video_path(name, file), self.config.num_frames, record.clip)
        if errors:
            raise RecordError("; ".join(errors))

    def processing_config(self, file: DataFile, num_images: int = 1) -> GenerationConfig:
        """Combine the tile limits of the run and of the meta JSON: the lower one counts.

        The images of a record share the limit, as in the published training code, unless
        ``multi_image_tiles`` is "each".
        """
        limits = [n for n in (self.config.max_tiles, file.max_tiles) if n is not None]
        limit, least = min(limits, default=None), None
        model_config = self.processor.config
        shared = num_images > 1 and self.config.multi_image_tiles == "shared"
        if shared and (limit is not None or model_config.dynamic_image_size):
            limit = max(1, (limit or model_config.max_dynamic_patch) // num_images)
            least = min(limit, model_config.min_dynamic_patch)
        return GenerationConfig(max_tiles=limit, min_tiles=least, num_frames=self.config.num_frames)

    def draw_num_frames(self, videos: int, generator: np.random.Generator) -> list[int]:
        """Return how many frames to read of each video: fixed, or drawn from the range."""
        least, most = self.config.min_frames, self.config.num_frames
        if least is None or not videos:
            return [most] * videos
        drawn: list[int] = generator.integers(least, most + 1, size=videos).tolist()
        return drawn

    def load_video(
        self, video: str | Path | bytes, num_frames: int, clip: tuple[float, float] | None
    ) -> tuple[ProcessedImage, ...]:
        """Read the frames of a video, one tile each. Frames are never augmented."""
        from internvl3_mlx.images.video import iter_frames

        frames = iter_frames(video, num_frames, bound=clip)
        model_config = self.processor.config
        policy = TilePolicy(tile_size=model_config.force_image_size, max_tiles=1, dynamic=False)
        return tuple(self.processor.tile_image(frame.loaded_image, policy) for frame in frames)


def resolve_media_path(name: MediaRef, file: DataFile) -> str | Path | bytes:
    """Return where an image is: relative to its data file, or to the root that a meta JSON sets.

    Bytes, data and file URLs are returned as they are; raises ``ImageError`` for other URLs.
    """
    if isinstance(name, bytes):
        return name
    if url := URL_PATTERN.match(name):
        if (url[1] or url[2]).lower() not in ("data", "file"):
            raise ImageError(
                f"cannot train on {shorten_name(name)}: images are read once per epoch; "
                "download it and use its path"
            )
        return name
    path = file.root / expand_user(name)
    # by os.path, since Path raises for a name that is too long, such as an image in base64
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for without end
        raise ImageError(f"cannot read {shorten_name(name)}: it is not a regular file")
    if not os.path.exists(path) and file.root != Path() and os.path.isfile(name):
        raise ImageError(
            f"no file at {shorten_name(str(path))}: paths are relative to {file.root}, and there "
            f"is one at ./{shorten_name(name)}; pass --image-folder . to read from this folder"
        )
    return path


def resolve_video_path(name: MediaRef, file: DataFile) -> str | Path | bytes:
    """Return where a video is, as ``resolve_media_path``; it may be a folder of frames."""
    if not isinstance(name, bytes) and not URL_PATTERN.match(name):
        folder = file.root / expand_user(name)
        if os.path.isdir(folder):
            return folder
    return resolve_media_path(name, file)


def read_video(video: str | Path | bytes, frames: int, clip: tuple[float, float] | None) -> None:
    """Check that some frames of a video, or of the clip, can be read."""
    from internvl3_mlx.images.video import iter_frames

    for _ in iter_frames(video, frames, bound=clip):  # none of them is kept
        pass


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
