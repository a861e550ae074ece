"""The frames of a video must be the ones the models were shown, upright, and each at its time."""

import io
import random
import struct
import sys

import av
import numpy as np
import pytest
from fixtures.pictures import encoded, noise
from PIL import Image

from internvl3_mlx.errors import ImageError, MissingExtraError, UserError
from internvl3_mlx.images import film as reader
from internvl3_mlx.images.video import frame_indices, read_frames

RATE = 10


def shade(number, width=64, height=48):
    """Draw a frame that says its number in grey, with a bright top left corner and a moving bar."""
    pixels = np.full((height, width, 3), 20 + 4 * number, dtype=np.uint8)
    pixels[:12, :12] = 255
    pixels[-12:, (7 * number) % (width - 8) :][:, :8] = 0
    return pixels


def film(kind="mp4", codec="libx264", count=40, **options):
    """Write a small film: groups of 8 frames, B frames between them."""
    target = io.BytesIO()
    with av.open(target, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"g": "8", "bf": "2", "qmin": "1", "qmax": "2", **options}
        for number in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade(number), format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def sound():
    """Write a file that holds a tone and no picture."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return target.getvalue()


def numbers(frames):
    """Read the numbers off the frames of ``shade``."""
    return [round((np.asarray(f.picture.image)[24, 32].mean() - 20) / 4) for f in frames]


def animation(kind, count=6, duration=100, **options):
    shades = [Image.fromarray(shade(k)) for k in range(count)]
    return encoded(
        shades[0], kind, save_all=True, append_images=shades[1:], duration=duration, **options
    )


def turned(data, matrix):
    """Write the turn of a camera into the track header of an MP4."""
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other fields
    return data[:at] + struct.pack(">9i", *matrix) + data[at + 36 :]


def slow_indices(count, fps, last, bound):
    """Follow the published choice step by step, in numpy's own scalars."""
    start, end = bound or (-100000, 100000)
    low, high = max(0, round(start * fps)), min(round(end * fps), last)
    part = float(high - low) / count
    return [int(low + (part / 2) + np.round(part * k)) for k in np.arange(count)]


# --- the choice ---


@pytest.mark.parametrize(
    ("count", "fps", "last", "bound", "wanted"),
    [
        (8, 30.0, 79, None, [4, 14, 24, 34, 44, 53, 63, 73]),
        (4, 25.0, 99, None, [12, 37, 62, 86]),
        (4, 10.0, 10, None, [1, 3, 6, 9]),  # 2.5 and 7.5 are rounded to even
        (3, 10.0, 0, None, [0, 0, 0]),
        (5, 24.0, 2, None, [0, 0, 1, 1, 2]),
        (2, 10.0, 99, (2.0, 4.0), [25, 35]),
        (2, 10.0, 29, (1.04, 900.0), [14, 24]),
        (1, 29.97, 100, None, [50]),
    ],
)
def test_indices_computed_by_hand(count, fps, last, bound, wanted):
    assert frame_indices(count, fps, last, bound=bound) == wanted


def test_indices_agree_with_the_slow_rule_and_stay_inside():
    rng = random.Random(5)
    for _ in range(2000):
        count, last = rng.randint(1, 64), rng.randint(0, 400)
        fps = rng.choice((1.0, 23.976, 25.0, 29.97, 60.0))
        start = rng.uniform(0, last / fps)
        bound = rng.choice((None, (start, start + rng.uniform(0.1, 30))))
        found = frame_indices(count, fps, last, bound=bound)
        assert found == slow_indices(count, fps, last, bound)
        assert found == sorted(found)
        assert 0 <= found[0] <= found[-1] <= last
        assert all(type(index) is int for index in found)


def test_the_first_frame_can_be_moved():
    assert frame_indices(2, 10.0, 19, first=10) == [12, 16]


def test_a_bound_outside_the_video_is_told():
    with pytest.raises(
        UserError, match=r"no frames between 5 and 9 seconds: the video ends at 3\.9"
    ):
        read_frames(film(), 4, bound=(5, 9))


# --- films ---


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("mp4", "libx264"),
        ("matroska", "libx264"),
        ("mpegts", "libx264"),
        ("avi", "mpeg4"),
        ("avi", "libx264"),
    ],
)
def test_frames_are_the_chosen_ones_at_their_times(kind, codec):
    frames = read_frames(film(kind, codec), 5)
    wanted = frame_indices(5, RATE, 39)
    assert numbers(frames) == wanted
    assert [frame.seconds for frame in frames] == pytest.approx([n / RATE for n in wanted])
    assert frames[0].picture.image.mode == "RGB"
    assert frames[0].picture.image.size == (64, 48)
    assert frames[1].picture.name == "image bytes at 1.1 s"


@pytest.mark.parametrize(
    "options", [{}, {"x264-params": "open-gop=1:b-pyramid=normal"}, {"g": "99"}]
)
def test_skipping_groups_changes_no_pixel(monkeypatch, options):
    data = film(count=50, **options)
    for bound in (None, (0.7, 0.8), (2.3, 4.0)):
        for count in (1, 2, 7, 60):
            quick = read_frames(data, count, bound=bound)
            with monkeypatch.context() as patch:
                patch.setattr(reader._Index, "feed", lambda self, wanted: [True] * len(self.times))
                slow = read_frames(data, count, bound=bound)
            assert numbers(quick) == numbers(slow)
            for one, other in zip(quick, slow, strict=True):
                assert one.picture.image.tobytes() == other.picture.image.tobytes()


def test_only_groups_with_a_chosen_frame_are_decoded(monkeypatch):
    fed = []
    real = reader._Index.feed
    monkeypatch.setattr(reader._Index, "feed", lambda *given: fed.append(real(*given)) or fed[-1])
    read_frames(film(count=40), 1, bound=(1.8, 1.9))
    assert 1 <= sum(fed[0]) <= 8


def test_a_short_video_gives_frames_twice():
    frames = read_frames(film(count=3), 8)
    assert numbers(frames) == frame_indices(8, RATE, 2)
    assert frames[0].picture.image is frames[1].picture.image


def test_a_path_and_an_address_open(tmp_path):
    path = tmp_path / "my clip.mp4"
    path.write_bytes(film(count=4))
    for source in (path, str(path), path.as_uri()):
        assert read_frames(source, 1)[0].picture.name == f"{path} at 0.1 s"


ONE = 1 << 16  # 1.0 in the fixed point of the track header
CLOCKWISE = (0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30)
ANTICLOCKWISE = (0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30)
HALF = (-ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize(
    ("matrix", "size", "corner"),
    [
        (CLOCKWISE, (48, 64), (43, 4)),
        (ANTICLOCKWISE, (48, 64), (4, 59)),
        (HALF, (64, 48), (59, 43)),
    ],
)
def test_a_turned_camera_gives_upright_frames(matrix, size, corner):
    data = turned(film(count=4), matrix)
    image = read_frames(data, 1)[0].picture.image
    assert image.size == size
    assert min(image.getpixel(corner)) > 220
    assert read_frames(data, 1, upright=False)[0].picture.image.size == (64, 48)


def test_only_chosen_frames_become_pictures(monkeypatch):
    turned_up = []
    real = reader._upright
    monkeypatch.setattr(reader, "_upright", lambda frame: turned_up.append(1) or real(frame))
    read_frames(film(count=40), 3)
    assert len(turned_up) == 3


# --- animations ---


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})]
)
def test_animations_are_videos(kind, options, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    frames = read_frames(animation(kind, duration=[100, 300, 100, 100, 200, 200], **options), 3)
    assert numbers(frames) == [0, 2, 3]
    assert [frame.seconds for frame in frames] == pytest.approx([0.0, 0.4, 0.5])
    bounded = read_frames(animation(kind, duration=500, **options), 2, bound=(1.0, 2.0))
    assert numbers(bounded) == [2, 3]


def test_an_animation_without_durations_runs_at_ten_frames_a_second():
    assert read_frames(animation("GIF", duration=0), 1)[0].seconds == pytest.approx(0.2)


# --- what is no video ---


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is not a video we know, or damaged; wanted MP4, MOV"),
        (b"hello, I am a text\n" * 50, "it is not a video we know"),
        (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/hosts\n",
            "it is not a video we know",
        ),
        (encoded(noise(), "JPEG"), "it is a single picture; ask about it as an image"),
        (encoded(noise(), "PNG"), "it is a single picture; ask about it as an image"),
        (encoded(noise(), "GIF"), "it is a single picture"),
        (encoded(noise(), "WEBP")[:60], "the file is"),
        (film()[:400], "it is not a video we know, or damaged"),
        (film("avi", "mpeg4", count=0), "(the video has no frames|not a video we know)"),
        (sound(), "it has no video stream"),
    ],
)
def test_what_is_no_video_is_told(data, words):
    with pytest.raises(ImageError, match=f"cannot read image bytes.*{words}") as caught:
        read_frames(data, 2)
    assert "\n" not in str(caught.value)


def test_a_text_file_is_not_drawn_as_a_terminal(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n" * 40)
    with pytest.raises(ImageError, match="it is not a video we know"):
        read_frames(tmp_path / "a.txt", 2)


def test_a_damaged_middle_costs_its_frames_only():
    data = bytearray(film("mpegts"))
    middle = len(data) // 2
    data[middle : middle + 376] = bytes(376)
    assert len(read_frames(bytes(data), 8)) == 8


def test_without_pyav_the_extra_is_named(monkeypatch):
    data = film(count=2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError) as caught:
        read_frames(data, 2)
    assert str(caught.value) == (
        'cannot read image bytes: video needs PyAV: pip install "internvl3-mlx[video]"'
    )


@pytest.mark.parametrize("count", [0, -1, 513])
def test_impossible_counts_are_refused(count):
    with pytest.raises(UserError, match=f"cannot take {count} frames of a video: wanted 1 to 512"):
        read_frames(b"", count)
