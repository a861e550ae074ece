"""Read, map, pack, write: a checkpoint of any layout becomes an MLX one that loads here and in
mlx-vlm."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.config import ModelConfig, Quantization, read_config
from internvl3_mlx.convert.arrange import arrange, arranged
from internvl3_mlx.convert.checkpoint import open_checkpoint, write_tensors, writing_folder
from internvl3_mlx.convert.quantize import Recipe, fitting
from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL

METADATA = {"format": "mlx"}
TRAVELLING = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
)  # tokenizer files, templates, licences
STAYING = {"config.json"}
PACKED_PARTS = ("weight", "scales", "biases")  # the mx formats have no biases
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "internlm3": "InternLM2ForCausalLM"}
TOP_KEYS = (
    "select_layer",
    "downsample_ratio",
    "ps_version",
    "force_image_size",
    "dynamic_image_size",
    "use_thumbnail",
    "min_dynamic_patch",
    "max_dynamic_patch",
    "template",
    "system_message",
)


@dataclass(frozen=True)
class Written:
    """One tensor done: how far the conversion has come."""

    name: str
    done: int
    total: int


def convert(source: Path, target: Path, recipe: Recipe | None) -> Iterator[Written]:
    """Convert ``source`` into the new folder ``target``, yielding as each tensor is written.

    Tensors stream: no more than one shard is in memory. Stopped halfway, nothing is left behind.
    """
    checkpoint = open_checkpoint(source)
    config, moves = arrange(checkpoint, read_config(source))
    if recipe is not None and config.quantization is not None:
        raise UserError(f"{source} is quantized already; convert the 16-bit checkpoint instead")
    packed = {} if recipe is None else packable(config, recipe)
    with writing_folder(target) as aside:
        tensors = pack(arranged(checkpoint, config, moves), packed)
        total = len({name for move in moves for name in move.targets}) + 2 * len(packed)
        for done, name in enumerate(write_tensors(aside, tensors, METADATA), start=1):
            yield Written(name, done, total)
        content = chat_config(source, config, packed)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (aside / "config.json").write_text(text, encoding="utf-8")
        copy_side_files(source, aside)


def packable(config: ModelConfig, recipe: Recipe) -> dict[str, Quantization]:
    """Walk our module tree (nothing is allocated) and ask the recipe of every module that can be
    packed."""
    choose = fitting(recipe.choose)
    leaves = tree_flatten(InternVL(config, image_id=0).leaf_modules(), is_leaf=nn.Module.is_module)
    chosen = {path: choose(path, module) for path, module in dict(leaves).items()}
    return {path: form for path, form in chosen.items() if form is not None}


def pack(
    tensors: Iterable[tuple[str, mx.array]], packed: Mapping[str, Quantization]
) -> Iterator[tuple[str, mx.array]]:
    """Quantize the weights of the chosen modules as they pass."""
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        form = packed.get(module) if name.endswith(".weight") else None
        if form is None:
            yield name, tensor
            continue
        parts = mx.quantize(tensor, group_size=form.group_size, bits=form.bits, mode=form.mode)
        yield from zip((f"{module}.{part}" for part in PACKED_PARTS), parts, strict=False)


def chat_config(
    source: Path, config: ModelConfig, packed: Mapping[str, Quantization]
) -> dict[str, Any]:
    """Write ``config.json`` of the internvl_chat form. An original's own keys are kept, whatever
    they say."""
    own = json.loads((source / "config.json").read_text(encoding="utf-8"))
    content = own if own["model_type"] == "internvl_chat" else original_form(config)
    content = {key: value for key, value in content.items() if key != "auto_map"} | {
        "format": "mlx"
    }
    if packed:
        content["quantization"] = content["quantization_config"] = quantization_table(packed)
    return content


def quantization_table(packed: Mapping[str, Quantization]) -> dict[str, Any]:
    """State the commonest packing as the default and each other module by its path."""
    [(default, _)] = Counter(packed.values()).most_common(1)
    others = {path: asdict(form) for path, form in packed.items() if form != default}
    return {**asdict(default), **others}


def original_form(config: ModelConfig) -> dict[str, Any]:
    """Say in the original's words what a native config said."""
    vision, text = asdict(config.vision), asdict(config.text)
    factor = text.pop("rope_dynamic_factor")
    family = text.pop("family")
    text["architectures"] = [ARCHITECTURES[family]]
    text["rope_scaling"] = {"type": "dynamic", "factor": factor} if factor else None
    top = asdict(config)
    kept = {key: top[key] for key in TOP_KEYS}
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "vision_config": {"model_type": "intern_vit_6b", **vision},
        "llm_config": text,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": config.dtype,
        **kept,
    }


def copy_side_files(source: Path, target: Path) -> None:
    """Let tokenizer files, templates and licences travel along."""
    for pattern in TRAVELLING:
        for file in source.glob(pattern):
            if file.name not in STAYING and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)
