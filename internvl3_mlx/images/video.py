"""Choose frames of a video and decode them: video files with PyAV, animations with Pillow.

A folder of images is a video, too (``frame_folder``).
"""

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl3_mlx.errors import ImageError, MissingExtraError, UserError
from internvl3_mlx.images.color import to_rgb
from internvl3_mlx.images.fetch import ImageBytes, locate
from internvl3_mlx.images.frame_folder import (
    FRAME_SECONDS,
    find_frame_folder,
    list_frames,
    open_frame,
)
from internvl3_mlx.images.load import LoadedImage, one_line_errors, open_header

MAX_FRAME_PIXELS = 178_000_000  # as many as an image may have
MAX_FRAMES = 512  # 131,072 image tokens, four times the context the models were trained on
UNBOUNDED_S = 100_000.0  # what the published code takes for no bound
HEADER_BYTES = 16
ANIMATION_HEADER = re.compile(rb"GIF8|RIFF....WEBP|\x89PNG", re.DOTALL)

Bound = tuple[float, float]


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """One frame, and its time in seconds from the start of the video."""

    loaded_image: LoadedImage
    seconds: float


def read_frames(
    source: str | Path | bytes,
    num_frames: int,
    *,
    bound: Bound | None = None,
    upright: bool = True,
) -> list[VideoFrame]:
    """Read ``num_frames`` frames spread evenly over a video, or over ``bound`` (seconds).

    source: a video file, an animation, or a folder of frames. A video with fewer frames repeats
    some. Only the groups of pictures that hold a chosen frame
    are decoded, and only chosen frames are kept, at full size. Raises ImageError.
    """
    return [*iter_frames(source, num_frames, bound=bound, upright=upright)]


def iter_frames(
    source: str | Path | bytes,
    num_frames: int,
    *,
    bound: Bound | None = None,
    upright: bool = True,
) -> Iterator[VideoFrame]:
    """Yield the frames of ``read_frames`` in order, each as soon as it is decoded."""
    if not 1 <= num_frames <= MAX_FRAMES:
        raise UserError(f"cannot take {num_frames} frames of a video; choose 1 to {MAX_FRAMES}")

    def choose(count: int, fps: float) -> list[int]:
        return frame_indices(num_frames, fps, count - 1, bound=bound)

    folder = find_frame_folder(source)
    if folder is not None:
        yield from iter_folder(folder, choose, upright)
        return
    located = locate(source)
    with located.open() as file:
        head = file.read(HEADER_BYTES)
    if not head:
        raise ImageError(f"cannot read {located.name}: it is empty; download it again")
    if ANIMATION_HEADER.match(head):
        yield from iter_animation(located, choose)
    else:
        yield from iter_container(located, choose, upright)


def check_video(source: str | Path) -> None:
    """Raise ImageError for a video that does not exist; its content is not looked at."""
    folder = find_frame_folder(source)
    if folder is None:
        locate(source)
    else:
        list_frames(folder)


def frame_indices(
    num_frames: int, fps: float, last_frame: int, *, bound: Bound | None = None, first: int = 0
) -> list[int]:
    """Choose the middles of ``num_frames`` equal parts, rounded as by the published ``get_index``.

    bound: (start, end) in seconds. Halves are rounded to even, then the sum is truncated.
    """
    start, end = bound or (-UNBOUNDED_S, UNBOUNDED_S)
    low, high = max(first, round(start * fps)), min(round(end * fps), last_frame)
    if high < low:
        raise UserError(
            f"no frames between {start:g} and {end:g} seconds: the video ends at "
            f"{last_frame / fps:.1f}; choose a start before its end"
        )
    part = (high - low) / num_frames
    return [int(low + part / 2 + np.round(part * k)) for k in range(num_frames)]


@dataclass(frozen=True)
class ChosenFrames:
    """The chosen frame numbers of a video, in order, and the time in seconds of every frame."""

    name: str
    indices: list[int]
    seconds: list[float]

    def in_order(self, decoded: Iterable[tuple[int, Image.Image]]) -> Iterator[VideoFrame]:
        """Yield each chosen frame once it and all before it are decoded.

        One that could not be decoded is replaced by the one before it. That shows at the end only,
        so the frames after it wait. Only what may still be asked for is kept.
        """
        images, waiting = dict[int, Image.Image](), deque(self.indices)
        for number, image in decoded:
            images[number] = image
            while waiting and waiting[0] in images:
                index = waiting.popleft()
                images = {kept: images[kept] for kept in images if kept >= index}
                yield self.frame(index, images[index])
        if not images:
            raise ImageError(f"cannot read {self.name}: no frame can be decoded; export it again")
        numbers = sorted(images)
        for index in waiting:
            number = numbers[max(0, bisect_right(numbers, index) - 1)]
            yield self.frame(number, images[number])

    def frame(self, number: int, image: Image.Image) -> VideoFrame:
        seconds = self.seconds[number]
        return VideoFrame(LoadedImage(image, f"{self.name} at {seconds:.1f} s"), seconds)


def iter_folder(folder: Path, choose: "ChooseFrames", upright: bool) -> Iterator[VideoFrame]:
    """Open the chosen images of a folder, each once."""
    paths = list_frames(folder)
    for number, repeated in groupby(choose(len(paths), 1 / FRAME_SECONDS)):
        opened = open_frame(paths[number], upright=upright)
        for _ in repeated:
            yield VideoFrame(opened, number * FRAME_SECONDS)


# FFmpeg's other readers are disabled: playlists and scripts make it open further files and URLs.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
# These store no timestamps: those FFmpeg makes up are wrong when frames are reordered.
FORMATS_WITHOUT_TIMESTAMPS = ("avi",)
ROTATIONS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


# (number of frames, frames per second) -> the chosen frame numbers
ChooseFrames = Callable[[int, float], list[int]]


def iter_container(
    located: ImageBytes, choose: ChooseFrames, upright: bool
) -> Iterator[VideoFrame]:
    """Read a video file with PyAV: once for the times of its packets, once for the frames."""
    with _open_video(located) as (container, stream):
        index = _index(container, stream)
    if not index.seconds:
        raise ImageError(f"cannot read {located.name}: the video has no frames; export it again")
    chosen = ChosenFrames(located.name, choose(len(index.seconds), index.fps), index.seconds)
    yield from chosen.in_order(_decode_chosen(located, index, {*chosen.indices}, upright))


def _decode_chosen(
    located: ImageBytes, index: "_PacketIndex", wanted: set[int], upright: bool
) -> Iterator[tuple[int, Image.Image]]:
    """Yield the wanted frames and their numbers, and stop after the last of them."""
    missing = set(wanted)
    with _open_video(located) as (container, stream):
        for counted, frame in enumerate(
            _decode(container, stream, index.packets_to_decode(wanted))
        ):
            number = index.rank.get(frame.pts, -1) if index.rank else counted
            if number in wanted:
                missing.discard(number)
                yield number, _upright(frame) if upright else frame.to_image()
            if not missing:
                break


@dataclass(frozen=True)
class _PacketIndex:
    """The packets of a video in file order, and the times of its frames.

    ``times`` and ``keys`` (key frames, where decoding can start) are by packet. ``rank`` maps a
    time to the number of its frame; without trustworthy times it is empty and frames are counted.
    """

    times: list[int | None]
    keys: list[bool]
    rank: dict[int, int]
    seconds: list[float]
    fps: float

    def packets_to_decode(self, wanted: set[int]) -> list[bool]:
        """Mark the packets to decode: for each wanted frame, from the last key frame up to it."""
        if not self.rank:
            return [True] * len(self.times)
        place = {pts: number for number, pts in enumerate(self.times)}
        starts = sorted(
            p for p, key in zip(self.times, self.keys, strict=True) if key and p is not None
        )
        feed = [False] * len(self.times)
        for pts in (pts for pts, number in self.rank.items() if number in wanted):
            before = bisect_right(starts, pts)
            start, end = place[starts[before - 1]] if before else 0, place[pts] + 1
            feed[start:end] = [True] * (end - start)
        return feed


def _index(container: Any, stream: Any) -> _PacketIndex:
    """Read the times of all packets, without decoding any."""
    packets = [
        (packet.pts, packet.is_keyframe, packet.is_discard)
        for packet in container.demux(stream)
        if packet.size
    ]
    shown = [pts for pts, _, discard in packets if not discard]
    fps = float(stream.average_rate or stream.guessed_rate or 1)
    rank: dict[int, int] = {}
    seconds = [number / fps for number in range(len(shown))]
    if (
        container.format.name not in FORMATS_WITHOUT_TIMESTAMPS
        and None not in shown
        and len({*shown}) == len(shown)
    ):
        order = sorted(shown)
        rank = {pts: number for number, pts in enumerate(order)}
        seconds = [float((pts - order[0]) * stream.time_base) for pts in order]
    times, keys = [pts for pts, *_ in packets], [key for _, key, _ in packets]
    return _PacketIndex(times, keys, rank, seconds, fps)


@contextmanager
def _open_video(located: ImageBytes) -> Iterator[tuple[Any, Any]]:
    """Open the first video stream that is not a cover; make FFmpeg's errors one line."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError(f"cannot read {located.name}: video", "av", "video") from error
    try:
        with (
            located.open() as file,
            av.open(
                file, options={"format_whitelist": CONTAINERS}, metadata_errors="replace"
            ) as container,
        ):
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                raise ImageError(
                    f"cannot read {located.name}: it has no video stream; choose another file"
                )
            if streams[0].codec_context is None:
                raise ImageError(
                    f"cannot read {located.name}: there is no decoder for its video; "
                    "export it as H.264 in MP4"
                )
            if streams[0].width * streams[0].height > MAX_FRAME_PIXELS:
                raise ImageError(
                    f"cannot read {located.name}: its frames have {streams[0].width}x"
                    f"{streams[0].height} pixels; export it smaller"
                )
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except (av.error.FFmpegError, *DAMAGE) as error:
        raise _unreadable_error(located) from error


def _unreadable_error(located: ImageBytes) -> ImageError:
    """Make the error for a file that is not a video, an image perhaps."""
    try:
        with located.open() as file, one_line_errors(located.name), Image.open(file):
            return still_image_error(located.name)
    except ImageError:
        return ImageError(
            f"cannot read {located.name}: it is damaged or its video format is unknown; "
            "export it as MP4, MOV, MKV, WebM, AVI or GIF"
        )


def _decode(container: Any, stream: Any, feed: list[bool]) -> Iterator[Any]:
    """Decode the marked packets; at a gap, drain the decoder and reset it."""
    import av

    codec = stream.codec_context
    packets = (packet for packet in container.demux(stream) if packet.size)
    for marked, follows, packet in zip(feed, [*feed[1:], False], packets, strict=False):
        if not marked:
            continue
        try:
            yield from codec.decode(packet)
            if not follows:
                yield from codec.decode(None)
                codec.flush_buffers()
        except av.error.InvalidDataError:
            continue  # a damaged packet costs its frame, not the video


def _upright(frame: Any) -> Image.Image:
    """Apply the rotation that the camera recorded, in degrees counterclockwise."""
    turn = ROTATIONS.get(round(frame.rotation) % 360)
    image = frame.to_image()
    return image if turn is None else image.transpose(turn)


# what a damaged video raises besides FFmpeg's own errors
DAMAGE = (OSError, UnicodeError, ValueError, ArithmeticError, EOFError, MemoryError, AttributeError)
MAX_ANIMATION_PIXELS = 10**10  # all frames are decoded: a minute or so
DEFAULT_FRAME_MS = 100  # what browsers use for a frame without a duration


def iter_animation(located: ImageBytes, choose: ChooseFrames) -> Iterator[VideoFrame]:
    """Read an animation with Pillow: once for the times, once for the frames."""
    with located.open() as file:
        with one_line_errors(located.name):
            image = open_header(file, located.name, ["GIF", "WEBP", "PNG"])
            seconds = _animation_times(image, located.name)
            count = len(seconds) - 1
            chosen = ChosenFrames(located.name, choose(count, count / seconds[-1]), seconds)
        yield from chosen.in_order(_seek_frames(image, located.name, chosen.indices))


def _animation_times(image: Image.Image, name: str) -> list[float]:
    """Return the time of every frame of an animation, and of its end."""
    count = getattr(image, "n_frames", 1)
    if count == 1:
        raise still_image_error(name)
    if count * image.width * image.height > MAX_ANIMATION_PIXELS:
        raise ImageError(
            f"cannot read {name}: {count:,} frames of {image.width}x{image.height} "
            "pixels are too many for an animation; export it as MP4"
        )
    lengths = []
    for number in range(count):
        image.seek(number)
        image.load()
        lengths.append((image.info.get("duration") or DEFAULT_FRAME_MS) / 1000)
    return [0.0, *accumulate(lengths)]


def _seek_frames(
    image: Image.Image, name: str, indices: list[int]
) -> Iterator[tuple[int, Image.Image]]:
    """Yield the chosen frames of an open animation and their numbers, each once."""
    for number in sorted({*indices}):
        with one_line_errors(name):
            image.seek(number)
            frame = to_rgb(image.copy())
        yield number, frame


def still_image_error(name: str) -> ImageError:
    """Make the error for an image given as a video."""
    return ImageError(
        f"cannot read {name} as a video: it is a still image; ask about it as an image"
    )
