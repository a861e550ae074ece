"""Fine-tuning a Flash model: the full form of every tile, and a router that stays as it was."""

import mlx.core as mx
import pytest
from fixtures.flash import flash_checkpoint
from fixtures.inputs import random_image
from fixtures.train_sessions import finish, small_config, small_session, write_data
from mlx.utils import tree_flatten

from internvl3_mlx import UserError, load
from internvl3_mlx.training.run import run_session
from internvl3_mlx.training.setup import FLASH_NOTE, prepare_run
from internvl3_mlx.training.trainable import select_layers, set_trainable

ROUTER = ("mlp2.", "pooling_before_gating.", "gating.")


def test_adapters_leave_the_router_alone_and_the_model_answers(tmp_path):
    folder = str(flash_checkpoint().folder)
    write_data(tmp_path / "data", 4)
    notes = []
    config = small_config(tmp_path, model=folder, lora_keys=["all"], max_tiles=3, iters=2)
    finish(prepare_run(config, notes.append))
    assert FLASH_NOTE in notes
    session = small_session(tmp_path, model=folder, lora_keys=["all"], max_tiles=3, iters=2)
    before = {n: mx.array(x) for n, x in tree_flatten(session.state.model.parameters())}
    [*run_session(session)]
    after = dict(tree_flatten(session.state.model.parameters()))
    assert all(mx.array_equal(before[n], after[n]) for n in after if n.startswith(ROUTER))
    assert any("lora_B" in n and not mx.array_equal(before[n], after[n]) for n in after)
    images = [random_image(170, 60)]
    tuned = load(folder, adapter=str(tmp_path / "run"))
    answer = tuned.ask("What?", images, max_tokens=4)
    plain = load(folder).ask("What?", images, max_tokens=4)
    assert answer.images[0].compressed_tiles == plain.images[0].compressed_tiles is not None


def test_the_router_cannot_be_trained():
    model = load(str(flash_checkpoint().folder)).model
    assert not any(path.startswith(ROUTER) for path in select_layers(model, ["*"], None, None))
    with pytest.raises(UserError, match="gating of a Flash model is not trained here"):
        set_trainable(model, ["gating"])
    set_trainable(model, ["mlp1"])
    assert not any(n.startswith(ROUTER) for n, _ in tree_flatten(model.trainable_parameters()))
