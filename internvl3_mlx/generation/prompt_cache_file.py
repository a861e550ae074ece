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

from internvl3_mlx.generation.prompt_cache import KEY_WORDS, Memory, Reading
from internvl3_mlx.models.cache import Cache, KVCache, QuantizedKVCache
from internvl3_mlx.models.lora import adapters

OURS = "internvl3_mlx"  # our entry of the metadata
SAMPLES = 16  # numbers of each tensor that tell models apart
PACKED_PARTS = 3  # weights, scales, biases


def fingerprint(model: Any) -> str:
    """Name a model by a few numbers of every tensor: other weights give another name."""
    alone = isinstance(model, nn.Module)
    tensors: Any = tree_flatten(
        model.parameters() if alone else [part.parameters() for part in model]
    )
    scales = [layer.scale for part in ([model] if alone else model) for _, layer in adapters(part)]
    samples = [
        value.reshape(-1)[:: max(1, value.size // SAMPLES)].astype(mx.float32)
        for _, value in tensors
    ]
    content = np.array(mx.concatenate(samples)).tobytes()
    content += repr([(name, value.shape) for name, value in tensors]).encode()
    content += repr(getattr(model, "config", None)).encode()
    content += repr(scales).encode() if scales else b""
    return blake2b(content, digest_size=16).hexdigest()


def write_prefix(path: Path, memory: Memory, model: str) -> None:
    """Write keys and values to ``path``, whose name must end in .safetensors."""
    arrays: dict[str, mx.array] = {}
    metadata = {f"0.{OURS}": json.dumps(described(memory.reading, model, memory.stretched))}
    scalars: list[str] = []
    for at, layer in enumerate(memory.cache):
        if not layer.state:
            continue
        parts, numbers = layer_parts(layer)
        arrays |= {f"{at}.{name}": part for name, part in parts.items()}
        arrays |= {f"{at}.{name}": mx.array(number) for name, number in numbers.items()}
        scalars += [f"{at}.{name}" for name in numbers]
        metadata[f"1.{at}"] = (KVCache if isinstance(layer, KVCache) else QuantizedKVCache).__name__
    metadata["2.0"] = ""
    for number, name in enumerate(scalars, start=1):
        metadata |= {f"2.{number}.0": name, f"2.{number}.1": "scalar"}
    mx.save_safetensors(str(path), arrays or {"none": mx.zeros(1)}, metadata)


def read_prefix(path: Path, memory: Memory, model: str) -> bool:
    """Fill ``memory`` from ``path``; leave it alone and return False when it does not fit."""
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        content = json.loads(metadata[f"0.{OURS}"])
        if content["model"] != model:
            return False
        reading = reading_of(content)
        cache = [
            restored(metadata[f"1.{at}"], at, arrays)
            for at in range(sum(name.startswith("1.") for name in metadata))
        ]
        mx.eval([layer.state for layer in cache])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError):
        return False
    if not cache or any(layer.offset != len(reading) for layer in cache):
        return False
    memory.cache, memory.reading, memory.stretched = cache, reading, bool(content["stretched"])
    return True


def layer_parts(layer: Cache) -> tuple[dict[str, mx.array], dict[str, int]]:
    """Split a layer as mlx-lm's caches do: keys, values, offset, and of packed ones how.

    Packed rows are written as MLX packs, the same numbers: a file serves wherever it is read.
    """
    if isinstance(layer, KVCache):
        keys, values = layer.kept
        return {"0": keys, "1": values}, {"2": layer.offset}
    kept = iter(layer.kept)
    names = [(side, list(islice(kept, PACKED_PARTS))) for side in "01"]
    parts = {f"{side}.{n}": part for side, found in names for n, part in enumerate(found)}
    return parts, {"2": layer.offset, "3": layer.group_size, "4": layer.bits}


def restored(kind: str, at: int, arrays: dict[str, Any]) -> Cache:
    if kind == KVCache.__name__:
        dense = KVCache()
        dense.restore([arrays[f"{at}.0"], arrays[f"{at}.1"]])
        return dense
    if kind != QuantizedKVCache.__name__:
        raise ValueError(f"a cache of kind {kind}")
    group_size, bits = (int(arrays[f"{at}.{n}"].item()) for n in "34")
    packed = QuantizedKVCache(bits, group_size)
    packed.restore([arrays[f"{at}.{side}.{n}"] for side in "01" for n in range(PACKED_PARTS)])
    return packed


def described(reading: Reading, model: str, stretched: bool) -> dict[str, object]:
    return {
        "model": model,
        "stretched": stretched,
        "ids": packed_text(reading.ids),
        "contents": packed_text(reading.contents),
        "positions": packed_text(reading.positions),
    }


def reading_of(content: dict[str, str]) -> Reading:
    contents = unpacked(content["contents"], np.dtype(np.uint64)).reshape(-1, KEY_WORDS)
    ids = unpacked(content["ids"], np.dtype(np.int32))
    positions = unpacked(content["positions"], np.dtype(np.float32))
    if not len(ids) == len(contents) == len(positions):
        raise ValueError("the parts of a reading differ in length")
    return Reading(ids, contents, positions)


def packed_text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def unpacked(text: str, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)
