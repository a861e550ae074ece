"""Rendered sets: the same seed gives the same images, and the answers are true."""

import json

import numpy as np
import pytest
from PIL import Image

from internvl3_mlx.errors import DataError, UserError, WriteError
from internvl3_mlx.evaluation.synthetic import numbers
from internvl3_mlx.evaluation.synthetic.canvas import COLORS
from internvl3_mlx.evaluation.synthetic.charts import clear_maximum, clear_minimum, round_up
from internvl3_mlx.evaluation.synthetic.fonts import PILLOW, find_fonts
from internvl3_mlx.evaluation.synthetic.numbers import OWN_SERIES, Series, load_series
from internvl3_mlx.evaluation.synthetic.save import save_items
from internvl3_mlx.evaluation.synthetic.sets import SETS, SyntheticItems, check_sets


def rendered(name, count=6, seed=0):
    source = SyntheticItems((name,), count, seed, only_pillow=True)
    return [source[entry.number] for entry in source.entries]


def pixels(item):
    return [np.asarray(image) for image in item.images]


@pytest.mark.parametrize("name", SETS)
def test_a_set_follows_from_its_seed(name):
    first, again, other = rendered(name, 3), rendered(name, 3), rendered(name, 3, seed=1)
    for one, two in zip(first, again, strict=True):
        assert (one.question, one.answers) == (two.question, two.answers)
        assert all(map(np.array_equal, pixels(one), pixels(two)))
    assert [item.answers for item in first] != [item.answers for item in other] or not all(
        map(np.array_equal, pixels(first[0]), pixels(other[0]))
    )


@pytest.mark.parametrize("name", SETS)
def test_an_item_does_not_depend_on_how_many_there_are(name):
    few, many = rendered(name, 2), rendered(name, 4)
    assert all(map(np.array_equal, pixels(few[1]), pixels(many[1])))
    assert few[1].answers == many[1].answers


def colored(image, name):
    """How many pixels have exactly a color of the palette."""
    return (np.asarray(image) == np.array(COLORS[name])).all(axis=-1).sum()


def test_the_color_of_a_corner_is_there():
    items = [item for item in rendered("position", 12) if item.question.startswith("What color")]
    assert items
    for item in items:
        (image,) = item.images
        width, height = image.size
        right, below = "right" in item.question, "bottom" in item.question
        corner = image.crop(
            (width // 2 * right, height // 2 * below,
             width // 2 * (1 + right), height // 2 * (1 + below))
        )  # fmt: skip
        counts = {name: colored(corner, name) for name in COLORS}
        assert max(counts, key=counts.get) == item.answers[0]


def test_two_images_differ_in_one_corner_alone():
    for item in rendered("difference", 4):
        first, second = pixels(item)
        rows, columns = np.nonzero((first != second).any(axis=-1))
        height, width = first.shape[:2]
        assert np.ptp((rows >= height // 2).astype(int)) == 0
        assert np.ptp((columns >= width // 2).astype(int)) == 0


def test_charts_ask_only_for_what_stands_out():
    flat = Series("x", ("a", "b", "c"), (10.0, 10.2, 3.0))
    assert (clear_maximum(flat), clear_minimum(flat)) == (None, "c")
    assert [round_up(value) for value in (1.0, 171, 26.1, 0.4, 512)] == [1, 200, 30, 1, 600]


def test_numbers_come_from_vega_datasets_where_it_is(tmp_path, monkeypatch):
    load_series.cache_clear()
    monkeypatch.setattr(numbers, "vega_folder", lambda: None)
    assert load_series() == (numbers.OWN, OWN_SERIES)
    (tmp_path / "seattle-weather.csv").write_text(
        "date,precipitation,temp_max,temp_min,wind,weather\n"
        + "".join(f"2012/{m:02}/0{d},{m},{m + d},0,1,sun\n" for m in range(1, 13) for d in (1, 3))
    )
    rows = [{"yield": 10.0 * n, "variety": "v", "year": 1931 + n, "site": "s"} for n in (0, 1)]
    (tmp_path / "barley.json").write_text(json.dumps(rows))
    cars = [{"Year": f"197{n}-01-01", "Horsepower": 100 + n, "Origin": origin}
            for origin in ("USA", "Europe", "Japan") for n in range(9)]  # fmt: skip
    (tmp_path / "cars.json").write_text(json.dumps(cars))
    (tmp_path / "iowa-electricity.csv").write_text(
        "year,source,net_generation\n2001-01-01,Wind,5\n2002-01-01,Wind,7\n"
    )
    load_series.cache_clear()
    monkeypatch.setattr(numbers, "vega_folder", lambda: tmp_path)
    name, series = load_series()
    load_series.cache_clear()
    assert name == numbers.VEGA
    by_title = {one.title: one for one in series}
    # the mean of month + 1 and month + 3
    assert by_title["Mean high in °C, Seattle 2012"].values == tuple(m + 2.0 for m in range(1, 13))
    assert by_title["Electricity in Iowa, Wind"].labels == ("2001", "2002")
    assert len(by_title["Mean horsepower, USA"].labels) == 8


def test_pillows_font_is_always_there():
    assert [font.name for font in find_fonts(True)] == [PILLOW]
    assert find_fonts()[0].name == PILLOW
    assert find_fonts()[0].at(30).getbbox("x")[3] > 10


def test_a_run_on_other_fonts_is_not_the_same(monkeypatch):
    source = SyntheticItems(("words",), 2, 0, only_pillow=True)
    data = json.loads(json.dumps(source.description))
    again = SyntheticItems.from_description(data)
    assert again[1].answers == source[1].answers
    assert "pillow" in data["fonts"]
    with pytest.raises(DataError, match="fonts or the numbers of this machine have changed"):
        SyntheticItems.from_description({**data, "digest": "0"})


def test_sets_are_checked_by_name():
    assert check_sets(()) == tuple(SETS)
    assert check_sets(("words", "words")) == ("words",)
    with pytest.raises(UserError, match="unknown set 'wrods'; did you mean words"):
        check_sets(("wrods",))


def test_saved_sets_can_be_read_again(tmp_path):
    from internvl3_mlx.evaluation.item_files import Layout, open_items

    source = SyntheticItems(("difference", "counting"), 2, 0, only_pillow=True)
    save_items(source, tmp_path / "rendered")
    read = open_items(str(tmp_path / "rendered"), Layout())
    assert [entry.id for entry in read.entries] == [entry.id for entry in source.entries]
    for number in range(4):
        assert read[number].answers == source[number].answers
        files = [np.asarray(Image.open(path)) for path in read[number].images]
        assert all(map(np.array_equal, files, pixels(source[number])))
    with pytest.raises(WriteError, match="is not empty"):
        save_items(source, tmp_path / "rendered")
