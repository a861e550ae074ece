"""Published record formats: each is read as what it means, or refused by its name."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from fixtures.image_files import noise
from fixtures.record_formats import ASSISTANT, CHATS, GPT, HUMAN, PAIRS, UNPAIRED, USER, WORSE
from fixtures.records import chat_record, make_preprocessor, open_records, write_image, write_jsonl

from internvl3_mlx.prompt.reasoning import PRM_SYSTEM_PROMPT
from internvl3_mlx.records.json_values import RecordError
from internvl3_mlx.training.data.formats import FORMATS
from internvl3_mlx.training.data.schema import parse_record
from internvl3_mlx.training.data.validate import validation_report


def cases(table):
    return [
        pytest.param(name, record, id=f"{name} {number}")
        for name, records in table.items()
        for number, record in enumerate(records)
    ]


@pytest.mark.parametrize(("name", "record"), cases(CHATS))
def test_a_format_of_conversations_is_named_and_read(name, record):
    parsed = parse_record(record)
    assert parsed.format == name
    question, answer = parsed.messages
    assert question.text.removeprefix("<image>\n") == "What?"
    assert (question.num_images, parsed.images, answer.text) == (1, ("a.png",), "A cat.")
    assert (parsed.answers, parsed.system) == (None, None)


@pytest.mark.parametrize(("name", "record"), cases(PAIRS))
def test_a_format_of_pairs_is_named_and_read(name, record):
    parsed = parse_record({**record, "image": "a.png"})
    assert parsed.format == name
    [question] = parsed.messages
    assert question.text.removeprefix("<image>\n") == "What?"
    assert (question.num_images, parsed.answers) == (1, ("A cat.", "A dog."))


@pytest.mark.parametrize(("name", "record"), cases(UNPAIRED))
def test_a_format_of_answers_with_labels_is_named_and_read(name, record):
    parsed = parse_record({**record, "image": "a.png"})
    assert parsed.format == name
    [question] = parsed.messages
    assert question.text.removeprefix("<image>\n") == "What?"
    given = record.get("label", record.get("kto_tag"))
    expected = given in (True, 1, "1", "true")
    assert (parsed.answers, parsed.label) == (("A cat.",), expected)


@pytest.mark.parametrize(("table", "method"), [(CHATS, "sft"), (PAIRS, "mpo"), (UNPAIRED, "kto")])
def test_files_of_all_formats_become_the_same_sample(tmp_path, table, method):
    write_image(tmp_path / "a.png", 300, 100)
    records = [{"image": "a.png", **record} for rows in table.values() for record in rows]
    if method == "sft":
        records = [record for rows in table.values() for record in rows]
    dataset, preprocessor = open_records(
        write_jsonl(tmp_path / "r.jsonl", records), method=method, batch_size=2
    )
    report = validation_report(dataset, preprocessor)
    assert report.errors == ()
    assert {*report.formats} == {*table}
    assert {*report.sizes.tokens.tolist()} == {report.sizes.tokens[0]}
    build = preprocessor.build_sample if method == "sft" else preprocessor.build_preference
    samples = [build(record) for record in dataset]
    first, *others = [s if method == "sft" else s.prompt for s in samples]
    assert all(np.array_equal(first.input_ids, other.input_ids) for other in others)
    assert all(np.array_equal(first.loss_mask, other.loss_mask) for other in others)


def test_every_format_of_the_table_is_tested():
    tested = {*CHATS, *PAIRS, *UNPAIRED, "messages pair", "plain text", "VisualPRM steps"}
    assert {form.name for form in FORMATS if not form.refused} == tested


def test_the_guide_lists_every_format_with_its_keys():
    guide = (Path(__file__).parents[3] / "docs" / "guide" / "training.md").read_text("utf-8")
    listed = {row.split("|")[1].strip(): row for row in guide.splitlines() if row[:2] == "| "}
    for form in FORMATS:
        if not form.refused:
            keys = [key for key in form.fields if f"`{key}`" not in listed[form.name]]
            assert keys in ([], ["history"]), form


@pytest.mark.parametrize(
    "record",
    [
        {"query": "Why?", "response": "So.", "history": [["Who?", "Me."]]},
        {"instruction": "Why?", "output": "So.", "history": [["Who?", "Me."]]},
        {"instruction": "Why?", "output": "So.", "history": '[["Who?", "Me."]]'},
    ],
)
def test_history_comes_before_the_question(record):
    texts = [message.text for message in parse_record(record).messages]
    assert texts == ["Who?", "Me.", "Why?", "So."]


def test_the_input_of_an_alpaca_record_follows_its_instruction():
    record = parse_record({"instruction": "Add.", "input": "2 + 3", "output": "5"})
    assert [message.text for message in record.messages] == ["Add.\n2 + 3", "5"]


@pytest.mark.parametrize("key", ["query", "instruction", "prompt", "question"])
def test_the_system_key_of_a_record_is_its_system_message(key):
    answer = {"query": "response", "instruction": "output", "prompt": "completion"}
    record = {"system": "Be brief.", key: "What?", answer.get(key, "answer"): "A cat."}
    assert parse_record(record).system == "Be brief."
    turns = {"system": "Be brief.", "conversations": [{**HUMAN, "value": "What?"}, GPT]}
    assert parse_record(turns).system == "Be brief."
    same = [{"role": "system", "content": "Be brief."}, {**USER, "content": "What?"}, ASSISTANT]
    assert parse_record({"system": "Be brief.", "messages": same}).system == "Be brief."
    with pytest.raises(RecordError, match="both a 'system' key and a system message"):
        parse_record({"system": "Be long.", "messages": same})


def test_steps_with_scores_become_the_conversation_of_a_critic():
    steps = [{"step": "One.", "score": 0.5}, {"step": "Two.", "score": 0.0}]
    record = {"image": "a.png", "question": "How many?", "steps_with_score": steps}
    parsed = parse_record(record)
    assert (parsed.format, parsed.system) == ("VisualPRM steps", PRM_SYSTEM_PROMPT)
    assert [message.text for message in parsed.messages] == [
        "### Question:\n<image>\nHow many?\n\n### Solution Process:\nOne.", "+", "Two.", "-",
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["loss", "weight", "loss_scale", "train", "training"])
def test_an_answer_can_be_kept_out_of_the_loss(tmp_path, key):
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "bad", key: 0},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "good", key: True},
    ]
    dataset, preprocessor = open_records(write_jsonl(tmp_path / "r.jsonl", [{"messages": turns}]))
    sample = preprocessor.build_sample(dataset[0])
    trained = preprocessor.tokenizer.decode(sample.input_ids[sample.loss_mask])
    assert trained.strip() == "good"
    assert preprocessor.measure(dataset[0]).loss_tokens == int(sample.loss_mask.sum())
    assert sample.loss_mask[-1]
    assert sample.input_ids.tolist().count(preprocessor.tokenizer.im_end_id) == 5


def test_plain_text_is_trained_on_whole_with_its_images(tmp_path):
    write_image(tmp_path / "a.png", 90, 90)
    text = "Look: <image>\nA red crab<|im_end|>"
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": text, "image": "a.png"}, {"text": "abc"}])
    dataset, preprocessor = open_records(path)
    tokenizer = preprocessor.tokenizer
    image, plain = (preprocessor.build_sample(record) for record in dataset)
    assert plain.input_ids.tolist() == [*tokenizer.encode_text("abc"), tokenizer.im_end_id]
    assert plain.loss_mask.all()
    outside = ~image.loss_mask
    assert {*image.input_ids[outside].tolist()} == {
        tokenizer.image_start_id, tokenizer.image_id, tokenizer.image_end_id,
    }  # fmt: skip
    assert outside.sum() == 16 + 2
    assert image.input_ids.tolist().count(tokenizer.im_end_id) == 1
    assert validation_report(dataset, preprocessor).formats == {"plain text": 2}


def png_bytes():
    file = io.BytesIO()
    noise(60, 50, 3).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "image",
    [
        base64.b64encode(png_bytes()).decode(),
        "data:image/png;base64," + base64.b64encode(png_bytes()).decode(),
        {"bytes": base64.b64encode(png_bytes()).decode(), "path": "gone.png"},
        {"bytes": png_bytes(), "path": None},
        png_bytes(),
    ],
    ids=["base64", "data address", "object of base64", "object of bytes", "bytes"],
)
def test_an_image_inside_a_record_is_read(tmp_path, image):
    write_jsonl(tmp_path / "r.jsonl", [chat_record("?")])
    dataset, _ = open_records(tmp_path / "r.jsonl")
    parsed = parse_record(chat_record("What?", images=[image]))
    loader = make_preprocessor().media_loader
    loader.decode(parsed, dataset.files[0])
    assert loader.image_sizes(parsed, dataset.files[0]) == [(60, 50)]


PATHS = [{"path": "a.png"}, {"path": "b.png"}]
ERRORS = {
    "no images, but 'imgs' names images, which nothing reads; rename the key to 'images'": {
        "prompt": "a", "completion": "b", "imgs": ["a.png", "b.JPG"],
    },
    "no images, but 'img_path' names images, which nothing reads; rename the key to 'image'": {
        "question": "a", "answer": "b", "img_path": "a.png",
    },
    "no images, but 'film' names videos, which nothing reads; rename the key to 'video'": {
        "question": "a", "answer": "b", "film": "a.mp4",
    },
    "no images, but 'photo' names images": {"question": "a", "answer": "b", "photo": png_bytes()},
    "no images, but 'photos' names images": {"question": "a", "answer": "b", "photos": PATHS},
    "'images' contains an object; expected file paths, with 'path' or 'bytes'": chat_record(
        images=[{"src": "a.png"}]
    ),
    "only 'Question', 'Answer'; write 'question' for 'Question', 'answer' for 'Answer'": {
        "Question": "a", "Answer": "b",
    },
    "only 'conversation'; write 'conversations' for 'conversation'": {"conversation": [HUMAN, GPT]},
    "only 'chat'; write 'messages' for 'chat'": {"chat": [USER, ASSISTANT]},
    "only 'data'; the records are in 'data', save that list alone": {"data": [chat_record()]},
    "'answer' is missing; expected text; 'answers' has several": {
        "question": "a", "answers": ["b", "c"],
    },
    "'answer' is true or false; expected text": {"question": "a", "answer": True},
    "'answer' is nan; expected text": {"question": "a", "answer": float("nan")},
    "'objects.bbox' is 5; expected a list": chat_record(objects={"bbox": 5}),
    "the record has 'tools', which training does not read: tool use is not": chat_record(tools=[1]),
    "the record has 'loss_scale', which training does not read": chat_record(loss_scale=0.5),
    "the record has 'margin'": {**PAIRS["MMPR pair"][0], "margin": 0.3},
    "'label' is 3; expected true for a good answer or false": {
        "prompt": "a", "completion": "b", "label": 3,
    },
    "'label', which training does not read: expected 'prompt'": {
        **PAIRS["MMPR pair"][0], "label": True,
    },
    "prompt only: a prompt without an answer": {"prompt": "a"},
    "'response' is missing; expected text": {"query": "a"},
    "'history' is not a list of [question, answer]": {
        "query": "a", "response": "b", "history": ["c"],
    },
    "message 2 has 'tool_calls': tool use is not supported": {
        "messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]
    },
    "message 2 has 'reasoning_content': write it into the content": {
        "messages": [USER, {**ASSISTANT, "reasoning_content": "hm"}]
    },
    "message 2 has loss 0.5; expected 0 or 1": {"messages": [USER, {**ASSISTANT, "loss": 0.5}]},
    "message 1 (user) has loss True; only answers are trained on": {
        "messages": [{**USER, "loss": True}, ASSISTANT]
    },
    "message 2 has loss and weight that contradict each other": {
        "messages": [USER, {**ASSISTANT, "loss": False, "weight": 1}], "image": "a.png",
    },
    "no answer is trained on": {"messages": [USER, {**ASSISTANT, "loss": False}], "image": "a"},
    "differ in more than their last answer": {
        "chosen": [USER, ASSISTANT], "rejected": [{"role": "user", "content": "Other?"}, WORSE],
    },
    "'system' is 3; expected text": chat_record(system=3),
    "'steps_with_score' contains a step without a score": {
        "question": "a", "steps_with_score": [{"step": "b", "score": None}],
    },
    "message 1 has 2 <image> placeholders but 1 image": {
        "messages": [{"role": "user", "content": "<image><image>", "images": ["a"]}, ASSISTANT]
    },
}  # fmt: skip


@pytest.mark.parametrize("expected", ERRORS)
def test_what_would_change_the_loss_is_refused_by_name(expected):
    with pytest.raises(RecordError) as caught:
        parse_record(ERRORS[expected])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("answer", "text"), [(4, "4"), (0.5, "0.5"), (["four"], "four")])
def test_an_answer_may_be_a_number_or_alone_in_a_list(answer, text):
    assert parse_record({"question": "2 + 2?", "answer": answer}).messages[1].text == text


def test_history_may_be_messages():
    history = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    record = parse_record({"query": "Why?", "response": "So.", "history": history})
    assert [message.text for message in record.messages] == ["Who?", "Me.", "Why?", "So."]


def test_images_of_anthropic_messages_are_read(tmp_path):
    source = {"type": "base64", "media_type": "image/png", "data": png_bytes()}
    source["data"] = base64.b64encode(png_bytes()).decode()
    parts = [{"type": "image", "source": source}, {"type": "text", "text": "What?"}]
    record = parse_record({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert record.images == (png_bytes(),)


def test_false_and_zero_are_named_among_the_keys_that_nothing_reads():
    messages = [USER, {**ASSISTANT, "keep": False, "empty": [], "none": None}]
    record = parse_record({"messages": messages, "image": "a.png", "rank": 0, "tags": ""})
    assert record.unused == ("rank", "message.keep")


def test_paths_beside_the_images_of_a_record_are_only_named():
    record = parse_record({**chat_record(), "image": "a.png", "thumb": "t.png", "id": "a.png"})
    assert (record.images, record.unused) == (("a.png",), ("thumb", "id"))
    assert parse_record({**chat_record(), "id": "a.png", "source": "a.pdf"}).images == ()


JUNK = (
    None,
    True,
    0,
    -1.5,
    float("nan"),
    "",
    "x",
    b"\0",
    [],
    {},
    [None],
    [[]],
    {"role": "user"},
    "[",
)


@pytest.mark.parametrize("method", ["sft", "mpo", "kto"])
def test_junk_anywhere_in_a_record_is_an_error_in_words(method):
    """Every value of every format, in turn, is replaced by every kind of junk."""
    table = {"sft": CHATS, "mpo": PAIRS, "kto": UNPAIRED}[method]
    objects = {"ref": ["a"], "bbox": [[1, 2, 3, 4]], "bbox_type": "real", "image_id": [0]}
    more = {"image": "a.png", "objects": objects, "clip": [0, 1], "system": "s"}
    errors: list[str] = []
    for record in (row for rows in table.values() for row in rows):
        for path in places({**more, **record}):
            for junk in JUNK:
                changed = json.loads(json.dumps({**more, **record}))
                inside = changed
                for key in path[:-1]:
                    inside = inside[key]
                inside[path[-1]] = junk
                try:
                    parse_record(changed)
                except RecordError as error:
                    errors.append(str(error))
    assert len(errors) > 100
    assert not any("\n" in error for error in errors)


def places(value):
    """Yield the path of keys to everything inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in inner:
        yield (key,)
        if isinstance(entry, dict | list):
            yield from ((key, *rest) for rest in places(entry))


def test_a_text_column_beside_messages_is_unused_rather_than_ambiguous():
    record = parse_record({**chat_record("Who?"), "text": "Who?A cat.", "prompt_id": 3})
    assert (record.format, record.unused) == ("OpenAI messages", ("text", "prompt_id"))
