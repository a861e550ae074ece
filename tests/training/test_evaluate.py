"""Answers judged in one pass are those that greedy decoding gives."""

import numpy as np
from fixtures.records import chat_record, pair_record, write_image, write_jsonl
from fixtures.train_sessions import small_session

from internvl3_mlx import load
from internvl3_mlx.training.evaluate import exact_match_rate, reproduced_exactly


def asked(folder, count):
    """What the demo model answers about some pictures of noise: question, picture, answer."""
    vlm = load("demo")
    for number in range(count):
        path = write_image(folder / f"{number}.png", 120 + 60 * number, 100, number)
        question = ("What is this?", "How many things are there?")[number % 2]
        answer = vlm.ask(question, [path], max_tokens=30)
        assert answer.finish_reason == "stop"
        yield f"<image>\n{question}", path.name, answer.text


def test_an_answer_counts_when_greedy_decoding_gives_it(tmp_path):
    data = tmp_path / "data"
    known = [*asked(data, 4)]
    wrong = [f"{answer} {answer}" for *_, answer in known]  # begins right, and goes on
    rows = [chat_record(q, a, images=[p]) for q, p, a in known]
    rows += [chat_record(q, a, images=[p]) for (q, p, _), a in zip(known[:3], wrong, strict=False)]
    write_jsonl(data / "train.jsonl", rows)
    write_jsonl(data / "valid.jsonl", rows)
    here = small_session(tmp_path, max_tiles=None, batch_size=3)
    found = np.concatenate(
        [reproduced_exactly(here.state.model, work) for work in here.validation_batches()]
    )
    assert found.tolist() == [True] * 4 + [False] * 3
    assert exact_match_rate(here.state, here.validation_batches()) == 4 / 7


def test_of_a_pair_the_chosen_answer_counts(tmp_path):
    data = tmp_path / "data"
    (q, p, answer), (r, s, other) = asked(data, 2)
    rows = [
        pair_record(q, answer, "no " + answer, image=p),
        pair_record(r, "no " + other, other, image=s),
    ]
    for split in ("train", "valid"):
        write_jsonl(data / f"{split}.jsonl", rows)
    here = small_session(tmp_path, method="mpo", max_tiles=None)
    [work] = here.validation_batches()
    assert reproduced_exactly(here.state.model, work).tolist() == [True, False, False, True]
    assert exact_match_rate(here.state, here.validation_batches()) == 0.5
