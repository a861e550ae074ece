"""Open images and videos on a thread; the vision model encodes each while the next is opened.

One road for an answer (``open_media``), a conversation, and the files in a line of a chat. Only
arrays of NumPy go from thread to thread: one thread owns MLX.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import mlx.core as mx

from internvl3_mlx.generation.generation_config import GenerationConfig, InputVideo
from internvl3_mlx.generation.processor import (
    InputImage,
    ModelInputs,
    ProcessedFrame,
    ProcessedImage,
    ProcessedVideo,
    Processor,
    make_video,
)
from internvl3_mlx.models.internvl import GPU_TILES_PER_CHUNK
from internvl3_mlx.prefetch import prefetch

FRAMES_PER_STEP = GPU_TILES_PER_CHUNK  # so that a GPU encodes the pairs that it would of the whole

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
EncodeImages = Callable[[Sequence[ProcessedImage]], object]


@dataclass(frozen=True, eq=False)
class OpeningStep(Generic[T_co]):
    """A part of what is opened: images that can be encoded, and what is complete with them."""

    images: Sequence[ProcessedImage]
    result: T_co | None = None


@dataclass(eq=False)
class OpenMedia:
    """Images and videos of a question, and the seconds that opening and encoding them took.

    peak_nbytes: the peak of MLX's memory meanwhile; 0 where nothing was encoded.
    """

    images: list[ProcessedImage] = field(default_factory=list[ProcessedImage])
    videos: list[ProcessedVideo] = field(default_factory=list[ProcessedVideo])
    preprocess_s: float = 0.0
    vision_s: float = 0.0
    peak_nbytes: int = 0

    def describe(self, inputs: ModelInputs) -> ModelInputs:
        """Return inputs with what opening their media has taken, for the statistics."""
        return replace(
            inputs,
            preprocess_s=self.preprocess_s,
            vision_s=self.vision_s,
            vision_nbytes=self.peak_nbytes,
        )


def open_media(
    processor: Processor,
    images: Sequence[InputImage],
    videos: Sequence[InputVideo],
    config: GenerationConfig,
    encode: EncodeImages | None = None,
) -> OpenMedia:
    """Open and tile what a question shows, and encode what is there while more is opened.

    encode: is given all images and frames so far. Without it, and where all are open already,
    nothing is encoded.
    """
    started, media = time.perf_counter(), OpenMedia()
    if all(map(is_open, [*images, *videos])):
        encode = None

    def encode_timed(shown: Sequence[ProcessedImage]) -> None:
        begun = time.perf_counter()
        if encode is not None:
            mx.reset_peak_memory()
            encode(shown)
            media.peak_nbytes = max(media.peak_nbytes, mx.get_peak_memory())
        media.vision_s += time.perf_counter() - begun

    steps = open_steps(processor, images, videos, config)
    count = 1 if encode is None else count_steps(images, videos, config)
    for result in encode_while_opening(steps, count, encode_timed):
        if isinstance(result, ProcessedVideo):
            media.videos.append(result)
        else:
            media.images.append(result)
    media.preprocess_s = time.perf_counter() - started - media.vision_s
    return media


def encode_while_opening(
    steps: Generator[OpeningStep[T], None, None], count: int, encode: EncodeImages
) -> Iterator[T]:
    """Yield the results of ``count`` steps, which are made on a thread, a few of them early.

    encode: is given the images of all steps so far, while the next step is made. After the last
    step it is not called: nothing is left to wait for. If there is to be one step only, all is
    done in the caller's thread.
    """
    shown = list[ProcessedImage]()
    with closing(prefetch(steps) if count > 1 else steps) as ready:
        for number, step in enumerate(ready, 1):
            if step.result is not None:
                yield step.result
            shown += step.images
            if number < count:
                encode(shown)


def open_steps(
    processor: Processor,
    images: Sequence[InputImage],
    videos: Sequence[InputVideo],
    config: GenerationConfig,
) -> Generator[OpeningStep[ProcessedImage | ProcessedVideo], None, None]:
    """Open images and videos one after the other."""
    for image in images:
        processed = processor.process_image(image, config)
        _ = processed.content_hash  # computed here, it costs the vision model no time
        yield OpeningStep((processed,), processed)
    for video in videos:
        yield from open_video_steps(processor, video, config)


def open_video_steps(
    processor: Processor, video: InputVideo, config: GenerationConfig
) -> Iterator[OpeningStep[ProcessedVideo]]:
    """Open the frames of a video, a few in each step."""
    if isinstance(video, ProcessedVideo):
        yield OpeningStep(video.frames, video)
        return
    frames, waiting = list[ProcessedFrame](), list[ProcessedImage]()
    for frame in processor.iter_frames(video, config):
        _ = frame.image.content_hash
        frames.append(frame)
        waiting.append(frame.image)
        is_last = len(frames) == config.num_frames
        if is_last or len(waiting) == FRAMES_PER_STEP:
            yield OpeningStep(waiting, make_video(video, frames, config) if is_last else None)
            waiting = []


def count_steps(
    images: Sequence[InputImage], videos: Sequence[InputVideo], config: GenerationConfig
) -> int:
    """Return how many steps ``open_steps`` takes."""
    return len(images) + sum(count_video_steps(video, config) for video in videos)


def count_video_steps(video: InputVideo, config: GenerationConfig) -> int:
    """Return how many steps ``open_video_steps`` takes."""
    return 1 if isinstance(video, ProcessedVideo) else -(-config.num_frames // FRAMES_PER_STEP)


def is_open(medium: InputImage | InputVideo) -> bool:
    return isinstance(medium, ProcessedImage | ProcessedVideo)
