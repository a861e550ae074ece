import pytest

from internvl3_mlx.generation.answer import locate_boxes
from internvl3_mlx.generation.processor import ImageInfo
from internvl3_mlx.prompt.boxes import TextBox, parse_boxes, read_boxes

A, B = (1, 20, 300, 1000), (0, 0, 5, 7)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<ref>the cat</ref><box>[[1, 20, 300, 1000]]</box>", [("the cat", A)]),
        (
            "<ref> a cat </ref> <box>[[1,20,300,1000],[0, 0, 5, 7]]</box>",
            [("a cat", A), ("a cat", B)],
        ),
        ("A cat [[1, 20, 300, 1000]] and a dog [[0, 0, 5, 7]].", [(None, A), (None, B)]),
        ("<ref>猫</ref><box>[1, 20, 300, 1000]</box>", [("猫", A)]),
        ("<ref></ref><box>[[0,0,5,7]]</box>", [(None, B)]),
        ("<box>[[0,0,5,7]]</box>", [(None, B)]),
        ("<ref>x</ref> is here: <box>[[0,0,5,7]]</box>", [(None, B)]),
        ("<ref>x</ref>[[0,0,5,7]]", [("x", B)]),
        ("<box>(1,20),(300,1000)</box>", [(None, A)]),
        ("<ref>x</ref><box>(1,20),(300,1000)</box><box>(0,0),(5,7)</box>", [("x", A), ("x", B)]),
        (
            "<|object_ref_start|>x<|object_ref_end|><|box_start|>(1,20),(300,1000)<|box_end|>"
            " <|box_start|>(0,0),(5,7)<|box_end|>",
            [("x", A), ("x", B)],
        ),
        ("<|box_start|>(0, 0), (5, 7)<|box_end|>", [(None, B)]),
        ("<ref>x</ref><box>[[0,0,5,7]]</box> and <box>[1, 20, 300, 1000]", [("x", B), (None, A)]),
    ],
)
def test_boxes_are_found_with_their_labels(text, found):
    assert parse_boxes(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "[[0, 0, 5]]",
        "[[0, 0, 5, 7, 9]]",
        "[[0, 0, 5, 1001]]",
        "[[-1, 0, 5, 7]]",
        "(1,20) (300,1000)",
        "(1, 20)",
        "(9, 0), (5, 7)",
        "(0, 0, 5, 7)",
        '{"x1": 0, "y1": 0, "x2": 5}',
        '{"x1": 0, "y1": 0, "x2": 5, "y2": "7"}',
        '{"x1": 9, "y1": 0, "x2": 5, "y2": 7}',
        "(1,2)" * 20_000,
        "<ref>" * 20_000,
        "<ref>x</ref><box>" * 5_000,
        "[[9, 0, 5, 7]]",
        "[[0, 9, 5, 7]]",
        "<ref>x</ref><box>[[0, 0, 5, 7",
        "<ref>x</ref><box></box>",
        '{"bbox_2d": [1, 2, 3]}',
        '{"bbox_2d": [1, 2, 3, 4000]}',
        '{"bbox": [5, 2, 3, 4]}',
        '{"bbox": [NaN, 2, 3, 4]}',
        '{"bbox": [true, 2, 3, 4]}',
        '{"bbox": null}',
        "[" * 20_000,
        '[{"a": ' * 20_000,
        f"[[0, 0, 5, {'1' * 5000}]]",
    ],
)
def test_what_is_no_box_is_passed_over(text):
    assert parse_boxes(text) == []


def test_a_faulty_box_does_not_hide_its_neighbours():
    assert parse_boxes("<ref>x</ref><box>[[9, 0, 5, 7], [0, 0, 5, 7]]</box>") == [("x", B)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            '[{"bbox_2d": [1, 20, 300, 1000], "label": "truck"}, '
            '{"bbox_2d": [0, 0, 5, 7], "label": "car"}]',
            [("truck", A), ("car", B)],
        ),
        ('```json\n[{"label": "a", "bbox": [0, 0, 5, 7]}]\n```', [("a", B)]),
        ('{"objects": [{"box": [0, 0, 5.0, 7], "name": "a"}]}', [("a", B)]),
        ('{"label": "a", "boxes": [[1, 20, 300, 1000], [0, 0, 5, 7]]}', [("a", A), ("a", B)]),
        ('{"bbox_2d": [0, 0, 5, 7], "more": {"color": "red"}, "label": "a"}', [("a", B)]),
        ('{"truck": [0, 0, 5, 7], "car": [[1, 20, 300, 1000]]}', [("truck", B), ("car", A)]),
        ('{"x1": 0, "y1": 0, "x2": 5, "y2": 7}', [(None, B)]),
        ('[{"label": "a", "x1": 0, "y1": 0.0, "x2": 5, "y2": 7}]', [("a", B)]),
        ('{"label": "a", "bbox": {"x1": 0, "y1": 0, "x2": 5, "y2": 7}}', [("a", B)]),
        ('{"bbox": {"xmin": 0, "ymin": 0, "xmax": 5, "ymax": 7}}', [(None, B)]),
        ('{"cat": {"left": 0, "top": 0, "right": 5, "bottom": 7}}', [("cat", B)]),
        ('[{"name": "a", "boxes": [{"x1": 0, "y1": 0, "x2": 5, "y2": 7}]}]', [("a", B)]),
        ('{"bbox_2d": [0, 0, 5, 7]}', [(None, B)]),
        ('[{"bbox": [0, 0, 5, 7], "label": "a"}, {"bbox": [1, 2', [("a", B)]),
    ],
)
def test_boxes_are_found_in_json(text, found):
    assert parse_boxes(text) == found
    assert {box.form for box in read_boxes(text)} == {"json"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<ref>x</ref>[0, 0, 5, 7]", TextBox("x", B, "tags", "thousandths")),
        ("<box>[0, 0, 5, 7]", TextBox(None, B, "tags", "thousandths")),
        ("It is at [0, 0, 5, 7].", TextBox(None, B, "list", "thousandths")),
        ("at (0,0),(5,7).", TextBox(None, B, "pairs", "thousandths")),
        ("(0.25, 0), (0.5, 1)", TextBox(None, (250, 0, 500, 1000), "pairs", "fractions")),
        ("<box>(0,0),(5,7)</box>", TextBox(None, B, "tags", "thousandths")),
        ("[[0.0, 0, 5.000, 7.]]", TextBox(None, B, "list", "thousandths")),
        ("[[0.5, 0, 5, 7]]", TextBox(None, (0.5, 0, 5, 7), "list", "thousandths")),
        ("<box>[0.25, 0, 0.5, 1]</box>", TextBox(None, (250, 0, 500, 1000), "tags", "fractions")),
        ('{"bbox": [0.25, 0, 0.5, 1]}', TextBox(None, (250, 0, 500, 1000), "json", "fractions")),
    ],
)
def test_the_form_and_the_unit_of_a_box_are_reported(text, found):
    assert read_boxes(text) == [found]


def test_boxes_of_several_forms_come_in_the_order_of_the_text():
    text = '[0, 0, 5, 7] {"bbox": [0, 0, 5, 7], "label": "a"} <ref>b</ref><box>[[0,0,5,7]]</box>'
    assert [(box.label, box.form) for box in read_boxes(text)] == [
        (None, "list"),
        ("a", "json"),
        ("b", "tags"),
    ]


def test_whole_numbers_stay_whole():
    [(_, corners)] = parse_boxes("<box>[[1.0, 20, 300.0, 1000]]</box>")
    assert all(isinstance(number, int) for number in corners)


def test_boxes_in_json_are_in_pixels_of_the_image():
    images = (ImageInfo("a.png", 640, 250, 1, 4),)
    [box] = locate_boxes('{"bbox_2d": [100, 200, 500, 1000], "label": "a"}', images)
    assert (box.x1, box.y1, box.x2, box.y2) == (64, 50, 320, 250)
    assert (box.form, box.unit, box.label) == ("json", "thousandths", "a")
