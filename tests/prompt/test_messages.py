import pytest

from internvl3_mlx.errors import PromptError
from internvl3_mlx.prompt.messages import (
    GeneratedAnswer,
    ImageSegment,
    Message,
    MessageMedia,
    TextSegment,
    media_order,
    message_segments,
)


def laid_out(text: str, *media: MessageMedia) -> list[str | int]:
    """One turn as strings and tile counts, neighbouring texts joined."""
    parts: list[str | int] = []
    for segment in message_segments(Message("user", text, media)):
        if isinstance(segment, ImageSegment):
            parts.append(segment.tiles)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += segment.text
        else:
            parts.append(segment.text)
    return parts


def test_one_image_stands_alone_on_the_first_line():
    assert laid_out("What?", MessageMedia((7,))) == [7, "\nWhat?"]


def test_several_images_are_numbered():
    assert laid_out("What?", MessageMedia((7,)), MessageMedia((3,))) == [
        "Image-1: ",
        7,
        "\nImage-2: ",
        3,
        "\nWhat?",
    ]


def test_marks_place_the_images_when_there_are_as_many():
    assert laid_out("Is <image> like\n<image>?", MessageMedia((7,)), MessageMedia((3,))) == [
        "Is ",
        7,
        " like\n",
        3,
        "?",
    ]


@pytest.mark.parametrize("question", ["<image>\nWhat?", "<image>What?"])
def test_a_mark_already_in_place_is_not_doubled(question):
    assert laid_out(question, MessageMedia((5,))) == [5, question.removeprefix("<image>")]


def test_marks_that_do_not_fit_stay_text():
    assert laid_out("<image> <image>", MessageMedia((7,))) == [7, "\n<image> <image>"]
    assert laid_out("<image>") == ["<image>"]
    assert laid_out("<video>", MessageMedia((7,))) == [7, "\n<video>"]


def test_several_entries_of_one_image_share_a_run():
    assert laid_out("q", MessageMedia((7, 3))) == [10, "\nq"]


def test_video_frames_are_numbered_lines():
    video = MessageMedia((1, 1, 1), "video")
    assert laid_out("q", video) == ["Frame1: ", 1, "\nFrame2: ", 1, "\nFrame3: ", 1, "\nq"]


def test_video_frames_name_their_times_when_asked():
    video = MessageMedia((1, 1), "video", times=(0.5, 12.25))
    assert laid_out("q", video) == ["Frame1 (0.5s): ", 1, "\nFrame2 (12.2s): ", 1, "\nq"]


@pytest.mark.parametrize(
    ("question", "rest"), [("<video>\nq", "\nq"), ("<video>q", "\nq"), ("<video>", None)]
)
def test_a_video_mark_becomes_the_frame_lines(question, rest):
    expected = ["See: Frame1: ", 1, "\nFrame2: ", 1, *([rest] if rest else [])]
    assert laid_out(f"See: {question}", MessageMedia((1, 1), "video")) == expected


def test_images_go_before_frames_whatever_the_order_given():
    video, image = MessageMedia((1, 1), "video"), MessageMedia((4,))
    assert laid_out("q", video, image) == [4, "\nFrame1: ", 1, "\nFrame2: ", 1, "\nq"]


def test_each_video_counts_its_frames_from_one():
    one, two = MessageMedia((1,), "video"), MessageMedia((1, 1), "video")
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
    segments = message_segments(
        Message("user", "a <image>", (MessageMedia((1,)), MessageMedia((2,))))
    )
    assert segments == [
        TextSegment("Image-1: "),
        ImageSegment(1),
        TextSegment("\nImage-2: "),
        ImageSegment(2),
        TextSegment("\n"),
        TextSegment("a <image>", untrusted=True),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Message("system", "x"), "role 'system'; use 'user' or 'assistant'"),
        (
            lambda: Message("assistant", "x", (MessageMedia((1,)),)),
            "images in an assistant message",
        ),
        (lambda: MessageMedia(()), "image with tiles .*: every image and frame needs at least one"),
        (lambda: MessageMedia((1, 0), "video"), "video with tiles .1, 0."),
        (lambda: MessageMedia((1, 1), "video", (0.5,)), "1 frame times for video with 2 entries"),
        (lambda: MessageMedia((2,), times=(0.5,)), "give a video one time per frame"),
    ],
)
def test_impossible_turns_are_refused(make, message):
    with pytest.raises(PromptError, match=message):
        make()


def test_an_answer_with_its_ids_is_repeated_to_the_token():
    assert message_segments(Message("assistant", "whatever", token_ids=(5, 3))) == [
        GeneratedAnswer((5, 3))
    ]
    with pytest.raises(PromptError, match="token ids in a user's message"):
        Message("user", "hi", token_ids=(5,))


FILM = MessageMedia((1, 1), kind="video")


@pytest.mark.parametrize(
    ("text", "media", "order"),
    [
        ("no marks", (FILM, MessageMedia((3,)), MessageMedia((2,))), [1, 2, 0]),
        ("<video> then <image>", (MessageMedia((3,)), FILM), [1, 0]),
        ("<image> then <video>", (FILM, MessageMedia((3,))), [1, 0]),
        ("<video> alone", (MessageMedia((3,)), FILM), [0, 1]),
        ("<image> is one mark for two", (MessageMedia((3,)), MessageMedia((2,))), [0, 1]),
        ("nothing shown <image>", (), []),
    ],
)
def test_media_are_counted_in_the_order_in_which_the_prompt_shows_them(text, media, order):
    assert media_order(Message("user", text, media)) == order
    tiles = [n for n in laid_out(text, *media) if isinstance(n, int)]
    assert tiles == [n for index in order for n in media[index].tiles]


def placed(texts: tuple[str, ...], *media: MessageMedia) -> list[str | int]:
    """A message whose media stand between ``texts``, as ``laid_out`` gives it."""
    parts: list[str | int] = []
    for segment in message_segments(Message("user", "".join(texts), media, texts=texts)):
        if isinstance(segment, ImageSegment):
            parts.append(segment.tiles)
        elif parts and isinstance(parts[-1], str):
            parts[-1] += segment.text
        else:
            parts.append(segment.text)
    return parts


IMAGES = (MessageMedia((7,)), MessageMedia((3,)))


def test_media_in_front_are_laid_out_as_without_places():
    assert placed(("", "What?"), IMAGES[0]) == laid_out("What?", IMAGES[0])
    assert placed(("", "", "What?"), *IMAGES) == laid_out("What?", *IMAGES)
    video = MessageMedia((1, 1), kind="video")
    assert placed(("", "What?"), video) == laid_out("What?", video)


def test_media_between_texts_stand_on_lines_of_their_own():
    assert placed(("See", ""), IMAGES[0]) == ["See\n", 7]
    assert placed(("See\n", "\nWhat?"), IMAGES[0]) == ["See\n", 7, "\nWhat?"]
    assert placed(("First", "then", "?"), *IMAGES) == [
        "First\nImage-1: ",
        7,
        "\nthen\nImage-2: ",
        3,
        "\n?",
    ]


def test_placeholders_in_a_text_around_media_stay_text():
    assert placed(("<image>?", "<image>"), IMAGES[0]) == ["<image>?\n", 7, "\n<image>"]
    message = Message("user", "<image> b <image>", IMAGES, texts=("<image>", " b ", "<image>"))
    assert media_order(message) == [0, 1]


def test_the_texts_around_media_are_one_more():
    with pytest.raises(PromptError, match="2 texts around 2 images"):
        Message("user", "ab", IMAGES, texts=("a", "b"))
