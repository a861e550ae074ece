"""Exact matches matches in one forward pass are those of greedy decoding."""

import numpy as np
from fixtures.records import chat_record, pair_record, write_image, write_jsonl
from fixtures.train_sessions import small_session

from internvl3_mlx import load
from internvl3_mlx.training.evaluate import exact_match_rate, reproduced_exactly


def demo_answers(folder, count):
    """Yield the demo model's answers about images of noise: question, image, answer."""
    vlm = load("demo")
    for number in range(count):
        path = write_image(folder / f"{number}.png", 120 + 60 * number, 100, number)
        question = ("What is this?", "How many things are tsession?")[number % 2]
        answer = vlm.ask(question, [path], max_tokens=30)
        assert answer.finish_reason == "stop"
        yield f"<image>\n{question}", path.name, answer.text


def test_an_answer_counts_if_greedy_decoding_reproduces_it(tmp_path):
    data = tmp_path / "data"
    known = [*demo_answers(data, 4)]
    wrong = [f"{answer} {answer}" for *_, answer in known]  # the right answer, and then more
    rows = [chat_record(q, a, images=[p]) for q, p, a in known]
    rows += [chat_record(q, a, images=[p]) for (q, p, _), a in zip(known[:3], wrong, strict=False)]
    write_jsonl(data / "train.jsonl", rows)
    write_jsonl(data / "valid.jsonl", rows)
    session = small_session(tmp_path, max_tiles=None, batch_size=3)
    matches = np.concatenate(
        [reproduced_exactly(session.state.model, batch) for batch in session.validation_batches()]
    )
    assert matches.tolist() == [True] * 4 + [False] * 3
    assert exact_match_rate(session.state, session.validation_batches()) == 4 / 7


def test_only_the_chosen_answer_of_a_pair_counts(tmp_path):
    data = tmp_path / "data"
    (q, p, answer), (r, s, other) = demo_answers(data, 2)
    rows = [
        pair_record(q, answer, "no " + answer, image=p),
        pair_record(r, "no " + other, other, image=s),
    ]
    for split in ("train", "valid"):
        write_jsonl(data / f"{split}.jsonl", rows)
    session = small_session(tmp_path, method="mpo", max_tiles=None)
    [batch] = session.validation_batches()
    assert reproduced_exactly(session.state.model, batch).tolist() == [True, False, False, True]
    assert exact_match_rate(session.state, session.validation_batches()) == 0.5
