"""Thousands of damaged JSON files of every kind: each is read, or refused in one line of ours."""

import json
import random
import struct
import time
from pathlib import Path

import pytest
from fixtures.damaged_checkpoints import copied
from fixtures.mutants import mutate
from fixtures.tiny import Recipe

from internvl3_mlx.adapters.peft import read_adapter_config
from internvl3_mlx.checkpoints.reader import read_header, read_index
from internvl3_mlx.config import read_config
from internvl3_mlx.errors import InternVL3Error
from internvl3_mlx.prompt.jinja_template import read_jinja
from internvl3_mlx.prompt.tokenizer_files import (
    bos_token,
    eos_token,
    eos_token_ids,
    read_added_tokens,
)

MUTANTS, SECONDS, LONGEST_MESSAGE = 1500, 60, 10_000


def header_of(file):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def check(read, seed, write, content):
    """Read every mutant; only our own errors, in one line, and no hang."""
    rng, started, refused = random.Random(seed), time.process_time(), 0
    for _ in range(MUTANTS):
        data = mutate(content, rng)
        write(data)
        message = ""
        try:
            read()
        except InternVL3Error as error:
            refused += 1
            message = str(error)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} for {data[:3000]!r}") from error
        assert "\n" not in message, data[:300]
        assert len(message) < LONGEST_MESSAGE, data[:300]
    assert refused > MUTANTS // 10
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("layout", ["original", "hf_a", "mlx"])
def test_config_json(tmp_path, layout):
    folder = copied(Recipe(layout=layout), tmp_path)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    if layout == "mlx":
        content["quantization"] = {"bits": 4, "group_size": 64, "mlp1.1": {"bits": 8}, "x": False}
    check(lambda: read_config(folder), layout, file.write_bytes, content)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_processor_files(tmp_path, name):
    folder = copied(Recipe(layout="hf_a"), tmp_path)
    table = {
        "min_patches": 1, "max_patches": 12, "size": {"height": 56, "width": 56}, "resample": 3,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_resize": True,
        "rescale_factor": 1 / 255,
    }  # fmt: skip
    content = {"image_processor": table} if name == "processor_config.json" else table
    check(lambda: read_config(folder), name, (folder / name).write_bytes, content)


TOKENIZER_FILES = {
    "generation_config.json": {"eos_token_id": [5, 6], "temperature": 0.3, "do_sample": True},
    "added_tokens.json": {"<img>": 401, "</img>": 402, "<a>": 7},
    "chat_template.json": {"chat_template": "{{ messages[0]['content'] }} image"},
    "tokenizer_config.json": {
        "added_tokens_decoder": {"400": {"content": "<a>", "special": True, "lstrip": False}},
        "bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "{{ messages }} image"}],
        "model_max_length": 8192,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_tokenizer_and_generation_files(tmp_path, name):
    def read():
        list(eos_token_ids(tmp_path))
        read_added_tokens(tmp_path)
        bos_token(tmp_path, default=True)
        eos_token(tmp_path)
        read_jinja(tmp_path, None)

    check(read, name, (tmp_path / name).write_bytes, TOKENIZER_FILES[name])


def test_index(tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    content = {
        "metadata": {"total_size": 9},
        "weight_map": {f"a.{n}": "b.safetensors" for n in range(9)},
    }
    check(lambda: read_index(file), "index", file.write_bytes, content)


def test_safetensors_header(tmp_path):
    file = copied(Recipe(), tmp_path) / "model.safetensors"
    header, data = header_of(file)
    some = dict(sorted(header.items(), key=lambda entry: entry[1].get("data_offsets", [0])[0])[:12])
    end = max(entry.get("data_offsets", [0, 0])[1] for entry in some.values())
    target = Path(tmp_path / "x.safetensors")

    def write(text):
        target.write_bytes(struct.pack("<Q", len(text)) + text + data[:end])

    check(lambda: read_header(target), "header", write, some)


def test_adapter_config(tmp_path):
    file = tmp_path / "adapter_config.json"
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
               "init_lora_weights": True, "alpha_pattern": {"q_proj": 3}}  # fmt: skip
    check(lambda: read_adapter_config(file), "adapter", file.write_bytes, content)
