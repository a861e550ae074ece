"""Every form of a row says the same thing; every fault is told in words that mend it."""

import pytest
from fixtures.records import chat_record, pair_record

from internvl3_mlx.training.data.schema import (
    ParsedMessage,
    ParsedRecord,
    RecordError,
    parse_record,
)

USER, GPT = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}
ONE_PICTURE = ParsedRecord(
    (ParsedMessage("user", "<image>\nWhat is it?", 1), ParsedMessage("assistant", "A cat.")),
    ("a.png",),
)


def asked(*content):
    return chat_record(list(content))


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "conversations": [USER, GPT]},
        {"image": ["a.png"], "conversations": [USER, GPT]},
        {"images": "a.png", "conversations": [USER, GPT]},
        {"images": ["a.png"], "image": None, "conversations": [USER, GPT]},
        chat_record("<image>\nWhat is it?", image="a.png"),
        {"id": 7, "width": 3, "images": ["a.png"], **chat_record("<image>\nWhat is it?")},
    ],
)
def test_image_and_images_string_and_list_mean_the_same(row):
    assert parse_record(row) == ONE_PICTURE


def test_roles_of_both_worlds_are_known_and_a_system_text_stands_first():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello"},
        {"from": "gpt", "value": "Hi"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye"},
    ]
    row = parse_record({"conversations": turns})
    assert row.system == "Be brief."
    assert [said.role for said in row.messages] == ["user", "assistant"] * 2


def test_pictures_go_to_the_turns_that_mark_them():
    turns = [USER, GPT, {"from": "human", "value": "And <image> or <image>?"}, GPT]
    row = parse_record({"image": ["a", "b", "c"], "conversations": turns})
    assert [said.num_images for said in row.messages] == [1, 0, 2, 0]


def test_pictures_without_marks_are_shown_by_the_first_question():
    turns = [{"from": "human", "value": "Which?"}, GPT, {"from": "human", "value": "Why?"}, GPT]
    row = parse_record({"image": ["a", "b"], "conversations": turns})
    assert [said.num_images for said in row.messages] == [2, 0, 0, 0]
    assert row.messages[0].text == "Which?"


def test_videos_count_apart_from_pictures():
    row = parse_record(
        chat_record("<video>\n<image>\nSame?", video="v.mp4", image="a.png", clip=[1, 2.5])
    )
    assert (row.messages[0].num_images, row.messages[0].num_videos) == (1, 1)
    assert (row.videos, row.clip) == (("v.mp4",), (1.0, 2.5))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "input_image", "image_url": "a.png"},
    ],
)
def test_parts_in_front_are_left_to_the_template(part):
    row = parse_record(asked(part, part, text("Same?")))
    assert row.images == ("a.png", "a.png")
    assert row.messages[0] == ParsedMessage("user", "Same?", 2)


def test_parts_between_words_keep_their_places():
    shown = {"type": "image", "image": "a.png"}
    row = parse_record(asked(text("Here: "), shown, text("and "), shown))
    assert row.messages[0] == ParsedMessage("user", "Here: <image>\nand <image>", 2)


def test_bare_parts_take_their_names_from_the_list():
    row = parse_record({**asked({"type": "image"}, text("What?")), "images": ["b.png"]})
    assert (row.images, row.messages[0].num_images) == (("b.png",), 1)


def test_a_preference_row_is_a_question_with_two_answers():
    row = parse_record(pair_record("<image>\nWhat?", "Cat", "Dog", image="a.png"))
    assert row == ParsedRecord(
        (ParsedMessage("user", "<image>\nWhat?", 1),), ("a.png",), answers=("Cat", "Dog")
    )


def turns(*roles):
    return {"messages": [{"role": role, "content": "words"} for role in roles]}


FAULTS = {
    "a list; wanted an object in braces": [],
    "'foo', 'bar'; wanted 'messages', 'conversations', or 'question' with": {"foo": 1, "bar": 2},
    "both 'messages' and 'chosen' with 'rejected'; a row has one form": {
        **chat_record(),
        **pair_record(),
    },
    "both 'messages' and 'conversations'": {**chat_record(), "conversations": [USER, GPT]},
    "'messages' is null; wanted a list of turns": {"messages": None},
    "'messages' is empty; wanted a list of turns": {"messages": []},
    "turn 1 is a text; wanted an object with role": {"messages": ["hello"]},
    "turn 1 has role 'tool'; wanted system, user, human, assistant, gpt": turns("tool"),
    "turn 2 is the user's; wanted the assistant's": turns("user", "user", "assistant"),
    "turn 2 is the assistant's; wanted the user's": turns("system", "assistant"),
    "turn 3 has role None": {"messages": [*chat_record()["messages"], {"content": "x"}]},
    "no answer at the end": turns("user"),
    "turn 2 is an empty answer; write it or remove the row": chat_record(answer=" \n"),
    "turn 1 is an empty question": chat_record(""),
    "the content of turn 1 is null; wanted text or parts": chat_record(None),
    "a part of turn 1 is of type 'audio'; wanted text,": asked({"type": "audio"}),
    "a text part of turn 1 has no text": asked({"type": "text"}),
    "a part of turn 1 names a picture by a list": asked({"type": "image", "path": [1]}),
    "turn 1 has <image> marks and picture parts": asked(text("<image>"), {"type": "image"}),
    "1 image part but 2 images; name one for each": {
        **asked({"type": "image"}),
        "images": ["a", "b"],
    },
    "some images are named in the content parts, some are not": {
        **asked({"type": "image", "path": "a"}, {"type": "image"}, text("x")),
    },
    "turn 2, the assistant's, shows a picture": chat_record(
        answer=[{"type": "image", "path": "a"}, text("x")]
    ),
    "2 <image> marks but 1 image; write one mark for each, or none": chat_record(
        "<image><image>", image="a"
    ),
    "1 <image> mark but no images": chat_record("<image>"),
    "1 <image> mark but 3 images": chat_record("<image> a", images=["a", "b", "c"]),
    "1 <video> mark but no videos": chat_record("<video>"),
    "both 'image' and 'images'; put all of them into one list": chat_record(
        image="a", images=["b"]
    ),
    "'image' holds 3; wanted paths of files": chat_record(image=3),
    "'images' holds an object; wanted paths of files": chat_record(images=["a", {}]),
    "'clip' is [1]; wanted [start, end] in seconds": chat_record(video="v", clip=[1]),
    "'clip' goes from 2 to 1; wanted a start before its end": chat_record(video="v", clip=[2, 1]),
    "'chosen' is missing; wanted a text": {"question": "x", "rejected": "y"},
    "'question' is an empty text; wanted a text": pair_record(""),
    "'rejected' is a list; wanted a text": pair_record(rejected=["x"]),
    "'chosen' and 'rejected' are the same; there is nothing to prefer": pair_record("q", "a", "a"),
}


@pytest.mark.parametrize("told", FAULTS)
def test_a_fault_says_what_is_wrong_and_what_was_wanted(told):
    with pytest.raises(RecordError) as caught:
        parse_record(FAULTS[told])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
