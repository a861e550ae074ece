"""The frames of a video must be the ones the models were shown, each at its time."""

import random
import sys

import numpy as np
import pytest
from fixtures.image_files import encoded, noise
from fixtures.videos import blanked, make_video, numbers, shade, sound
from PIL import Image

from internvl3_mlx.errors import ImageError, MissingExtraError, UserError
from internvl3_mlx.images import video
from internvl3_mlx.images.video import frame_indices, read_frames


def animation(kind, count=6, duration=100, **options):
    shades = [Image.fromarray(shade(k)) for k in range(count)]
    return encoded(
        shades[0], kind, save_all=True, append_images=shades[1:], duration=duration, **options
    )


def slow_indices(count, fps, last, bound):
    """Follow the published choice step by step, in numpy's own scalars."""
    start, end = bound or (-100000, 100000)
    low, high = max(0, round(start * fps)), min(round(end * fps), last)
    part = float(high - low) / count
    return [int(low + (part / 2) + np.round(part * k)) for k in np.arange(count)]


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
        read_frames(make_video(), 4, bound=(5, 9))


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


def test_an_animation_too_long_to_decode_is_refused(monkeypatch):
    frames = [noise(20, 10, seed) for seed in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(video, "MAX_ANIMATION_PIXELS", 599)
    with pytest.raises(ImageError, match="3 frames of 20x10 pixels are too many for an animation"):
        read_frames(data, 2)


def test_a_video_of_huge_frames_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(ImageError, match="its frames have 64x48 pixels; export it smaller"):
        read_frames(make_video(count=3), 2)


def test_an_animation_without_durations_runs_at_ten_frames_a_second():
    assert read_frames(animation("GIF", duration=0), 1)[0].seconds == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty; download it again"),
        (b"hello, I am a text\n" * 50, "its video format is unknown"),
        (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/hosts\n",
            "its video format is unknown",
        ),
        (encoded(noise(), "JPEG"), "it is a still image; ask about it as an image"),
        (encoded(noise(), "PNG"), "it is a still image; ask about it as an image"),
        (encoded(noise(), "GIF"), "it is a still image"),
        (encoded(noise(), "WEBP")[:60], "the file is"),
        (make_video()[:400], "it is damaged or its video format is unknown"),
        (sound(kind="matroska", empty_track=True), "the video has no frames; export it again"),
        (blanked(make_video()), "no frame can be decoded; export it again"),
        (sound(cover=True), "it has no video stream"),
        (sound(), "it has no video stream"),
    ],
)
def test_what_is_no_video_is_told(data, words):
    with pytest.raises(ImageError, match=f"cannot read image bytes.*{words}") as caught:
        read_frames(data, 2)
    assert "\n" not in str(caught.value)


def test_a_text_file_is_not_drawn_as_a_terminal(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n" * 40)
    with pytest.raises(ImageError, match="its video format is unknown"):
        read_frames(tmp_path / "a.txt", 2)


def test_without_pyav_the_extra_is_named(monkeypatch):
    data = make_video(count=2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError) as caught:
        read_frames(data, 2)
    message = str(caught.value)
    assert message.startswith("cannot read image bytes: video needs av; run pip install ")


@pytest.mark.parametrize("count", [0, -1, 513])
def test_impossible_counts_are_refused(count):
    with pytest.raises(UserError, match=f"cannot take {count} frames of a video; choose 1 to 512"):
        read_frames(b"", count)


@pytest.fixture
def frames_folder(tmp_path):
    """Write frames whose names sort otherwise as text, and what macOS and others put beside."""
    folder = tmp_path / "my frames"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(shade(number)).save(folder / f"frame_{number}.png")
    (folder / "._frame_3.png").write_bytes(b"\0\5\x16\7")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.mark.parametrize("kind", [str, None])
def test_a_folder_of_frames_is_a_video(frames_folder, kind):
    frames = read_frames(kind(frames_folder) if kind else frames_folder, 5)
    assert numbers(frames) == frame_indices(5, 1.0, 11)
    assert [frame.seconds for frame in frames] == frame_indices(5, 1.0, 11)
    assert frames[0].loaded_image.name == "my frames/frame_1.png"
    assert numbers(read_frames(frames_folder, 2, bound=(4, 8))) == [5, 7]


def test_a_damaged_frame_and_a_folder_without_frames_are_named(frames_folder, tmp_path):
    (frames_folder / "frame_1.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ImageError, match=r"cannot read .*frame_1\.png"):
        read_frames(frames_folder, 12)
    with pytest.raises(ImageError, match=r"cannot read .* as a video: the folder has no images"):
        read_frames(tmp_path, 3)


@pytest.mark.parametrize("as_bytes", [True, False])
def test_an_empty_video_is_called_empty(tmp_path, as_bytes):
    path = tmp_path / "empty.mp4"
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="it is empty; download it again"):
        read_frames(b"" if as_bytes else path, 3)
