"""A make_video must give exactly the frames asked for, upright, however little of it is decoded."""

import weakref

import pytest
from fixtures.videos import RATE, make_video, numbers, turned
from PIL import Image

from internvl3_mlx.images import video as reader
from internvl3_mlx.images.video import ChosenFrames, frame_indices, iter_frames, read_frames


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
    frames = read_frames(make_video(kind, codec), 5)
    wanted = frame_indices(5, RATE, 39)
    assert numbers(frames) == wanted
    assert [frame.seconds for frame in frames] == pytest.approx([n / RATE for n in wanted])
    assert frames[0].loaded_image.image.mode == "RGB"
    assert frames[0].loaded_image.image.size == (64, 48)
    assert frames[1].loaded_image.name == "image bytes at 1.1 s"


@pytest.mark.parametrize(
    "options", [{}, {"x264-params": "open-gop=1:b-pyramid=normal"}, {"g": "99"}]
)
def test_skipping_groups_changes_no_pixel(monkeypatch, options):
    data = make_video(count=50, **options)
    for bound in (None, (0.7, 0.8), (2.3, 4.0)):
        for count in (1, 2, 7, 60):
            quick = read_frames(data, count, bound=bound)
            with monkeypatch.context() as patch:
                patch.setattr(
                    reader._PacketIndex,
                    "packets_to_decode",
                    lambda self, wanted: [True] * len(self.times),
                )
                slow = read_frames(data, count, bound=bound)
            assert numbers(quick) == numbers(slow)
            for one, other in zip(quick, slow, strict=True):
                assert one.loaded_image.image.tobytes() == other.loaded_image.image.tobytes()


def test_only_groups_with_a_chosen_frame_are_decoded(monkeypatch):
    fed = []
    real = reader._PacketIndex.packets_to_decode
    monkeypatch.setattr(
        reader._PacketIndex, "packets_to_decode", lambda *given: fed.append(real(*given)) or fed[-1]
    )
    read_frames(make_video(count=40), 1, bound=(1.8, 1.9))
    assert 1 <= sum(fed[0]) <= 8


def test_a_short_video_gives_frames_twice():
    frames = read_frames(make_video(count=3), 8)
    assert numbers(frames) == frame_indices(8, RATE, 2)
    assert frames[0].loaded_image.image is frames[1].loaded_image.image


def test_a_path_and_an_address_open(tmp_path):
    path = tmp_path / "my clip.mp4"
    path.write_bytes(make_video(count=4))
    for source in (path, str(path), path.as_uri()):
        assert read_frames(source, 1)[0].loaded_image.name == f"{path} at 0.1 s"


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
    data = turned(make_video(count=4), matrix)
    image = read_frames(data, 1)[0].loaded_image.image
    assert image.size == size
    assert min(image.getpixel(corner)) > 220
    assert read_frames(data, 1, upright=False)[0].loaded_image.image.size == (64, 48)


def test_only_chosen_frames_become_pictures(monkeypatch):
    turned_up = []
    real = reader._upright
    monkeypatch.setattr(reader, "_upright", lambda frame: turned_up.append(1) or real(frame))
    read_frames(make_video(count=40), 3)
    assert len(turned_up) == 3


def test_a_frame_comes_as_soon_as_it_is_decoded(monkeypatch):
    made, real = [], reader._upright
    monkeypatch.setattr(reader, "_upright", lambda frame: made.append(1) or real(frame))
    frames = iter_frames(make_video(count=40), 5)
    for count in range(1, 6):
        next(frames)
        assert len(made) == count


@pytest.mark.parametrize(
    ("decoded", "expected"),
    [
        ([1, 3, 5, 7], [1, 3, 5, 5, 7]),
        ([3, 1, 7, 5], [1, 3, 5, 5, 7]),  # in another order than they are shown
        ([1, 5, 7], [1, 1, 5, 5, 7]),
        ([5, 7], [5, 5, 5, 5, 7]),
        ([1], [1, 1, 1, 1, 1]),
    ],
)
def test_a_frame_that_cannot_be_decoded_is_replaced_by_the_one_before_it(decoded, expected):
    chosen = ChosenFrames("clip", [1, 3, 5, 5, 7], [n / 10 for n in range(9)])
    images = {number: Image.new("L", (1, 1), number) for number in decoded}
    frames = [*chosen.in_order(images.items())]
    assert [frame.loaded_image.image.getpixel((0, 0)) for frame in frames] == expected
    assert [frame.seconds for frame in frames] == [n / 10 for n in expected]


def test_a_frame_is_not_kept_longer_than_it_may_be_needed():
    made = []

    def decode():
        for number in range(20):
            image = Image.new("L", (1, 1))
            made.append(weakref.ref(image))
            yield number, image
            del image
            assert sum(one() is not None for one in made) <= 2  # the last one, and this one

    chosen = ChosenFrames("clip", [*range(20)], [n / 10 for n in range(20)])
    assert sum(1 for _ in chosen.in_order(decode())) == 20


def test_a_damaged_middle_costs_its_frames_only():
    data = bytearray(make_video("mpegts"))
    middle = len(data) // 2
    data[middle : middle + 376] = bytes(376)
    assert len(read_frames(bytes(data), 8)) == 8


def test_metadata_in_another_encoding_does_not_matter():
    data = make_video("matroska", "libx264")
    at = data.index(b"Lavf")  # the name of the program that wrote the file
    latin = data[:at] + b"\xe9\xfc\xff\x80" + data[at + 4 :]
    assert numbers(read_frames(latin, 3)) == numbers(read_frames(data, 3))
