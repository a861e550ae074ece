"""The judge: a text model that mlx-lm loads."""

import json
import os
import shutil

import mlx.core as mx
import pytest

from internvl3_mlx import load
from internvl3_mlx.errors import UserError
from internvl3_mlx.evaluation.judge import MAX_TOKENS, load_text_judge
from internvl3_mlx.loading.resolve import DEMO_FOLDER


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """The demo's language model as a Qwen2 checkpoint of its own."""
    folder = tmp_path_factory.mktemp("text")
    weights = mx.load(str(DEMO_FOLDER / "model.safetensors"))
    prefix = "language_model."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    mx.save_safetensors(str(folder / "model.safetensors"), own, {"format": "mlx"})
    config = json.loads((DEMO_FOLDER / "config.json").read_text())["llm_config"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / name, folder / name)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant{{ '\\n' }}"
    )
    return folder


@pytest.mark.skipif(
    "PRETEND_GPU" in os.environ, reason="mlx-lm opens a stream on the GPU that is only pretended"
)
def test_a_text_model_judges_greedily(text_model):
    judge, vlm = load_text_judge(str(text_model)), load("demo")
    assert judge.name == str(text_model)
    questions = ("What is this?", "Name two things.", "a red star", "Is there a dog?")
    said = [judge(question) for question in questions]
    alone = [vlm.ask(question, system="", max_tokens=MAX_TOKENS).text for question in questions]
    assert [text.strip() for text in said] == [text.strip() for text in alone]
    assert any(said)


def test_what_mlx_lm_cannot_load_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"cannot load the judge .* through mlx-lm: .*; name a text"
    ):
        load_text_judge(str(tmp_path))
