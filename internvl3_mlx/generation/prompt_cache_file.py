"""A prompt cache on disk, in the layout of mlx-lm's prompt caches (safetensors).

Arrays are named ``layer.part``; metadata is flattened as mlx-lm does: [metadata, class names,
scalars]. Our own metadata holds the cache key, token by token, so that a file that no longer fits a
conversation only gives a shorter prefix, never a wrong one.
"""

import base64
import json
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from internvl3_mlx.checkpoints.reader import (
    METADATA,
    TensorInfo,
    read_header,
    read_json_header,
)
from internvl3_mlx.config import TextConfig
from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.generation.generation_config import KV_BITS, KV_GROUP_SIZES
from internvl3_mlx.generation.prompt_cache import HASH_WORDS, CacheKey, PromptCache
from internvl3_mlx.json_files import parse_json
from internvl3_mlx.models.cache import KVCache, LayerCache
from internvl3_mlx.models.cache_kind import CacheKind, format_of
from internvl3_mlx.models.kv_segment import DENSE, QuantizedFormat, RowFormat
from internvl3_mlx.models.lora import lora_layers
from internvl3_mlx.models.quantized_cache import QuantizedKVCache

METADATA_KEY = "internvl3_mlx"  # our entry in the metadata
MAX_HEADER_BYTES = 100 * 2**20  # what safetensors allows
VALUES_PER_TENSOR = 16  # sampled from each tensor to tell models apart
CACHE_ERRORS = (
    CheckpointError, OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError,
    RecursionError, MemoryError, AttributeError, ArithmeticError,
)  # fmt: skip
QUANTIZED_PARTS = 3  # weights, scales, biases
SCALAR_TYPES, FLOAT_TYPES = ("I32",), ("F32", "F16", "BF16")
WORD_BITS = 32  # of the integers that hold quantized values


def model_fingerprint(model: nn.Module | Sequence[nn.Module]) -> str:
    """Identify a model, or a sequence of modules, by a few values of every tensor."""
    modules = [model] if isinstance(model, nn.Module) else model
    tensors: Any = tree_flatten(
        model.parameters()
        if isinstance(model, nn.Module)
        else [module.parameters() for module in model]
    )
    scales = [layer.scale for module in modules for _, layer in lora_layers(module)]
    samples = [
        value.reshape(-1)[:: max(1, value.size // VALUES_PER_TENSOR)].astype(mx.float32)
        for _, value in tensors
    ]
    content = np.array(mx.concatenate(samples)).tobytes()
    content += repr([(name, value.shape) for name, value in tensors]).encode()
    content += repr(getattr(model, "config", None)).encode()
    content += repr(scales).encode() if scales else b""
    return blake2b(content, digest_size=16).hexdigest()


def save_prompt_cache(path: Path, cache: PromptCache, fingerprint: str) -> None:
    """Write keys and values to ``path``, whose name must end in .safetensors."""
    arrays: dict[str, mx.array] = {}
    metadata = {
        f"0.{METADATA_KEY}": json.dumps(key_to_json(cache.key, fingerprint, cache.uses_dynamic_ntk))
    }
    scalars: list[str] = []
    for index, layer in enumerate(cache.layers):
        if not layer.state:
            continue
        parts, numbers = layer_arrays(layer)
        arrays |= {f"{index}.{name}": part for name, part in parts.items()}
        arrays |= {f"{index}.{name}": mx.array(number) for name, number in numbers.items()}
        scalars += [f"{index}.{name}" for name in numbers]
        metadata[f"1.{index}"] = (
            KVCache if format_of(layer) == DENSE else QuantizedKVCache
        ).__name__
    metadata["2.0"] = ""
    for number, name in enumerate(scalars, start=1):
        metadata |= {f"2.{number}.0": name, f"2.{number}.1": "scalar"}
    mx.save_safetensors(str(path), arrays or {"none": mx.zeros(1)}, metadata)


def is_prompt_cache(path: Path) -> bool:
    """Return whether the file's header says that we wrote it."""
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(size, MAX_HEADER_BYTES)))
        return f"0.{METADATA_KEY}" in header["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def load_prompt_cache(path: Path, cache: PromptCache, fingerprint: str, config: TextConfig) -> bool:
    """Fill ``cache`` from ``path``; return False and change nothing when it does not fit.

    config: the language model's. Everything is checked in the header before any array is read.
    """
    if not path.is_file():
        return False
    try:
        header, _ = read_json_header(path, path.stat().st_size)
        content = parse_json(header[METADATA][f"0.{METADATA_KEY}"].encode())
        if content["model"] != fingerprint:
            return False
        key, uses_dynamic_ntk = key_from_json(content), content["uses_dynamic_ntk"]
        quantized = is_quantized(header[METADATA], config)
        check_arrays({info.name: info for info in read_header(path)}, quantized, len(key), config)
        arrays: Any = mx.load(str(path))
        layers = [
            layer_from_arrays(arrays, index, quantized) for index in range(config.num_hidden_layers)
        ]
        if any(layer.offset != len(key) for layer in layers) or type(uses_dynamic_ntk) is not bool:
            return False
        mx.eval([layer.state for layer in layers])
    except CACHE_ERRORS:
        return False
    cache.layers, cache.key, cache.uses_dynamic_ntk = layers, key, uses_dynamic_ntk
    return True


def is_quantized(metadata: dict[str, str], config: TextConfig) -> bool:
    """Tell which class all layers have; raise ValueError for another class or a mixture."""
    [kind] = {metadata[f"1.{index}"] for index in range(config.num_hidden_layers)}
    if kind not in (KVCache.__name__, QuantizedKVCache.__name__):
        raise ValueError(f"unknown cache class {kind}")
    return kind == QuantizedKVCache.__name__


def check_arrays(
    found: dict[str, TensorInfo], quantized: bool, length: int, config: TextConfig
) -> None:
    """Raise ValueError unless a file holds just the arrays of ``length`` tokens of the model."""
    heads, width = (1, config.num_key_value_heads, length), config.head_dim
    expected = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]()
    for layer in range(config.num_hidden_layers):
        expected[f"{layer}.2"] = (), SCALAR_TYPES
        if not quantized:
            expected |= {f"{layer}.{side}": ((*heads, width), FLOAT_TYPES) for side in "01"}
            continue
        expected |= {f"{layer}.{number}": ((), SCALAR_TYPES) for number in "34"}
        words, groups = found[f"{layer}.0.0"].shape[-1], found[f"{layer}.0.1"].shape[-1]
        if words * WORD_BITS // width not in KV_BITS or width // groups not in KV_GROUP_SIZES:
            raise ValueError(f"layer {layer} is quantized in an unknown way")
        for side in "01":
            expected[f"{layer}.{side}.0"] = (*heads, words), ("U32",)
            expected |= {f"{layer}.{side}.{n}": ((*heads, groups), FLOAT_TYPES) for n in "12"}
    if found.keys() != expected.keys():
        raise ValueError("a cache holds other arrays than the model has layers")
    for name, (shape, types) in expected.items():
        if found[name].shape != shape or found[name].dtype not in types:
            raise ValueError(f"{name} has the shape {found[name].shape}")


def layer_arrays(layer: LayerCache) -> tuple[dict[str, mx.array], dict[str, int]]:
    """Split a layer as mlx-lm's caches do: keys, values, offset, and how it is quantized.

    The row layout is written as MLX's own, with the same values, so that any machine can read it.
    """
    form = format_of(layer)
    if isinstance(form, RowFormat):
        form = QuantizedFormat(form.bits, form.group_size)
    layer = CacheKind(form).adopt(layer)
    if not isinstance(layer, QuantizedKVCache):
        keys, values = layer.state
        return {"0": keys, "1": values}, {"2": layer.offset}
    state = iter(layer.state)
    names = [(side, list(islice(state, QUANTIZED_PARTS))) for side in "01"]
    parts = {f"{side}.{n}": part for side, found in names for n, part in enumerate(found)}
    return parts, {"2": layer.offset, "3": layer.group_size, "4": layer.bits}


def layer_from_arrays(arrays: dict[str, Any], index: int, quantized: bool) -> LayerCache:
    """Make a layer of arrays whose shapes have been checked."""
    if not quantized:
        plain = KVCache()
        plain.state = [arrays[f"{index}.0"], arrays[f"{index}.1"]]
        return plain
    words, scales = (arrays[f"{index}.0.{n}"].shape[-1] for n in "01")
    group_size, bits = (int(arrays[f"{index}.{n}"].item()) for n in "34")
    if words * WORD_BITS != scales * group_size * bits:
        raise ValueError(f"layer {index} is not quantized as it says")
    layer = QuantizedKVCache(bits, group_size)
    layer.state = [arrays[f"{index}.{side}.{n}"] for side in "01" for n in range(QUANTIZED_PARTS)]
    return layer


def key_to_json(key: CacheKey, fingerprint: str, uses_dynamic_ntk: bool) -> dict[str, object]:
    return {
        "model": fingerprint,
        "uses_dynamic_ntk": uses_dynamic_ntk,
        "ids": encode_array(key.ids),
        "image_hashes": encode_array(key.image_hashes),
        "positions": encode_array(key.positions),
    }


def key_from_json(content: dict[str, str]) -> CacheKey:
    hashes = decode_array(content["image_hashes"], np.dtype(np.uint64)).reshape(-1, HASH_WORDS)
    ids = decode_array(content["ids"], np.dtype(np.int32))
    positions = decode_array(content["positions"], np.dtype(np.float32))
    if not len(ids) == len(hashes) == len(positions):
        raise ValueError("the arrays of a cache key differ in length")
    return CacheKey(ids, hashes, positions)


def encode_array(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def decode_array(text: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)
