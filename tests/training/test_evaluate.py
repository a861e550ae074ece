"""Exact matches matches in one forward pass are those of greedy decoding."""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.records import chat_record, pair_record, write_image, write_jsonl
from fixtures.train_sessions import critic_rows, small_session, small_setup, write_data

from internvl3_mlx import UserError, load
from internvl3_mlx.errors import DataError
from internvl3_mlx.training.evaluate import (
    critic_ids,
    evaluate,
    exact_match_rate,
    reproduced_exactly,
    step_figures,
)


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


def test_exact_match_counts_the_desirable_answers_of_kto(tmp_path):
    data = tmp_path / "data"
    write_data(data, 4, 4, labels=True)
    session = small_session(tmp_path, method="kto", batch_size=4, max_tiles=None)
    [batch] = session.validation_batches()
    matches = reproduced_exactly(session.state.model, batch)
    assert len(matches) == 8
    [own] = [matches[0::2][np.array(batch.batch.labels)]]
    assert exact_match_rate(session.state, session.validation_batches()) == own.mean()


def test_a_critics_steps_are_counted(tmp_path):
    """Compared with the replies that the same model gives one prompt after another."""
    data = tmp_path / "data"
    rows = [*critic_rows(data, 5)]
    for split in ("train", "valid"):
        write_jsonl(data / f"{split}.jsonl", rows)
    session = small_session(tmp_path, method="prm", batch_size=2)
    tokenizer = session.setup.preprocessor.tokenizer
    ids = critic_ids(tokenizer)
    labels, replies = [], []
    for record in session.setup.train.dataset:
        sample = session.setup.preprocessor.build_sample(record)
        tiles = mx.array(np.concatenate([image.tiles for image in sample.images]))
        for at in np.flatnonzero(np.isin(sample.input_ids, ids) & sample.loss_mask):
            logits = session.state.model(mx.array(sample.input_ids[None, :at]), tiles)[0, -1]
            labels.append(int(sample.input_ids[at] == ids[0]))
            replies.append(int(logits[ids[0]].item() > logits[ids[1]].item()))
    pairs = [*zip(labels, replies, strict=True)]
    found = step_figures(session.state, ids, session.validation_batches())
    assert len(pairs) == 2 + 3 * 3
    assert {*labels} == {0, 1}
    assert found["step_accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    scores = [
        2 * pairs.count((kind, kind)) / max(labels.count(kind) + replies.count(kind), 1)
        for kind in (0, 1)
        if labels.count(kind) + replies.count(kind)
    ]
    assert found["step_macro_f1"] == pytest.approx(np.mean(scores))
    loss, metrics, exact = evaluate(session.state, tokenizer, session.validation_batches)
    assert {*metrics} == {"step_accuracy", "step_macro_f1"}
    assert (loss > 0, exact) == (True, None)


def test_a_critic_trains_on_its_replies_alone(tmp_path):
    data = tmp_path / "data"
    write_jsonl(data / "train.jsonl", [*critic_rows(data, 3)])
    setup = small_setup(tmp_path, method="prm")
    for record in setup.train.dataset:
        sample = setup.preprocessor.build_sample(record)
        trained = sample.input_ids[sample.loss_mask].tolist()
        assert {*trained[::2]} <= {*critic_ids(setup.preprocessor.tokenizer)}
        assert {*trained[1::2]} == {setup.preprocessor.tokenizer.im_end_id}


def test_other_answers_are_refused_by_name(tmp_path):
    data = tmp_path / "data"
    write_jsonl(data / "train.jsonl", [chat_record("Who?", "good")])
    with pytest.raises(DataError, match="answer 1 is 'good', but --method prm trains a critic"):
        small_setup(tmp_path, method="prm").train.report.raise_errors()


def test_a_vocabulary_without_the_signs_is_refused(monkeypatch):
    monkeypatch.setattr("internvl3_mlx.training.evaluate.encode_answer", lambda *_: [1, 2])
    with pytest.raises(UserError, match="has no single token for"):
        critic_ids(None)
