"""Markup of other tools: converted where that is sure, refused by name elsewhere."""

import pytest
from fixtures.records import chat_record, open_records, write_image, write_jsonl

from internvl3_mlx.records.json_values import RecordError
from internvl3_mlx.training.data.grounding import PIXELS_NOTE
from internvl3_mlx.training.data.schema import parse_record
from internvl3_mlx.training.data.validate import validation_report


def grounded(objects, question="Find <ref-object>", answer="<bbox>", **rest):
    return chat_record(question, answer, images=["a.png", "b.png"], objects=objects, **rest)


def texts(tmp_path, record):
    write_image(tmp_path / "a.png", 400, 200)
    write_image(tmp_path / "b.png", 50, 1000)
    dataset, preprocessor = open_records(write_jsonl(tmp_path / "r.jsonl", [record]))
    report = validation_report(dataset, preprocessor)
    assert report.errors == ()
    return [message.text for message in preprocessor.parse(dataset[0]).messages], report.notes


def test_boxes_in_pixels_become_thousandths_of_their_image(tmp_path):
    objects = {"ref": ["dog"], "bbox": [[10.5, 20, 200, 199.9]]}
    found, notes = texts(tmp_path, grounded(objects))
    assert found == ["Find <ref>dog</ref>", "<box>[[26, 100, 500, 1000]]</box>"]
    assert notes == (f"1 record: {PIXELS_NOTE}",)


def test_a_box_belongs_to_the_image_that_is_named(tmp_path):
    objects = {"ref": [], "bbox": [[1, 1, 2, 2], [5, 100, 25, 900]], "image_id": [0, 1]}
    record = grounded(objects, "Where?", "<bbox> and <bbox>")
    answer = texts(tmp_path, record)[0][1]
    assert answer == "<box>[[2, 5, 5, 10]]</box> and <box>[[100, 100, 500, 900]]</box>"


def test_shares_of_the_image_are_scaled(tmp_path):
    objects = {"ref": ["a"], "bbox": [[0, 0.25, 0.5, 1]], "bbox_type": "norm1"}
    assert texts(tmp_path, grounded(objects))[0][1] == "<box>[[0, 250, 500, 1000]]</box>"


def test_objects_may_be_text_as_in_columns_of_a_table(tmp_path):
    found, _ = texts(tmp_path, grounded('{"ref": ["a"], "bbox": [[0, 0, 400, 200]]}'))
    assert found[1] == "<box>[[0, 0, 1000, 1000]]</box>"


def test_a_box_outside_its_image_is_an_error(tmp_path):
    write_image(tmp_path / "a.png", 400, 200)
    write_image(tmp_path / "b.png", 90, 90)
    path = write_jsonl(tmp_path / "r.jsonl", [grounded({"ref": ["a"], "bbox": [[0, 0, 500, 100]]})])
    [error] = validation_report(*open_records(path)).errors
    assert "outside its image, read as pixels of 400 x 200; correct it" in error.message


MARKS = (
    *("<image1>", "<image_2>", "<image:0>", "<|image_1|>", "<|image_pad|>", "<|vision_start|>"),
    *("<ImageHere>", "<Image>", "<IMAGE>", "<image/>", "<image />", "</image>", "<image id=1>"),
    *(
        "<img>",
        "<img src='a.png'>",
        "<IMG_CONTEXT>",
        "<__media__>",
        "[IMG]",
        "<audio>",
        "<im_patch>",
    ),
)
ERRORS = {
    "the text has <ref-object>, but the record has no 'objects'": grounded(None),
    "1 <bbox> placeholder but 2 in 'objects.bbox'": grounded(
        {"ref": ["a"], "bbox": [[0, 0, 1, 1], [0, 0, 2, 2]]}
    ),
    "no <ref-object> placeholders but 1 in 'objects.ref'": grounded(
        {"ref": ["a"], "bbox": [[0, 0, 1, 1]]}, "Find it"
    ),
    "'bbox_type' is 'norm1000'; expected real": grounded({"bbox_type": "norm1000", "ref": ["a"]}),
    "'objects.bbox' contains [1, 2]; expected [x1, y1, x2, y2]": grounded(
        {"ref": ["a"], "bbox": [[1, 2]]}
    ),
    "a box belongs to image 2, but the record has 2 images": grounded(
        {"ref": ["a"], "bbox": [[0, 0, 1, 1]], "image_id": [2]}
    ),
    "has the box [[1207.4, 56.2, 1900, 980]]; expected whole numbers from 0 to 1000": chat_record(
        "Where?", "<ref>dog</ref><box>[[1207.4, 56.2, 1900, 980]]</box>", image="a.png"
    ),
    "has the box [[0.1, 0.2, 0.3, 0.4]]; expected whole numbers": chat_record(
        "Where?", "<box>[[0.1, 0.2, 0.3, 0.4]]</box>", image="a.png"
    ),
    "has <box>[[1, 2, 3]]</box>; expected [[x1, y1, x2, y2]]": chat_record(
        "Where?", "<box>[[1, 2, 3]]</box>", image="a.png"
    ),
    "has <|box_start|>, a box format of another tool": chat_record(
        "Where?", "<|box_start|>(1,2),(3,4)<|box_end|>", image="a.png"
    ),
    "an answer has <image>; only questions show images": chat_record("Who?", "<image>", image="a"),
    "an answer has <image1>, a placeholder of another tool": chat_record(
        "Who?", "<image1>", image="a"
    ),
    "has <BOX>, a box format of another tool": chat_record(
        "Where?", "<BOX>[[1, 2, 3, 4]]</BOX>", image="a.png"
    ),
    "has <loc_12>, a box format of another tool": chat_record("Where?", "<loc_12>", image="a.png"),
    "an answer has a <box> without its </box>": chat_record(
        "Where?", "<box>[[1, 2, 3, 4]]", image="a.png"
    ),
    "an answer has the box [300, 400, 50, 60], whose second corner": chat_record(
        "Where?", "<box>[[1, 2, 3, 4], [300, 400, 50, 60]]</box>", image="a.png"
    ),
    "'objects.bbox' contains the box [100, 100, 50, 120], whose second corner": grounded(
        {"ref": ["a"], "bbox": [[100, 100, 50, 120]]}
    ),
    "'objects.bbox' has numbers from 0 to 1, but is read as pixels": grounded(
        {"ref": ["a"], "bbox": [[0.1, 0.25, 0.5, 1]]}
    ),
    "'objects.bbox' contains [nan, 0, 1, 1]": grounded(
        {"ref": ["a"], "bbox": [[float("nan"), 0, 1, 1]]}
    ),
    "'objects.ref' is text; expected a list": grounded({"ref": "a", "bbox": [[0, 0, 1, 1]]}),
    **{
        f"has {mark}, a placeholder of another tool; write <image>": chat_record(
            f"see {mark} here", images=["a.png", "b.png"]
        )
        for mark in MARKS
    },
}


@pytest.mark.parametrize("expected", ERRORS)
def test_markup_that_would_be_learned_as_letters_is_refused(expected):
    with pytest.raises(RecordError) as caught:
        parse_record(ERRORS[expected])
    assert expected in str(caught.value)


def test_boxes_in_thousandths_and_text_without_images_are_left_alone():
    good = chat_record("Where?", "<box>[[0, 20, 30, 1000], [1, 2, 3, 4]]</box>", image="a.png")
    assert parse_record(good).messages[1].text.startswith("<box>[[0, 20")
    letters = parse_record(chat_record("What does <image1> mean?"))
    assert letters.messages[0].num_images == 0
    assert letters.notes == (
        "a placeholder such as <image1>, but no images; it is read as letters",
    )


def test_html_is_an_answer_about_an_image(tmp_path):
    page = '<p><img src="cat.png"></p>'
    found, notes = texts(tmp_path, chat_record("Write it as HTML.", page, image="a.png"))
    assert (found[1], notes) == (page, ())


def test_marks_of_the_chat_template_are_noted(tmp_path):
    found, notes = texts(tmp_path, chat_record("Who?", "Me.<|im_end|>", image="a.png"))
    assert found[1] == "Me.<|im_end|>"
    [note] = notes
    assert note.startswith("1 record: <|im_end|> in a message; it is read as letters")
