"""The published sizes, from headers alone, have the published counts in every layout."""

import re
from math import prod
from pathlib import Path

import pytest
from fixtures.published_sizes import SIZES, chat_config, write_headers
from mlx.utils import tree_flatten

from internvl3_mlx.checkpoints.reader import open_checkpoint, parameters_by_part
from internvl3_mlx.checkpoints.remap import (
    plan_remap,
    resolve_rows,
    source_heights,
    stacked_shape,
)
from internvl3_mlx.config import parse_config, read_config
from internvl3_mlx.config.decoders import FAMILIES
from internvl3_mlx.config.published import PUBLISHED_SIZES
from internvl3_mlx.convert.plan import select_modules
from internvl3_mlx.convert.recipes import uniform_recipe
from internvl3_mlx.models.internvl import InternVL

DISK_LIMIT = 2_000_000


CASES = [
    (name, layout)
    for name, size in SIZES.items()
    for layout in ("original", "hf", "mlx")
    if not size.experts or (layout, name) == ("original", "3.5-30b-a3b")  # 18,000 tensors
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_published_parameters_and_tensors(tmp_path, name, layout):
    size = SIZES[name]
    file = write_headers(tmp_path, size, layout)
    checkpoint = open_checkpoint(tmp_path)
    config, rules = plan_remap(checkpoint, read_config(tmp_path))
    parts = parameters_by_part(checkpoint, config)
    assert sum(part.parameters for part in parts.values()) == size.parameters
    assert checkpoint.nbytes == 2 * size.parameters
    expected = size.hf_tensors if layout == "hf" else size.tensors
    assert expected is None or len(checkpoint.tensors) == expected
    assert file.stat().st_blocks * 512 < DISK_LIMIT * (4 if size.experts else 1)
    assert config.num_image_token == 256
    assert not config.text.tie_word_embeddings
    tensors = checkpoint.tensors
    ours = {
        target: stacked_shape(target, sum(part.count for part in parts), (), config.text)
        for rule in rules
        for target, parts in zip(
            rule.targets,
            resolve_rows(rule, source_heights(rule, tensors), config.text),
            strict=True,
        )
    }
    model = InternVL(config, image_id=0)  # lazily: nothing of it is computed
    assert ours == {
        name: x.shape[: 2 if "switch_mlp" in name else 1]
        for name, x in tree_flatten(model.parameters())
    }


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_sizes_has_the_parameters_of_the_models(name):
    size, published = SIZES[name], PUBLISHED_SIZES[name]
    model = InternVL(parse_config(chat_config(size)), image_id=0)
    counts = {path: prod(x.shape) for path, x in tree_flatten(model.parameters())}
    assert published.parameters == sum(counts.values()) == size.parameters
    experts = sum(count for path, count in counts.items() if "switch_mlp" in path)
    idle = experts - experts * size.per_token // max(size.experts, 1)
    assert published.active == size.parameters - idle


GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
}
ROW = re.compile(r"^\| `([\w.-]+)` \| \S+ \| \S+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.M)


def published_config(name):
    if name != "3.5-20b-a4b":
        return parse_config(chat_config(SIZES[name]))
    return parse_config(chat_config(SIZES["3.5-8b"]) | {"llm_config": GPT_OSS})


def gigabytes(config):
    """Compute the weights at 16 bits, and as the default recipe stores them."""
    leaves = tree_flatten(InternVL(config, image_id=0).parameters())
    chosen, _ = select_modules(config, uniform_recipe(4))
    dense = {path: 2 * prod(x.shape) for path, x in leaves}
    small = {  # half a byte for each weight, and 16 bits twice for each group
        path: nbytes * (chosen[module].bits + 32 / chosen[module].group_size) / 16
        for path, nbytes in dense.items()
        if path.endswith(".weight") and (module := path.removesuffix(".weight")) in chosen
    }
    return sum(dense.values()) / 1e9, sum((dense | small).values()) / 1e9


def test_the_guide_states_computed_sizes():
    page = (Path(__file__).parents[2] / "docs/guide/models.md").read_text("utf-8")
    rows = {name: cells for name, *cells in ROW.findall(page)}
    assert rows.keys() == PUBLISHED_SIZES.keys()
    for name, (model, *stated) in rows.items():
        config = published_config(name)
        assert model.startswith(FAMILIES[config.text.family].title), name
        assert stated == [f"{size:,.1f} GB" for size in gigabytes(config)], name
