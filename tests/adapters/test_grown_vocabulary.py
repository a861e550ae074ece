"""An adapter trained with more tokens brings its embedding, head and tokenizer, as in PEFT."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from fixtures.loaded_models import tiny
from fixtures.tiny import Bits, Recipe
from fixtures.tolerances import TOLERANCE
from safetensors.torch import load_file, save_file

from internvl3_mlx import KeyMapError, load
from internvl3_mlx.prompt.tokenizer import Tokenizer

RANK, NEW = 3, ("<loc_0>", "<loc_1>", "<act>")
Q_PROJ = "language_model.model.layers.1.self_attn.q_proj"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
QUESTION = "Find <loc_1> and <act><loc_0>"


def grown(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.cat([rows, torch.randn(len(NEW), rows.shape[1], generator=draw)])


def write_tokenizer(source, folder):
    content = json.loads((source / "tokenizer.json").read_text())
    first = load_file(source / "model.safetensors")[EMBEDDING].shape[0]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"] += [
        {"id": first + n, "content": text, **flags} for n, text in enumerate(NEW)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def write_adapter(folder, tensors, source=None):
    folder.mkdir(parents=True)
    table = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2.0 * RANK, "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    named = {f"base_model.model.{name}": x for name, x in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    if source is not None:
        write_tokenizer(source, folder)
    return folder


def adapter_tensors(weights, names=(EMBEDDING, HEAD)):
    draw = torch.Generator().manual_seed(5)
    return {
        f"{Q_PROJ}.lora_A.weight": torch.randn(RANK, 128, generator=draw) * 0.1,
        f"{Q_PROJ}.lora_B.weight": torch.randn(128, RANK, generator=draw) * 0.1,
        **{name: grown(weights[name], seed) for seed, name in enumerate(names)},
    }


def merged_by_hand(source, tensors, folder):
    """Write the checkpoint that the adapter stands for, with PyTorch alone."""
    folder.mkdir()
    weights = load_file(source / "model.safetensors")
    low, high = (tensors.get(f"{Q_PROJ}.lora_{side}.weight") for side in "AB")
    weights[f"{Q_PROJ}.weight"] = weights[f"{Q_PROJ}.weight"] + 2.0 * high @ low
    weights |= {name: tensors[name] for name in (EMBEDDING, HEAD) if name in tensors}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["vocab_size"] = tensors[EMBEDDING].shape[0]
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(source, folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_it_equals_the_model_that_was_trained(tmp_path, tied):
    source = tiny(Recipe(tied=tied)).folder
    names = (EMBEDDING,) if tied else (EMBEDDING, HEAD)
    tensors = adapter_tensors(load_file(source / "model.safetensors"), names)
    adapter = write_adapter(tmp_path / "a", tensors, source)
    vlm = load(str(source), adapter=str(adapter))
    whole = load(str(merged_by_hand(source, tensors, tmp_path / "whole")))
    inputs = vlm.prepare_inputs(QUESTION)
    assert inputs.token_ids == whole.prepare_inputs(QUESTION).token_ids
    rows = tensors[EMBEDDING].shape[0]
    assert {rows - 3, rows - 2, rows - 1} <= {*inputs.token_ids}
    ours, theirs = (m.model(inputs.input_ids[None]) for m in (vlm, whole))
    assert ours.shape[-1] == rows
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=TOLERANCE)
    assert vlm.ask(QUESTION, max_tokens=6).token_ids == whole.ask(QUESTION, max_tokens=6).token_ids


def test_it_is_attached_to_a_quantized_model(tmp_path):
    source = tiny(Recipe()).folder
    packed = tiny(Recipe(layout="mlx", bits=Bits())).folder
    tensors = adapter_tensors(load_file(source / "model.safetensors"))
    vlm = load(str(packed), adapter=str(write_adapter(tmp_path / "a", tensors, source)))
    language = vlm.model.language_model
    assert mx.array_equal(language.model.embed_tokens.weight, mx.array(tensors[EMBEDDING].numpy()))
    assert mx.array_equal(language.lm_head.weight, mx.array(tensors[HEAD].numpy()))
    assert vlm.config.text.vocab_size == tensors[EMBEDDING].shape[0]
    vlm.ask(QUESTION, max_tokens=3)


def test_embeddings_of_the_same_size_replace_quantized_ones(tmp_path):
    packed = tiny(Recipe(layout="mlx", bits=Bits())).folder
    dense = load_file(tiny(Recipe()).folder / "model.safetensors")
    tensors = adapter_tensors(dense) | {name: dense[name] * 1.5 for name in (EMBEDDING, HEAD)}
    model = load(str(packed), adapter=str(write_adapter(tmp_path / "a", tensors))).model
    found = model.language_model.model.embed_tokens.weight
    assert mx.array_equal(found, mx.array(tensors[EMBEDDING].numpy()))


@pytest.mark.parametrize("quantize", [4, None])
def test_its_stop_tokens_are_those_of_both(tmp_path, quantize):
    source = tiny(Recipe()).folder
    tensors = adapter_tensors(load_file(source / "model.safetensors"))
    adapter = write_adapter(tmp_path / "a", tensors, source)
    (adapter / "tokenizer_config.json").write_text('{"eos_token": "<act>"}')
    vlm = load(str(source), adapter=str(adapter), quantize=quantize)
    own = Tokenizer.from_folder(source)
    assert vlm.tokenizer.stop_ids == own.stop_ids | {tensors[EMBEDDING].shape[0] - 1}


def test_without_its_tokenizer_it_is_refused(tmp_path):
    source = tiny(Recipe()).folder
    tensors = adapter_tensors(load_file(source / "model.safetensors"))
    with pytest.raises(KeyMapError, match=r"a vocabulary of \d+ tokens.*no tokenizer"):
        load(str(source), adapter=str(write_adapter(tmp_path / "a", tensors)))


def test_without_its_head_it_is_refused(tmp_path):
    source = tiny(Recipe()).folder
    tensors = adapter_tensors(load_file(source / "model.safetensors"), (EMBEDDING,))
    with pytest.raises(KeyMapError, match=r"a vocabulary of \d+ tokens"):
        load(str(source), adapter=str(write_adapter(tmp_path / "a", tensors, source)))


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    source = tiny(Recipe()).folder
    tensors = adapter_tensors(load_file(source / "model.safetensors"))
    adapter = write_adapter(tmp_path / "a", tensors, source)
    file = adapter / "tokenizer.json"
    content = json.loads(file.read_text())
    tokens = {token["content"]: token for token in content["added_tokens"]}
    one, other = tokens["<img>"], tokens["<IMG_CONTEXT>"]
    one["id"], other["id"] = other["id"], one["id"]
    content["added_tokens"].sort(key=lambda token: token["id"])
    file.write_text(json.dumps(content))
    with pytest.raises(KeyMapError, match="another id for '<(img|IMG_CONTEXT)>' than the model"):
        load(str(source), adapter=str(adapter))


def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path):
    source = tiny(Recipe()).folder
    weights = load_file(source / "model.safetensors")
    tensors = adapter_tensors(weights)
    tensors |= {name: tensors[name][:-1].clone() for name in (EMBEDDING, HEAD)}
    with pytest.raises(KeyMapError, match=r"has ids up to \d+, but the adapter's embedding"):
        load(str(source), adapter=str(write_adapter(tmp_path / "a", tensors, source)))
