"""Ranks read their slices alone: together they hold the checkpoint, each about its share."""

import mlx.core as mx
import pytest
from fixtures.shards import divisible
from fixtures.tiny import Bits
from mlx.utils import tree_flatten

from internvl3_mlx.checkpoints import shard_reader
from internvl3_mlx.checkpoints.build_model import assemble_model
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.distributed.shard import Shard
from internvl3_mlx.errors import UserError
from internvl3_mlx.loading.build import load_local_model
from internvl3_mlx.models.shard_layout import tensor_part

LAYOUTS = {
    "original": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bin": {"form": "bin"},
    "hf": {"layout": "hf_b"},
    "shards": {"shards": 3},
    "4 bits": {"layout": "mlx", "bits": Bits(group_size=32)},
    "internlm2's wqkv": {"style": "9b"},
    "internlm2's wqkv, bfloat16": {"style": "9b", "dtype": "bfloat16"},
    "an expert a tensor": {"style": "qwen3_moe"},
    "stacked experts": {"style": "qwen3_moe", "layout": "hf_saved"},
    "quantized experts": {"style": "qwen3_moe", "layout": "mlx", "bits": Bits(group_size=32)},
    "transposed experts": {"style": "gpt_oss"},
    "experts with biases": {"style": "gpt_oss", "layout": "mlx", "bits": Bits(group_size=32)},
}


def parameters(model):
    found: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    return dict(found)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parts_of_all_ranks_are_the_checkpoint(tmp_path, layout, size):
    divisible(tmp_path, **LAYOUTS[layout])
    whole = parameters(assemble_model(tmp_path).model)
    ranks = [parameters(assemble_model(tmp_path, shard=Shard(r, size)).model) for r in range(size)]
    for name, x in whole.items():
        for rank, parts in enumerate(ranks):
            own = tensor_part(name, x.shape, rank, size)
            expected = x if own is None else own.take(x)
            assert parts[name].dtype == x.dtype
            assert mx.array_equal(parts[name], expected), name
    assert whole.keys() == ranks[0].keys()


def test_mxfp4_experts_are_cut_as_their_words(tmp_path):
    """The bytes of stored blocks, four to a word, are cut between groups of 32 numbers."""
    blocks = mx.random.randint(0, 256, (3, 8, 4, 16)).astype(mx.uint8)  # 3 experts of 8 rows
    name = "language_model.model.layers.0.mlp.experts.down_proj_blocks"
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {name: blocks})
    checkpoint = open_checkpoint(tmp_path)
    rows = (shard_reader.RowRange(name, 0, 24),)
    words = blocks.reshape(3, 8, 64).view(mx.uint32)
    target = "language_model.model.layers.0.mlp.experts.down_proj.weight"
    for rank in range(4):
        own = tensor_part(target, words.shape, rank, 4)
        read = shard_reader.PartReader(checkpoint).read(rows, words.shape, own)
        assert mx.array_equal(read, own.take(words))


@pytest.mark.parametrize("size", [2, 4])
def test_the_peak_is_the_share_and_one_tensor(tmp_path, size):
    """Counted by MLX; what NumPy holds beside it is a part of one tensor, see below."""
    divisible(tmp_path, layout="mlx", bits=Bits(group_size=32))
    checkpoint = open_checkpoint(tmp_path)
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = assemble_model(tmp_path, dtype="float32", shard=Shard(size - 1, size)).model
    mx.eval([x for name, x in parameters(model).items() if is_part(name)])
    share = sum(x.nbytes for name, x in parameters(model).items() if is_part(name))
    assert share <= mx.get_peak_memory() - before <= share + largest


def is_part(name):
    return tensor_part(name, (840, 840, 840), 1, 2) is not None


def test_only_the_slices_are_read(tmp_path, monkeypatch):
    divisible(tmp_path)
    read = []
    original = shard_reader.PartReader.read_rows

    def recorded(self, rows, columns):
        found = original(self, rows, columns)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(shard_reader.PartReader, "read_rows", recorded)
    parts = parameters(assemble_model(tmp_path, shard=Shard(0, 4)).model)
    assert sum(read) == sum(x.nbytes for name, x in parts.items() if is_part(name))


def test_what_cannot_be_divided_is_refused_before_it_is_read(tmp_path, monkeypatch):
    divisible(tmp_path)
    monkeypatch.setattr(shard_reader.PartReader, "read", None)
    with pytest.raises(UserError, match="among 3 ranks.*use 1, 2 or 4 ranks"):
        load_local_model(tmp_path, shard=Shard(0, 3))
