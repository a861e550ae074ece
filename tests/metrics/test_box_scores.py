import pytest

from internvl3_mlx.metrics.box_scores import NO_BOX, first_box, first_point, in_box, iou


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("<ref>dog</ref><box>[[100, 200, 500, 700]]</box>", (0.1, 0.2, 0.5, 0.7)),
        ("[0.1, 0.2, 0.5, 0.7]", (0.1, 0.2, 0.5, 0.7)),
        ("[[1, 1, 1, 1]]", (0.001, 0.001, 0.001, 0.001)),  # a sum of 4 means thousandths
        ("[1,2,3] and [0, 0, 1, 1] and [9, 9, 9, 9]", (0, 0, 1, 1)),
        ("no box", NO_BOX),
    ],
)
def test_the_first_box_counts(text, box):
    assert first_box(text) == pytest.approx(box)


@pytest.mark.parametrize(
    ("a", "b", "share"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1),
        ((0, 0, 2, 3), (1, 0, 3, 3), 3 / 9),
        ((0, 0, 4, 2), (1, 1, 3, 5), 2 / 14),
        ((0, 0, 1, 1), (2, 2, 3, 3), 0),
        (NO_BOX, NO_BOX, 0),
        ((3, 3, 1, 1), (0, 0, 4, 4), 0),  # corners swapped: no area
    ],
)
def test_iou(a, b, share):
    assert iou(a, b) == iou(b, a) == pytest.approx(share)


def test_a_point_is_a_boxs_center_or_two_numbers():
    assert first_point("[[100, 200, 300, 600]]") == pytest.approx((0.2, 0.4))
    assert first_point("click (512, 40)") == pytest.approx((0.512, 0.04))
    assert first_point("(0.25, 0.5)") == (0.25, 0.5)
    assert first_point("nowhere") is None


def test_edges_belong_to_a_box():
    assert in_box((1, 2), (1, 2, 3, 4))
    assert in_box((3, 4), (1, 2, 3, 4))
    assert not in_box((3.01, 4), (1, 2, 3, 4))
