import pytest

from internvl3_mlx.prompt.boxes import parse_boxes

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
    ],
)
def test_boxes_are_found_with_their_labels(text, found):
    assert parse_boxes(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "[0, 0, 5, 7]",
        "[[0, 0, 5]]",
        "[[0, 0, 5, 7, 9]]",
        "[[0, 0, 5, 1001]]",
        "[[-1, 0, 5, 7]]",
        "[[0.5, 0, 5, 7]]",
        "[[9, 0, 5, 7]]",
        "[[0, 9, 5, 7]]",
        "<ref>x</ref><box>[[0, 0, 5, 7",
        "<box>[0, 0, 5, 7]",
        "<ref>x</ref><box></box>",
        f"[[0, 0, 5, {'1' * 5000}]]",
    ],
)
def test_what_is_no_box_is_passed_over(text):
    assert parse_boxes(text) == []


def test_a_faulty_box_does_not_hide_its_neighbours():
    assert parse_boxes("<ref>x</ref><box>[[9, 0, 5, 7], [0, 0, 5, 7]]</box>") == [("x", B)]
