"""A text model of mlx-lm drafts for a model that sees."""

import json
import shutil

import mlx.core as mx
import pytest
from fixtures.inputs import random_image
from fixtures.tokenizers import write_qwen_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2

from internvl3_mlx import UserError, convert_model, load
from internvl3_mlx.generation.text_draft import image_ids

CAT = random_image(130, 70)
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


pytestmark = pytest.mark.usefixtures("cheap_drafts")


def write_text_model(folder):
    """Write what mlx-lm loads: random weights, and a tokenizer."""
    folder.mkdir()
    write_qwen_tokenizer(folder)
    size = len(json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]) + 40
    config = {**CONFIG, "vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(1)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return str(folder)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 4}])
def test_a_text_model_drafts_for_questions_about_images(vlm, tmp_path, settings):
    draft = write_text_model(tmp_path / "text")
    asked = {"max_tokens": 12, **settings}
    plain, fast = vlm.conversation(**asked), vlm.conversation(draft_model=draft, **asked)
    for question, images in (("What is it?", [CAT]), ("And now?", [])):
        wanted, answer = plain.ask(question, images), fast.ask(question, images)
        if not settings:
            assert answer.token_ids == wanted.token_ids
        assert answer.usage.drafted_tokens > 0
        assert len(answer.token_ids) == 12
        fast.undo(), fast.ask(question, images)
    held = fast.prompt_cache.text_draft
    assert {layer.offset for layer in held.layers} == {len(held.ids)}
    assert vlm.tokenizer.image_id not in held.ids
    assert len(held.ids) > 20


def test_another_vocabulary_is_refused_by_its_first_other_token(vlm, tmp_path):
    other = write_text_model(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match="other has a different vocabulary: token .* is 'b' there"):
        vlm.ask("Hi", draft_model=other)


@pytest.fixture(scope="module")
def demo_text(tmp_path_factory):
    """Return the demo's language model: its image tokens come before its plain ones."""
    folder = tmp_path_factory.mktemp("demo") / "text"
    return convert_model("demo", folder, part="language").target


def test_a_vocabulary_that_begins_with_image_tokens_is_drafted_for(demo_text):
    demo, asked = load("demo"), ("Describe this picture in detail.", [CAT])
    wanted = demo.ask(*asked, max_tokens=16)
    chat = demo.conversation(max_tokens=16, draft_model=str(demo_text))
    answer = chat.ask(*asked)
    assert answer.token_ids == wanted.token_ids
    assert answer.usage.drafted_tokens > 0
    assert image_ids(demo.tokenizer).isdisjoint(chat.prompt_cache.text_draft.ids)


def test_a_plain_token_after_those_of_images_is_compared(demo_text, tmp_path):
    other = shutil.copytree(demo_text, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocab = content["model"]["vocab"]
    vocab["y"], vocab["z"] = vocab["z"], vocab["y"]
    (other / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match="other has a different vocabulary: token .* is 'z' there"):
        load("demo").ask("Hi", draft_model=str(other), max_tokens=1)


def test_a_model_that_mlx_lm_cannot_load_is_refused(vlm, tmp_path):
    draft = tmp_path / "odd"
    draft.mkdir()
    (draft / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(UserError, match="cannot load the draft model .*odd through mlx-lm: "):
        vlm.ask("Hi", draft_model=str(draft))
