"""The compiled step: padded samples have the same loss, and everything in it can be traced.

Nothing is evaluated below a compiled step: on a CPU that would start a C++ compiler.
"""

from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from fixtures.tolerances import LOSS_TOLERANCE, TOLERANCE
from fixtures.train_sessions import small_config, small_session, write_data

from internvl3_mlx.errors import UserError
from internvl3_mlx.training.compiled_step import (
    TARGET_MULTIPLE,
    TOKEN_MULTIPLE,
    CompiledStep,
    pad_batch,
)
from internvl3_mlx.training.params import named_arrays
from internvl3_mlx.training.trainer import loss_and_grads, make_updates


def works(folder, **settings):
    write_data(folder / "data", 7)
    here = small_session(folder, lora_dropout=0, batch_size=3, **settings)
    return here, [*islice(here.remaining_batches(), 2)]


def test_padded_samples_give_the_same_loss_and_gradients(tmp_path):
    here, [work, _] = works(tmp_path, loss_reduction="square")
    compute = loss_and_grads(here.state, here.state.objective_state)
    padded_work = type(work)(pad_batch(work.batch), work.vision_features)
    one, other = compute(work), compute(padded_work)
    assert len(padded_work.batch.input_ids) > len(work.batch.input_ids)
    assert other[0][0].item() == pytest.approx(one[0][0].item(), rel=1e-6)
    assert other[0][1].item() == pytest.approx(one[0][1].item(), rel=1e-6)
    theirs = dict(named_arrays(other[1]))
    for name, grad in named_arrays(one[1]):
        assert np.abs(np.array(grad) - np.array(theirs[name])).max() < TOLERANCE, name


def test_lengths_and_target_counts_are_padded_to_multiples(tmp_path):
    _, found = works(tmp_path)
    for work in found:
        batch = pad_batch(work.batch)
        assert {(span.stop - span.start) % TOKEN_MULTIPLE for span in batch.spans} == {0}
        assert batch.spans[-1].stop == len(batch.input_ids) == len(batch.positions)
        assert len(batch.targets) % TARGET_MULTIPLE == 0
        assert batch.loss_weights.sum() == work.batch.loss_weights.sum()
        learned = batch.loss_weights > 0
        assert np.array_equal(batch.targets[learned], work.batch.targets)
        before = work.batch.input_ids[work.batch.target_positions]
        assert np.array_equal(batch.input_ids[batch.target_positions[learned]], before)


@pytest.mark.parametrize("parts", ["lora", "lora,mlp1", "vision_model"])
def test_a_step_is_fully_traced_and_leaves_the_weights_in_place(tmp_path, parts):
    here, [work, _] = works(tmp_path, train=parts, compile=True, drop_path=0.2)
    before = dict(named_arrays(here.state.model.trainable_parameters()))
    compiled = here.state.compiled_step
    assert isinstance(compiled, CompiledStep)
    (numerator, denominator, *_), gradients = compiled(work)
    assert (numerator.shape, denominator.shape) == ((), ())
    assert {name: g.shape for name, g in named_arrays(gradients)} == {
        n: w.shape for n, w in before.items()
    }
    after = dict(named_arrays(here.state.model.trainable_parameters()))
    assert all(after[name] is before[name] for name in before)
    compiled(work)
    assert len(compiled.by_shape) == 1


def test_the_training_loop_uses_the_compiled_step(tmp_path):
    write_data(tmp_path / "data", 6)
    settings = {"iters": 3, "lora_dropout": 0}
    plain = small_session(tmp_path, **settings)
    losses = [step.loss for step in make_updates(plain.state, plain.remaining_batches())]
    mx.disable_compile()
    try:
        here = small_session(tmp_path, compile=True, **settings)
        found = [step.loss for step in make_updates(here.state, here.remaining_batches())]
    finally:
        mx.enable_compile()
    assert found == pytest.approx(losses, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("other", [{"packing": True}, {"grad_checkpoint": True}, {"method": "mpo"}])
def test_settings_that_cannot_be_compiled_are_refused(tmp_path, other):
    with pytest.raises(UserError, match="compile cannot be combined with packing"):
        small_config(tmp_path, compile=True, **other)
