"""Two evaluations side by side: the difference, what changed, and the page to read."""

import json
import re
from html.parser import HTMLParser

import pytest
from fixtures.eval_data import own_file, png, write_jsonl

from internvl3_mlx.errors import DataError, UserError, WriteError
from internvl3_mlx.evaluation.compare import compare_runs
from internvl3_mlx.evaluation.predictions import RESULTS, SCORES, SETTINGS, RunFolder
from internvl3_mlx.evaluation.reopen import reopen_items
from internvl3_mlx.evaluation.report import render, write_report
from internvl3_mlx.files import content_digest

HOW = {"metric": "exact", "prompt": "{question}", "circular": False}
NASTY = '<script>alert(1)</script> & "quoted"'


def row(number, score, **changes):
    return {
        "id": f"q{number}", "question": "Which?", "options": {}, "answers": ["red"],
        "category": "a" if number % 2 else "b", "prediction": f"said {number}",
        "extracted": f"said {number}", "judged": False, "score": score, "tiles": 1 + number,
        "completion_tokens": 3, "finish_reason": "stop", "error": None, **changes,
    }  # fmt: skip


def run(folder, scores, *, data=None, **settings):
    """Write the files of a run by hand."""
    folder.mkdir()
    description = {"path": "x.jsonl", "digest": "d", "split": None}
    if data is not None:
        description = {"path": str(data), "digest": content_digest(data), "split": None}
    base = {"task": "own", "title": "x.jsonl", "model": "demo", "weights": "float32", "how": HOW,
            "data": description}  # fmt: skip
    target = RunFolder(folder)
    target.write_json(SETTINGS, {**base, **settings})
    target.write_json(RESULTS, {"title": "x.jsonl", "model": "demo", "score": 50.0})
    rows = [row(n, s) if not isinstance(s, dict) else s for n, s in enumerate(scores)]
    target.write_lines(SCORES, rows)
    return folder


def test_differences_are_paired_and_counted(tmp_path):
    a = run(tmp_path / "a", [1, 1, 1, 0, 0, 1])
    b = run(tmp_path / "b", [1, 0, 0, 0, 1, 1], weights="4 bits")
    found = compare_runs(a, b)
    assert (found.difference.n, found.difference.better, found.difference.worse) == (6, 1, 2)
    assert (found.a, found.b) == pytest.approx((100 * 4 / 6, 50))
    assert found.difference.mean == pytest.approx(-1 / 6)
    assert [item.id for item in found.changed] == ["q1", "q2", "q4"]
    assert found.differing_settings == {"weights": ("float32", "4 bits")}
    assert found.different_text == 0


def test_buckets_follow_tiles_categories_and_length(tmp_path):
    long = row(3, 1, answers=["one two three four"])
    a = run(tmp_path / "a", [1, 1, 1, long])
    b = run(tmp_path / "b", [1, 0, 1, {**long, "score": 0}])
    buckets = compare_runs(a, b).buckets
    assert {name: part.n for name, part in buckets["tiles"].items()} == {
        "1 tile": 1, "2 – 4 tiles": 3,
    }  # fmt: skip
    assert buckets["tiles"]["2 – 4 tiles"].worse == 2
    assert buckets["category"]["a"].worse == 2
    assert [*buckets["answer length"]] == ["1 word", "4 – 9 words"]


def test_only_common_items_are_compared(tmp_path):
    a = run(tmp_path / "a", [1, 1, 0])
    b = run(tmp_path / "b", [1, 1, 0, 0, 1])
    found = compare_runs(a, b)
    assert (found.difference.n, found.only_a, found.only_b) == (3, 0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chartqa"}, "different tasks, own and chartqa"),
        ({"how": {**HOW, "metric": "anls"}}, "different metrics, exact and anls"),
    ],
)
def test_runs_of_other_things_are_refused(tmp_path, changes, message):
    a = run(tmp_path / "a", [1])
    b = run(tmp_path / "b", [1], **changes)
    with pytest.raises(UserError, match=message):
        compare_runs(a, b)


def test_data_with_another_digest_are_refused(tmp_path):
    data = write_jsonl(tmp_path / "x.jsonl", [{}])
    with pytest.raises(UserError, match="digests differ"):
        compare_runs(run(tmp_path / "a", [1]), run(tmp_path / "b", [1], data=data))


def test_folders_without_a_run_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no evaluation: there is no settings.json"):
        compare_runs(tmp_path / "empty", tmp_path / "empty")
    with pytest.raises(DataError, match=r"no folder .*nowhere; name one that"):
        compare_runs(tmp_path / "nowhere", tmp_path / "empty")
    unfinished = run(tmp_path / "a", [1])
    (unfinished / RESULTS).unlink()
    with pytest.raises(DataError, match="run the evaluation to its end"):
        compare_runs(unfinished, unfinished)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (SETTINGS, "{", r"settings.json is damaged; evaluate again with --overwrite"),
        (SETTINGS, "{}", r"settings.json has no 'task'"),
        (RESULTS, "[]", r"results.json is damaged"),
        (SCORES, "x\n", r"scores.jsonl is damaged"),
    ],
)
def test_damaged_files_of_a_run_are_named(tmp_path, name, content, message):
    folder = run(tmp_path / "a", [1])
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        compare_runs(folder, folder)


class Page(HTMLParser):
    """Collects the tags of a page and what it refers to."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def nasty(tmp_path):
    """Two runs over a real file, with answers that try to be markup."""
    data = own_file(tmp_path)
    first = [row(n, 1, prediction=NASTY, extracted=NASTY) for n in range(7)]
    second = [row(n, float(n < 4), prediction=NASTY, question=NASTY) for n in range(7)]
    pair = (run(tmp_path / "a", first, data=data), run(tmp_path / "b", second, data=data))
    return compare_runs(*pair)


def test_the_page_is_escaped_and_stands_alone(nasty, tmp_path):
    write_report(tmp_path / "page.html", nasty, reopen_items(nasty.settings[0]))
    text = (tmp_path / "page.html").read_text("utf-8")
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert page.tags.count("article") == 3
    assert page.tags.count("img") == 3
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert "default-src 'none'" in text
    assert page.text.count(NASTY) >= 6
    assert not re.search(r"https?://", text)


def test_a_page_without_the_data_has_no_images(nasty):
    text = "".join(render(nasty, None))
    assert "<img" not in text
    assert "3 items changed" in text


def test_an_image_that_is_gone_is_named(nasty, tmp_path):
    (tmp_path / "5.png").unlink()
    text = "".join(render(nasty, reopen_items(nasty.settings[0])))
    assert text.count("<img") == 2
    assert "5.png" in text


def test_a_page_replaces_only_its_own_kind(nasty, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<!doctype html><p>my homepage")
    with pytest.raises(WriteError, match="is not a report of eval compare"):
        write_report(path, nasty, None)
    path.unlink()
    write_report(path, nasty, None)
    write_report(path, nasty, None)


def test_changed_data_are_not_shown(nasty, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    with pytest.raises(DataError, match="has changed since the evaluation"):
        reopen_items(nasty.settings[0])


def test_json_has_what_changed(nasty):
    content = json.loads(json.dumps(nasty.to_dict()))
    assert content["difference"]["worse"] == 3
    assert [item["id"] for item in content["changed"]] == ["q4", "q5", "q6"]
    assert content["a"]["mean"] == 100


def test_images_in_the_data_are_shown_too(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    from internvl3_mlx.evaluation.report import picture

    assert picture(png()).startswith('<img alt="" src="data:image/jpeg')
    assert "cannot read" in picture(b"nothing")
