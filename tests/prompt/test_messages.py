import pytest

from internvl3_mlx.errors import PromptError
from internvl3_mlx.prompt.messages import ImageRun, Media, Spoken, Text, Turn, content, shown_order


def laid_out(text: str, *media: Media) -> list[str | int]:
    """One turn as strings and tile counts, neighbouring texts joined."""
    parts: list[str | int] = []
    for segment in content(Turn("user", text, media)):
        if isinstance(segment, ImageRun):
            parts.append(segment.tiles)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += segment.text
        else:
            parts.append(segment.text)
    return parts


def test_one_image_stands_alone_on_the_first_line():
    assert laid_out("What?", Media((7,))) == [7, "\nWhat?"]


def test_several_images_are_numbered():
    assert laid_out("What?", Media((7,)), Media((3,))) == [
        "Image-1: ",
        7,
        "\nImage-2: ",
        3,
        "\nWhat?",
    ]


def test_marks_place_the_images_when_there_are_as_many():
    assert laid_out("Is <image> like\n<image>?", Media((7,)), Media((3,))) == [
        "Is ",
        7,
        " like\n",
        3,
        "?",
    ]


@pytest.mark.parametrize("question", ["<image>\nWhat?", "<image>What?"])
def test_a_mark_already_in_place_is_not_doubled(question):
    assert laid_out(question, Media((5,))) == [5, question.removeprefix("<image>")]


def test_marks_that_do_not_fit_stay_text():
    assert laid_out("<image> <image>", Media((7,))) == [7, "\n<image> <image>"]
    assert laid_out("<image>") == ["<image>"]
    assert laid_out("<video>", Media((7,))) == [7, "\n<video>"]


def test_several_entries_of_one_image_share_a_run():
    assert laid_out("q", Media((7, 3))) == [10, "\nq"]


def test_video_frames_are_numbered_lines():
    video = Media((1, 1, 1), "video")
    assert laid_out("q", video) == ["Frame1: ", 1, "\nFrame2: ", 1, "\nFrame3: ", 1, "\nq"]


def test_video_frames_name_their_times_when_asked():
    video = Media((1, 1), "video", times=(0.5, 12.25))
    assert laid_out("q", video) == ["Frame1 (0.5s): ", 1, "\nFrame2 (12.2s): ", 1, "\nq"]


@pytest.mark.parametrize(
    ("question", "rest"), [("<video>\nq", "\nq"), ("<video>q", "\nq"), ("<video>", None)]
)
def test_a_video_mark_becomes_the_frame_lines(question, rest):
    expected = ["See: Frame1: ", 1, "\nFrame2: ", 1, *([rest] if rest else [])]
    assert laid_out(f"See: {question}", Media((1, 1), "video")) == expected


def test_images_go_before_frames_whatever_the_order_given():
    video, image = Media((1, 1), "video"), Media((4,))
    assert laid_out("q", video, image) == [4, "\nFrame1: ", 1, "\nFrame2: ", 1, "\nq"]


def test_each_video_counts_its_frames_from_one():
    one, two = Media((1,), "video"), Media((1, 1), "video")
    assert laid_out("q", one, two) == [
        "Frame1: ",
        1,
        "\nFrame1: ",
        1,
        "\nFrame2: ",
        1,
        "\nq",
    ]


def test_only_what_the_user_wrote_is_typed():
    segments = content(Turn("user", "a <image>", (Media((1,)), Media((2,)))))
    assert segments == [
        Text("Image-1: "),
        ImageRun(1),
        Text("\nImage-2: "),
        ImageRun(2),
        Text("\n"),
        Text("a <image>", typed=True),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Turn("system", "x"), "role 'system': use 'user' or 'assistant'"),
        (lambda: Turn("assistant", "x", (Media((1,)),)), "pictures in an assistant turn"),
        (lambda: Media(()), "image with tiles .*: every picture and frame has at least one"),
        (lambda: Media((1, 0), "video"), "video with tiles .1, 0."),
        (lambda: Media((1, 1), "video", (0.5,)), "1 frame times for video with 2 entries"),
        (lambda: Media((2,), times=(0.5,)), "give a video one time per frame"),
    ],
)
def test_impossible_turns_are_refused(make, message):
    with pytest.raises(PromptError, match=message):
        make()


def test_an_answer_with_its_ids_is_repeated_to_the_token():
    assert content(Turn("assistant", "whatever", token_ids=(5, 3))) == [Spoken((5, 3))]
    with pytest.raises(PromptError, match="token ids in a user's turn"):
        Turn("user", "hi", token_ids=(5,))


FILM = Media((1, 1), kind="video")


@pytest.mark.parametrize(
    ("text", "media", "order"),
    [
        ("no marks", (FILM, Media((3,)), Media((2,))), [1, 2, 0]),
        ("<video> then <image>", (Media((3,)), FILM), [1, 0]),
        ("<image> then <video>", (FILM, Media((3,))), [1, 0]),
        ("<video> alone", (Media((3,)), FILM), [0, 1]),
        ("<image> is one mark for two", (Media((3,)), Media((2,))), [0, 1]),
        ("nothing shown <image>", (), []),
    ],
)
def test_media_are_counted_in_the_order_in_which_the_prompt_shows_them(text, media, order):
    assert shown_order(Turn("user", text, media)) == order
    tiles = [n for n in laid_out(text, *media) if isinstance(n, int)]
    assert tiles == [n for index in order for n in media[index].tiles]
