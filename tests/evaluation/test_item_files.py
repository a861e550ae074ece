"""Items are read from every form that benchmarks and users write."""

import json

import pytest
from fixtures.eval_data import base64_png, own_file, png, write_jsonl, write_tsv

from internvl3_mlx.errors import DataError
from internvl3_mlx.evaluation.item_files import Layout, open_items
from internvl3_mlx.evaluation.tasks import TASKS


def items(path, layout=None):
    source = open_items(str(path), layout or Layout())
    return [source[entry.number] for entry in source.entries]


def test_vlmevalkits_tsv_has_images_indices_and_options(tmp_path):
    path = write_tsv(
        tmp_path / "MMBench_DEV_EN.tsv",
        [
            {"index": 3, "image": base64_png(1), "question": "Which?", "hint": "Look.",
             "A": "a cat", "B": "a dog", "C": "", "answer": "B", "category": "animals"},
            {"index": 12, "image": "3", "question": "And?", "hint": "",
             "A": "one", "B": "two", "C": "three", "answer": "C", "category": "numbers"},
        ],
    )  # fmt: skip
    first, second = items(path)
    assert first.id == "3"
    assert first.options == {"A": "a cat", "B": "a dog"}
    assert (first.answers, first.hint, first.category) == (("B",), "Look.", "animals")
    assert first.images == (png(1),)
    assert second.images == (png(1),)  # the picture of row 3
    assert second.options["C"] == "three"


def test_a_list_of_images_and_of_answers_in_a_tsv(tmp_path):
    both = json.dumps([base64_png(1), base64_png(2)])
    path = write_tsv(
        tmp_path / "x.tsv",
        [
            {"index": 1, "image": both, "question": "Q?", "answer": "['a', 'b']"},
            {"index": 2, "image": "1", "question": "Q?", "answer": "[2007, 2008]"},
        ],
    )
    first, second = items(path)
    assert first.images == (png(1), png(2)) == second.images
    assert first.answers == ("a", "b")
    assert second.answers == ("[2007, 2008]",)


def test_lmms_evals_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [
        {"question_id": "v_1", "image_1": {"bytes": png(1), "path": "1.png"},
         "image_2": {"bytes": png(2), "path": "2.png"}, "question": "Is <image 1> like <image 2>?",
         "options": "['yes', 'no']", "answer": "A", "question_type": "multiple-choice"},
        {"question_id": "v_2", "image_1": {"bytes": png(3), "path": "3.png"}, "image_2": None,
         "question": "How many?", "options": "[]", "answer": "12", "question_type": "open"},
    ]  # fmt: skip
    path = tmp_path / "validation-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = items(tmp_path)  # the folder's validation split
    assert first.images == (png(1), png(2))
    assert first.options == {"A": "yes", "B": "no"}
    assert first.answers == ("A",)
    assert (second.options, second.answers, second.kind) == ({}, ("12",), "open")


def test_numbers_of_options_become_letters(tmp_path):
    rows = [{"question": "Q?", "options": ["2", "0", "7"], "answer": 1}]
    (item,) = items(write_jsonl(tmp_path / "a.jsonl", rows), TASKS["ai2d"].layout)
    assert item.answers == ("B",)
    (item,) = items(write_jsonl(tmp_path / "b.jsonl", [{**rows[0], "answer": "7"}]))
    assert item.answers == ("C",)  # an option's text


def test_own_jsonl_names_images_beside_it(tmp_path):
    first, *_ = items(own_file(tmp_path))
    assert first.images == (tmp_path / "0.png",)
    assert (first.id, first.question, first.answers) == ("q0", "Which?", ("red",))


def test_training_records_can_be_evaluated(tmp_path):
    rows = [
        {"image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "dog"},
        ]},
        {"images": ["a.png"], "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is it?\n<image>"},
            {"role": "assistant", "content": "cat"},
        ]},
    ]  # fmt: skip
    first, second = items(write_jsonl(tmp_path / "t.jsonl", rows))
    assert (first.question, first.answers) == ("What is it?", ("dog",))
    assert (second.question, second.answers) == ("What is it?", ("cat",))
    assert first.images == second.images == (tmp_path / "a.png",)


def test_a_folder_of_images_with_a_csv(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "list.csv").write_text("file_name,question,answer\na.png,What?,dog\n")
    (item,) = items(tmp_path)
    assert item.images == (tmp_path / "a.png",)


def test_equal_ids_are_told_apart(tmp_path):
    rows = [{"question_id": "x.png", "question": f"{n}?", "answer": "yes"} for n in range(3)]
    found = items(write_jsonl(tmp_path / "a.jsonl", rows), TASKS["mme"].layout)
    assert [item.id for item in found] == ["x.png", "x.png#2", "x.png#3"]
    assert {item.group for item in found} == {"x.png"}


def test_boxes_become_fractions_of_the_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0, 80, 40))
    rows = [
        {"image": "a.png", "sent": "the dog", "bbox": [8, 10, 40, 30]},
        {"image": "a.png", "answer": "the dog", "bbox": [8, 10, 32, 20], "segmentation": [1]},
        {"image": "a.png", "sent": "the dog", "bbox": [0.1, 0.25, 0.5, 0.75]},
    ]
    found = items(write_jsonl(tmp_path / "r.jsonl", rows), TASKS["refcoco"].layout)
    assert [item.box for item in found] == [(0.1, 0.25, 0.5, 0.75)] * 3
    assert found[1].question == "the dog"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "x"}, "no question among answer; expected question or query"),
        ({"question": "Q?"}, "no answer; a split without answers cannot be scored"),
        ({"question": "Q?", "answer": {"a": 1}}, "an answer is an object; expected text"),
        ({"question": "Q?", "options": ["a", "b"], "answer": "c"}, "none of the options A, B"),
        ({"question": "Q?", "answer": "1", "precision": "x"}, "precision is 'x'"),
        ({"question": "Q?", "answer": "1", "start": "a", "end": 2}, "expected seconds"),
        ({"messages": [{"role": "user", "content": "a"}] * 4}, "a conversation of 4 messages"),
    ],
)
def test_faults_name_file_line_and_what_was_expected(tmp_path, row, message):
    good = {"question": "Q?", "answer": "x"}
    path = write_jsonl(tmp_path / "bad.jsonl", [good, row])
    with pytest.raises(DataError, match=message) as error:
        items(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_missing_data_and_ambiguous_folders(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_items(str(tmp_path / "none.tsv"), Layout())
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [{"question": "Q?", "answer": "x"}])
    with pytest.raises(DataError, match=r"it has a.jsonl, b.jsonl; name a file"):
        open_items(str(tmp_path), Layout())
    with pytest.raises(DataError, match="no file of the split dev"):
        open_items(str(tmp_path), Layout(), "dev")
