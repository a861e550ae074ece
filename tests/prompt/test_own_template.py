"""A repository's own chat template gives its own prompt, to the character, in every layout."""

import pytest
from fixtures.damaged_checkpoints import copied, edit_config
from fixtures.tiny import Recipe
from transformers import AutoTokenizer

from internvl3_mlx import convert_model
from internvl3_mlx.config import read_config
from internvl3_mlx.prompt.messages import Message, MessageMedia, TextSegment
from internvl3_mlx.prompt.template import load_template

QUESTION = "What is <b>this</b>, 你好?"


def written(folder, system=None):
    """Write our prompt for one question with one image as text, the image as transformers does."""
    message = Message("user", QUESTION, (MessageMedia((3,)),))
    segments = load_template(read_config(folder), folder).render([message], system)
    return "".join(s.text if isinstance(s, TextSegment) else "<IMG_CONTEXT>" for s in segments)


def theirs(folder, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    body = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [*turns, {"role": "user", "content": body}], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_prompt_of_an_hf_repository_equals_transformers(tmp_path, system):
    folder = copied(Recipe(layout="hf_a"), tmp_path)
    assert written(folder, system) == theirs(folder, system)
    assert written(folder).count("<|im_start|>") == 2


@pytest.mark.parametrize("own", [None, 'You say "yes" {{ and }} \\ no.\n'])
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_a_conversion_to_hf_keeps_the_prompt_in_transformers_too(tmp_path, own, system):
    source = copied(Recipe(), tmp_path)
    edit_config(source, lambda config: config.update(system_message=own))
    convert_model(str(source), tmp_path / "hf", layout="hf")
    assert written(tmp_path / "hf", system) == written(source, system)
    if system != "":
        assert written(tmp_path / "hf", system) == theirs(tmp_path / "hf", system)


def test_a_conversion_from_hf_back_to_the_original_keeps_the_system_text(tmp_path):
    source = copied(Recipe(), tmp_path)
    edit_config(source, lambda config: config.update(system_message="Look closely."))
    convert_model(str(source), tmp_path / "hf", layout="hf")
    convert_model(str(tmp_path / "hf"), tmp_path / "back", layout="original")
    convert_model(str(tmp_path / "hf"), tmp_path / "mlx")
    for name in ("back", "mlx"):
        assert written(tmp_path / name) == written(source)
