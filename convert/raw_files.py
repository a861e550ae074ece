"""Read checkpoints a second time, by code that shares nothing with the readers it is to check.

Headers are parsed with ``struct`` and ``json``, rows are NumPy views of the files, quantized rows
are unpacked bit by bit, and names are translated to neutral ones by the tables below: each part of
the model once, queries, keys and values apart.
"""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.integer[Any]]
Values = NDArray[np.floating[Any]]

ELEMENTS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32}
DENSE = ("F32", "F16", "BF16")
RELATIVE_ERROR = {"F32": 0.0, "F16": 2**-10, "BF16": 2**-7}  # of a value rounded to the type
ABSOLUTE_ERROR = {"F32": 0.0, "F16": 2**-24, "BF16": 0.0}  # of the smallest values
QUANTIZATION_KEYS = ("quantization", "quantization_config")

TEXT = r"(?:(?:model\.)?language_model\.)?(?:model\.)?"
TEXT_LAYER = TEXT + r"layers\.(?P<n>\d+)\."
TOWER = r"(?:(?:model\.)?vision_tower|vision_model)\."
TOWER_LAYER = TOWER + r"encoder\.layers?\.(?P<n>\d+)\."
PROJECTOR = r"(?:mlp1\.|(?:model\.)?multi_modal_projector\.)"
ROUTER_POOLING = r"pooling_before_gating\."
NEUTRAL = (  # pattern of a published name -> neutral name; parts that are joined, in their order
    (TEXT + r"(?:embed_tokens|tok_embeddings)", "text.embedding"),
    (TEXT + r"norm", "text.norm"),
    (r"(?:language_model\.)?(?:lm_head|output)", "text.head"),
    (TEXT_LAYER + r"self_attn\.(?P<part>[qkvo])_proj", "text.{n}.{part}"),
    (TEXT_LAYER + r"self_attn\.(?P<part>[qk])_norm", "text.{n}.{part}_norm"),
    (TEXT_LAYER + r"attention\.wqkv", "text.{n}.q text.{n}.k text.{n}.v"),
    (TEXT_LAYER + r"attention\.wo", "text.{n}.o"),
    (TEXT_LAYER + r"(?:mlp\.gate_proj|feed_forward\.w1)", "text.{n}.gate"),
    (TEXT_LAYER + r"(?:mlp\.up_proj|feed_forward\.w3)", "text.{n}.up"),
    (TEXT_LAYER + r"(?:mlp\.down_proj|feed_forward\.w2)", "text.{n}.down"),
    (TEXT_LAYER + r"mlp\.gate", "text.{n}.router"),
    (
        TEXT_LAYER + r"mlp\.experts\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj",
        "text.{n}.expert{expert}.{part}",
    ),
    (TEXT_LAYER + r"mlp\.switch_mlp\.(?P<part>gate|up|down)_proj", "text.{n}.expert*.{part}"),
    (TEXT_LAYER + r"(?:input_layernorm|attention_norm)", "text.{n}.norm1"),
    (TEXT_LAYER + r"(?:post_attention_layernorm|ffn_norm)", "text.{n}.norm2"),
    (TOWER + r"embeddings\.(?:class_embedding|cls_token)", "tower.class"),
    (TOWER + r"embeddings\.(?:patch_embedding|patch_embeddings\.projection)", "tower.patch"),
    (TOWER + r"embeddings\.position_embeddings?", "tower.position"),
    (TOWER_LAYER + r"attn\.qkv", "tower.{n}.q tower.{n}.k tower.{n}.v"),
    (TOWER_LAYER + r"attention\.(?P<part>[qkv])_proj", "tower.{n}.{part}"),
    (TOWER_LAYER + r"(?:attn|attention)\.(?P<part>[qk])_norm", "tower.{n}.{part}_norm"),
    (TOWER_LAYER + r"(?:attn\.proj|attention\.projection_layer)", "tower.{n}.o"),
    (TOWER_LAYER + r"mlp\.fc(?P<part>[12])", "tower.{n}.fc{part}"),
    (TOWER_LAYER + r"(?:ls|lambda_)(?P<part>[12])", "tower.{n}.scale{part}"),
    (TOWER_LAYER + r"(?:norm1|layernorm_before)", "tower.{n}.norm1"),
    (TOWER_LAYER + r"(?:norm2|layernorm_after)", "tower.{n}.norm2"),
    (PROJECTOR + r"(?:0|layer_norm)", "projector.norm"),
    (PROJECTOR + r"(?:1|linear_1)", "projector.1"),
    (PROJECTOR + r"(?:3|linear_2)", "projector.2"),
    (r"mlp2\.(?P<part>[0147])", "compressing.{part}"),
    (ROUTER_POOLING + r"query_token", "pooling.query"),
    (ROUTER_POOLING + r"attn(?P<n>[12])\.out_proj", "pooling.{n}.o"),
    (ROUTER_POOLING + r"norm(?P<n>[12])", "pooling.{n}.norm"),
    (ROUTER_POOLING + r"attn(?P<n>[12])\.in_proj_(?P<part>weight|bias)", "pooling.{n}.in_{part}"),
    (r"gating\.block(?P<n>[1-4])\.(?P<part>[035])", "gating.{n}.{part}"),
    (r"gating\.gate\.(?P<part>[01])", "gating.gate.{part}"),
)
STACKED = re.compile(r"\.mlp\.switch_mlp\.")
BARE = re.compile(
    r".*\.(?:class_embedding|cls_token|position_embeddings?|ls[12]|lambda_[12]|query_token"
    r"|in_proj_(?:weight|bias))"
)
NAMES = tuple((re.compile(pattern), neutral) for pattern, neutral in NEUTRAL)


@dataclass(frozen=True)
class RawTensor:
    """A tensor of a file: ``count`` rows of ``shape[1:]``, mapped from the disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[Any]

    def rows(self, numbers: Rows) -> Values:
        """Return some rows as float32: (len(numbers), columns)."""
        found: NDArray[Any] = np.asarray(self.data[numbers])
        if self.dtype == "BF16":
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32)


@dataclass(frozen=True)
class RawPart:
    """One part of the model: some rows of a tensor, quantized or not.

    rows: the numbers of its rows in the tensor. quantization: bits and group size, or None.
    """

    weight: RawTensor
    rows: Rows
    quantization: tuple[int, int] | None = None
    scales: RawTensor | None = None
    biases: RawTensor | None = None

    def read(self, chosen: Rows) -> tuple[Values, Values]:
        """Return the chosen rows of the part and the error that each value may have."""
        numbers = self.rows[chosen]
        if self.quantization is None or self.scales is None or self.biases is None:
            x = self.weight.rows(numbers)
            kind = self.weight.dtype
            return x, np.abs(x) * RELATIVE_ERROR[kind] + ABSOLUTE_ERROR[kind]
        bits, group = self.quantization
        words = np.ascontiguousarray(self.weight.data[numbers])
        stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
        levels = stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))
        scales, biases = (
            np.repeat(x.rows(numbers), group, axis=1) for x in (self.scales, self.biases)
        )
        rounding = RELATIVE_ERROR[self.scales.dtype] * (np.abs(biases) + np.abs(scales) * 2**bits)
        return (levels * scales + biases).astype(np.float32), 1.01 * np.abs(scales) + rounding


def read_raw_config(folder: Path) -> dict[str, Any]:
    """Read config.json as it is."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8-sig"))
    return content


def read_raw_tensors(folder: Path) -> Iterator[RawTensor]:
    """Map the tensors of a folder's safetensors files, those of its index where there is one."""
    index = folder / "model.safetensors.index.json"
    names = {path.name for path in folder.glob("[!.]*.safetensors")}
    if index.is_file():
        names = set(json.loads(index.read_text("utf-8-sig"))["weight_map"].values())
    for file in (folder / name for name in sorted(names)):
        if file.name.startswith("adapter"):
            continue
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in ELEMENTS:
                continue
            shape = tuple(entry["shape"])
            rows = shape[0] * shape[1] if STACKED.search(name) else shape[0] if shape else 1
            flat = (rows, -1)
            begin, end = entry["data_offsets"]
            kind = np.dtype(ELEMENTS[entry["dtype"]])
            mapped = np.memmap(
                file, kind, "r", 8 + length + begin, ((end - begin) // kind.itemsize,)
            )
            yield RawTensor(name, entry["dtype"], shape, mapped.reshape(flat))


def read_raw_parts(folder: Path) -> dict[str, RawPart]:
    """Return the parts of a checkpoint by neutral names; those that cannot be compared left out.

    None at all for a checkpoint with adapters inside, whose weights are not what it computes.
    """
    config = read_raw_config(folder)
    tensors = {t.name.removeprefix("base_model.model."): t for t in read_raw_tensors(folder)}
    if any(".lora_" in name for name in tensors):
        return {}
    found: dict[str, RawPart] = {}
    for name, tensor in tensors.items():
        module, _, kind = (name, "", "weight") if BARE.fullmatch(name) else name.rpartition(".")
        if kind not in ("weight", "bias") or (neutral := neutral_names(module)) is None:
            continue
        part = RawPart(tensor, np.arange(len(tensor.data)))
        if tensor.dtype == "U32":
            quantization = raw_quantization(config, module)
            if quantization is None or f"{module}.biases" not in tensors:
                continue
            scales, biases = (tensors[f"{module}.{x}"] for x in ("scales", "biases"))
            part = RawPart(tensor, part.rows, quantization, scales, biases)
        for own, rows in split_rows(neutral, part, config, grouped=module.endswith("wqkv")):
            found[f"{own}.{kind}"] = RawPart(
                part.weight, rows, part.quantization, part.scales, part.biases
            )
    return found


def neutral_names(module: str) -> list[str] | None:
    """Translate a module's name; None for one of an unknown kind."""
    for pattern, neutral in NAMES:
        if match := pattern.fullmatch(module):
            return neutral.format(**match.groupdict()).split()
    return None


def split_rows(
    names: list[str], part: RawPart, config: dict[str, Any], *, grouped: bool
) -> Iterator[tuple[str, Rows]]:
    """Yield each part of a joined tensor with the numbers of its rows."""
    if "*" in names[0]:  # the experts one under the other
        for expert, rows in enumerate(np.split(part.rows, part.weight.shape[0])):
            yield names[0].replace("*", str(expert)), rows
    elif len(names) == 1:
        yield names[0], part.rows
    elif not grouped:
        yield from zip(names, np.split(part.rows, len(names)), strict=True)
    else:  # for each key-value head its queries, its key and its value
        text = config.get("llm_config") or config["text_config"]
        keys = text.get("num_key_value_heads") or text["num_attention_heads"]
        shared = text["num_attention_heads"] // keys
        heads = part.rows.reshape(keys, shared + 2, -1)
        yield names[0], heads[:, :shared].reshape(-1)
        yield names[1], heads[:, shared].reshape(-1)
        yield names[2], heads[:, shared + 1].reshape(-1)


def raw_quantization(config: dict[str, Any], module: str) -> tuple[int, int] | None:
    """Return a module's bits and group size; None if it is not in MLX's affine mode."""
    table = next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), None)
    if table is None:
        return None
    own = table.get(module)
    entry = {**table, **own} if isinstance(own, dict) else table
    if entry.get("mode", "affine") != "affine":
        return None
    return entry["bits"], entry["group_size"]
