"""What was read, on disk: keys and values in the form of mlx-lm's prompt caches (safetensors).

Arrays are named ``layer.part``, metadata as mlx-lm flattens [metadata, class names, scalars].
Our own metadata says what was read, token by token, so that a file that no longer fits a talk only
gives a shorter beginning, never a wrong one.
"""

import base64
import json
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from internvl3_mlx.generation.prompt_cache import HASH_WORDS, CacheKey, PromptCache
from internvl3_mlx.models.cache import KVCache, LayerCache
from internvl3_mlx.models.lora import lora_layers
from internvl3_mlx.models.quantized_cache import QuantizedKVCache, RowQuantizedKVCache

METADATA_KEY = "internvl3_mlx"  # our entry of the metadata
VALUES_PER_TENSOR = 16  # numbers of each tensor that tell models apart
QUANTIZED_PARTS = 3  # weights, scales, biases


def model_fingerprint(model: Any) -> str:
    """Name a model by a few numbers of every tensor: other weights give another name."""
    alone = isinstance(model, nn.Module)
    tensors: Any = tree_flatten(
        model.parameters() if alone else [part.parameters() for part in model]
    )
    scales = [
        layer.scale for part in ([model] if alone else model) for _, layer in lora_layers(part)
    ]
    samples = [
        value.reshape(-1)[:: max(1, value.size // VALUES_PER_TENSOR)].astype(mx.float32)
        for _, value in tensors
    ]
    content = np.array(mx.concatenate(samples)).tobytes()
    content += repr([(name, value.shape) for name, value in tensors]).encode()
    content += repr(getattr(model, "config", None)).encode()
    content += repr(scales).encode() if scales else b""
    return blake2b(content, digest_size=16).hexdigest()


def save_prompt_cache(path: Path, memory: PromptCache, model: str) -> None:
    """Write keys and values to ``path``, whose name must end in .safetensors."""
    arrays: dict[str, mx.array] = {}
    metadata = {
        f"0.{METADATA_KEY}": json.dumps(key_to_json(memory.key, model, memory.uses_dynamic_ntk))
    }
    scalars: list[str] = []
    for at, layer in enumerate(memory.layers):
        if not layer.state:
            continue
        parts, numbers = layer_arrays(layer)
        arrays |= {f"{at}.{name}": part for name, part in parts.items()}
        arrays |= {f"{at}.{name}": mx.array(number) for name, number in numbers.items()}
        scalars += [f"{at}.{name}" for name in numbers]
        metadata[f"1.{at}"] = (KVCache if isinstance(layer, KVCache) else QuantizedKVCache).__name__
    metadata["2.0"] = ""
    for number, name in enumerate(scalars, start=1):
        metadata |= {f"2.{number}.0": name, f"2.{number}.1": "scalar"}
    mx.save_safetensors(str(path), arrays or {"none": mx.zeros(1)}, metadata)


def load_prompt_cache(path: Path, memory: PromptCache, model: str) -> bool:
    """Fill ``memory`` from ``path``; leave it alone and return False when it does not fit."""
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        content = json.loads(metadata[f"0.{METADATA_KEY}"])
        if content["model"] != model:
            return False
        reading = key_from_json(content)
        cache = [
            layer_from_arrays(metadata[f"1.{at}"], at, arrays)
            for at in range(sum(name.startswith("1.") for name in metadata))
        ]
        mx.eval([layer.state for layer in cache])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError):
        return False
    if not cache or any(layer.offset != len(reading) for layer in cache):
        return False
    memory.layers, memory.key, memory.uses_dynamic_ntk = cache, reading, bool(content["stretched"])
    return True


def layer_arrays(layer: LayerCache) -> tuple[dict[str, mx.array], dict[str, int]]:
    """Split a layer as mlx-lm's caches do: keys, values, offset, and of packed ones how.

    Packed rows are written as MLX packs, the same numbers: a file serves wherever it is read.
    """
    if isinstance(layer, RowQuantizedKVCache):
        layer = layer.to_quantized()
    if not isinstance(layer, QuantizedKVCache):
        keys, values = layer.state
        return {"0": keys, "1": values}, {"2": layer.offset}
    state = iter(layer.state)
    names = [(side, list(islice(state, QUANTIZED_PARTS))) for side in "01"]
    parts = {f"{side}.{n}": part for side, found in names for n, part in enumerate(found)}
    return parts, {"2": layer.offset, "3": layer.group_size, "4": layer.bits}


def layer_from_arrays(kind: str, at: int, arrays: dict[str, Any]) -> LayerCache:
    if kind == KVCache.__name__:
        dense = KVCache()
        dense.state = [arrays[f"{at}.0"], arrays[f"{at}.1"]]
        return dense
    if kind != QuantizedKVCache.__name__:
        raise ValueError(f"a cache of kind {kind}")
    group_size, bits = (int(arrays[f"{at}.{n}"].item()) for n in "34")
    packed = QuantizedKVCache(bits, group_size)
    packed.state = [arrays[f"{at}.{side}.{n}"] for side in "01" for n in range(QUANTIZED_PARTS)]
    return packed


def key_to_json(reading: CacheKey, model: str, stretched: bool) -> dict[str, object]:
    return {
        "model": model,
        "stretched": stretched,
        "ids": encode_array(reading.ids),
        "contents": encode_array(reading.image_hashes),
        "positions": encode_array(reading.positions),
    }


def key_from_json(content: dict[str, str]) -> CacheKey:
    contents = decode_array(content["contents"], np.dtype(np.uint64)).reshape(-1, HASH_WORDS)
    ids = decode_array(content["ids"], np.dtype(np.int32))
    positions = decode_array(content["positions"], np.dtype(np.float32))
    if not len(ids) == len(contents) == len(positions):
        raise ValueError("the parts of a reading differ in length")
    return CacheKey(ids, contents, positions)


def encode_array(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def decode_array(text: str, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)
