"""Every record format parses to the same thing; every error says how to fix the record."""

import pytest
from fixtures.records import chat_record, pair_record

from internvl3_mlx.training.data.schema import (
    ParsedMessage,
    ParsedRecord,
    RecordError,
    parse_record,
)

USER, GPT = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}
ONE_IMAGE = ParsedRecord(
    (ParsedMessage("user", "<image>\nWhat is it?", 1), ParsedMessage("assistant", "A cat.")),
    ("a.png",),
)


def asked(*content):
    return chat_record(list(content))


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.png", "conversations": [USER, GPT]},
        {"image": ["a.png"], "conversations": [USER, GPT]},
        {"images": "a.png", "conversations": [USER, GPT]},
        {"images": ["a.png"], "image": None, "conversations": [USER, GPT]},
        chat_record("<image>\nWhat is it?", image="a.png"),
        {"id": 7, "width": 3, "images": ["a.png"], **chat_record("<image>\nWhat is it?")},
    ],
)
def test_image_and_images_string_and_list_mean_the_same(record):
    assert parse_record(record) == ONE_IMAGE


def test_role_names_of_both_formats_are_known_and_a_system_message_comes_first():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello"},
        {"from": "gpt", "value": "Hi"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye"},
    ]
    record = parse_record({"conversations": turns})
    assert record.system == "Be brief."
    assert [message.role for message in record.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize(("user", "assistant"), [("User", "ASSISTANT "), ("HUMAN", "AI")])
def test_role_names_may_be_written_in_any_case(user, assistant):
    turns = [{"role": user, "content": "Hello"}, {"role": assistant, "content": "Hi"}]
    roles = [message.role for message in parse_record({"messages": turns}).messages]
    assert roles == ["user", "assistant"]


def test_images_go_to_the_messages_with_their_placeholders():
    turns = [USER, GPT, {"from": "human", "value": "And <image> or <image>?"}, GPT]
    record = parse_record({"image": ["a", "b", "c"], "conversations": turns})
    assert [message.num_images for message in record.messages] == [1, 0, 2, 0]


def test_images_without_placeholders_go_to_the_first_question():
    turns = [{"from": "human", "value": "Which?"}, GPT, {"from": "human", "value": "Why?"}, GPT]
    record = parse_record({"image": ["a", "b"], "conversations": turns})
    assert [message.num_images for message in record.messages] == [2, 0, 0, 0]
    assert record.messages[0].text == "Which?"


def test_videos_are_counted_separately_from_images():
    record = parse_record(
        chat_record("<video>\n<image>\nSame?", video="v.mp4", image="a.png", clip=[1, 2.5])
    )
    assert (record.messages[0].num_images, record.messages[0].num_videos) == (1, 1)
    assert (record.videos, record.clip) == (("v.mp4",), (1.0, 2.5))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "input_image", "image_url": "a.png"},
    ],
)
def test_parts_before_the_text_are_left_to_the_template(part):
    record = parse_record(asked(part, part, text("Same?")))
    assert record.images == ("a.png", "a.png")
    assert record.messages[0] == ParsedMessage("user", "Same?", 2)


def test_parts_between_text_keep_their_positions():
    shown = {"type": "image", "image": "a.png"}
    record = parse_record(asked(text("Here: "), shown, text("and "), shown))
    assert record.messages[0] == ParsedMessage("user", "Here: <image>\nand <image>", 2)


def test_parts_without_a_path_take_it_from_the_list():
    record = parse_record({**asked({"type": "image"}, text("What?")), "images": ["b.png"]})
    assert (record.images, record.messages[0].num_images) == (("b.png",), 1)


def test_a_preference_record_is_a_question_with_two_answers():
    record = parse_record(pair_record("<image>\nWhat?", "Cat", "Dog", image="a.png"))
    assert record == ParsedRecord(
        (ParsedMessage("user", "<image>\nWhat?", 1),), ("a.png",), answers=("Cat", "Dog")
    )


def turns(*roles):
    return {"messages": [{"role": role, "content": "words"} for role in roles]}


ERRORS = {
    "the record is a list; expected a JSON object": [],
    "the record has no keys; expected 'messages'": {},
    "the record has only 'foo', 'bar'; expected 'messages', 'conversations', or 'question' with": {
        "foo": 1,
        "bar": 2,
    },
    "both 'question', 'chosen', 'rejected' and 'messages', 'chosen', 'rejected'; use one": {
        **chat_record(),
        **pair_record(),
    },
    "both 'messages' and 'conversations'": {**chat_record(), "conversations": [USER, GPT]},
    "'messages' is null; expected a list of messages": {"messages": None},
    "'messages' is empty; expected a list of messages": {"messages": []},
    "message 1 is text; expected an object with role": {"messages": ["hello"]},
    "message 1 has role 'tool'; expected system, user, human, assistant, gpt": turns("tool"),
    "message 2 is from the user; expected the assistant": turns("user", "user", "assistant"),
    "message 2 is from the assistant; expected the user": turns("system", "assistant"),
    "message 3 has no 'role' or 'from'": {
        "messages": [*chat_record()["messages"], {"content": "x"}]
    },
    "the last message is not an answer; end with an assistant message": turns("user"),
    "message 2 is an empty answer; fill it in or drop the record": chat_record(answer=" \n"),
    "message 1 is an empty question": chat_record(""),
    "the content of message 1 is null; expected text or a list of parts": chat_record(None),
    "a content part of message 1 has type 'audio'; expected text,": asked({"type": "audio"}),
    "a text part of message 1 has no text": asked({"type": "text"}),
    "a content part of message 1 has a list for its path": asked({"type": "image", "path": [1]}),
    "message 1 has both <image> placeholders and image parts": asked(
        text("<image>"), {"type": "image"}
    ),
    "1 image part but 2 images; give one for each": {
        **asked({"type": "image"}),
        "images": ["a", "b"],
    },
    "only some images have a path in the content parts": {
        **asked({"type": "image", "path": "a"}, {"type": "image"}, text("x")),
    },
    "message 2 (assistant) has an image or video": chat_record(
        answer=[{"type": "image", "path": "a"}, text("x")]
    ),
    "2 <image> placeholders but 1 image; write one placeholder for each, or none": chat_record(
        "<image><image>", image="a"
    ),
    "1 <image> placeholder but no images": chat_record("<image>"),
    "1 <image> placeholder but 3 images": chat_record("<image> a", images=["a", "b", "c"]),
    "1 <video> placeholder but no videos": chat_record("<video>"),
    "both 'image' and 'images'; put all paths into one list": chat_record(image="a", images=["b"]),
    "'image' contains 3; expected file paths": chat_record(image=3),
    "'images' contains an object; expected file paths": chat_record(images=["a", {}]),
    "'clip' is [1]; expected [start, end] in seconds": chat_record(video="v", clip=[1]),
    "'clip' goes from 2 to 1; expected start before end": chat_record(video="v", clip=[2, 1]),
    "'chosen' is missing; expected text": {"question": "x", "rejected": "y"},
    "'question' is empty text; expected text": pair_record(""),
    "'rejected' is a list; expected text; it has several": pair_record(rejected=["x", "y"]),
    "'chosen' and 'rejected' are the same; drop the record": pair_record("q", "a", "a"),
}


@pytest.mark.parametrize("expected", ERRORS)
def test_an_error_says_what_is_wrong_and_what_to_do(expected):
    with pytest.raises(RecordError) as caught:
        parse_record(ERRORS[expected])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
