"""Read ``config.json`` of any layout into a ``ModelConfig``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from internvl3_mlx.config.foreign import (
    check_quantization_method,
    describe_folder,
)
from internvl3_mlx.config.model import (
    ModelConfig,
    Quantization,
    QuantizationPlan,
    TextConfig,
    VisionConfig,
)
from internvl3_mlx.errors import CheckpointError, ConfigError

Json = Mapping[str, Any]

TEXT_FAMILIES = {  # the name of the decoder in config.json -> our implementation of it
    "qwen2": "qwen2",
    "Qwen2ForCausalLM": "qwen2",
    "internlm2": "internlm3",
    "InternLM2ForCausalLM": "internlm3",
    "internlm3": "internlm3",
    "InternLM3ForCausalLM": "internlm3",
    "llama": "internlm3",
    "LlamaForCausalLM": "internlm3",
}
FAMILY_HAS_QKV_BIAS = {"qwen2": True, "internlm3": False}


def read_config(folder: Path) -> ModelConfig:
    """Read and normalize ``config.json`` of a checkpoint folder.

    Raises CheckpointError if there is none, ConfigError if it is not an InternVL3 model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        if foreign := describe_folder(folder):
            raise CheckpointError(foreign)
        raise CheckpointError(
            f"no config.json in {folder}; a model folder holds config.json and *.safetensors files"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object; download it again")
    check_quantization_method(content, folder)
    return parse_config(content)


def parse_config(content: Json) -> ModelConfig:
    """Normalize the content of a ``config.json`` of any layout."""
    kind = content.get("model_type")
    try:
        if kind == "internvl_chat":
            return _chat_config(content)
        if kind == "internvl":
            return _hf_config(content)
    except KeyError as error:
        raise ConfigError(
            f"config.json has no {error.args[0]!r}, which an InternVL3 config requires"
        ) from error
    except TypeError as error:
        raise ConfigError(f"config.json has a value of the wrong type: {error}") from error
    raise ConfigError(
        f"model_type is {kind!r}; expected internvl_chat or internvl, as in InternVL3 checkpoints"
    )


def _chat_config(content: Json) -> ModelConfig:
    vision = _select_fields(content["vision_config"], VisionConfig)
    text = content.get("llm_config") or content.get("text_config") or {}
    plan = _parse_quantization(content)
    converted = plan is not None or content.get("format") == "mlx"
    named = _select_fields(
        content, ModelConfig, skip={"layout", "vision", "text", "quantization", "dtype", "trained"}
    )
    system = content.get("system_message")
    return ModelConfig(
        **{**named, "system_message": system if isinstance(system, str) and system else None},
        **{}
        if "force_image_size" in named
        else {"force_image_size": vision.get("image_size", 448)},
        layout="mlx" if converted else "original",
        vision=VisionConfig(**vision),
        text=_text_config(text, tied=bool(content.get("tie_word_embeddings", False))),
        quantization=plan,
        trained=content.get("demo_trained", True),
        dtype=_dtype(content, text),
    )


def _hf_config(content: Json) -> ModelConfig:
    """Read the transformers layout, which always uses up to 12 tiles and a thumbnail."""
    vision = content["vision_config"]
    mapped = {ours: vision[theirs] for ours, theirs in HF_VISION_FIELDS.items() if theirs in vision}
    mapped |= {
        key: _square_side(mapped[key]) for key in ("image_size", "patch_size") if key in mapped
    }
    text = content["text_config"]
    layer = content.get("vision_feature_layer", -1)
    return ModelConfig(
        layout="hf",
        vision=VisionConfig(**(HF_VISION_DEFAULTS | mapped)),
        text=_text_config(text, tied=bool(content.get("tie_word_embeddings", False))),
        select_layer=layer[0] if isinstance(layer, list) else layer,
        downsample_ratio=content.get("downsample_ratio", 0.5),
        ps_version="v2",
        force_image_size=mapped.get("image_size", 448),
        dynamic_image_size=True,
        use_thumbnail=True,
        max_dynamic_patch=12,
        quantization=_parse_quantization(content),
        dtype=_dtype(content, text),
    )


HF_VISION_FIELDS = {  # our field -> transformers'
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
HF_VISION_DEFAULTS: dict[str, Any] = {
    "norm_type": "layer_norm",
    "qkv_bias": False,
    "qk_normalization": False,
}


def _text_config(text: Json, *, tied: bool) -> TextConfig:
    name = (text.get("architectures") or [None])[0] or text.get("model_type")
    family = TEXT_FAMILIES.get(str(name)) or TEXT_FAMILIES.get(text.get("model_type", ""))
    if family is None:
        raise ConfigError(f"the language model is {name!r}; expected Qwen2, InternLM2 or InternLM3")
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    heads, width = text["num_attention_heads"], text["hidden_size"]
    natural = width // heads if isinstance(width, int) and isinstance(heads, int) and heads else 0
    known = _select_fields(
        text, TextConfig, skip={"family", "tie_word_embeddings", "rope_dynamic_factor", "qkv_bias"}
    )
    filled = {
        "head_dim": natural,
        "num_key_value_heads": heads,
        "rope_theta": rope.get("rope_theta", 10000.0),
    }
    dynamic = (rope.get("rope_type") or rope.get("type")) == "dynamic"
    return TextConfig(
        **{**filled, **{key: value for key, value in known.items() if value is not None}},
        family=family,
        rope_dynamic_factor=float(rope.get("factor", 1.0)) if dynamic else None,
        tie_word_embeddings=tied,
        qkv_bias=FAMILY_HAS_QKV_BIAS[family]
        or bool(text.get("attention_bias") or text.get("qkv_bias")),
    )


def _parse_quantization(content: Json) -> QuantizationPlan | None:
    """Read ``quantization``; ``quantization_config`` is a copy of it."""
    table = content.get("quantization") or content.get("quantization_config")
    if not table:
        return None
    if "bits" not in table or "group_size" not in table:
        raise ConfigError(
            f"config.json has a quantization without bits or group_size, {dict(table)}; only "
            "checkpoints quantized by MLX can be loaded"
        )
    modules: dict[str, Quantization | Literal[False]] = {
        path: _parse_quantization_entry(entry, table) if isinstance(entry, Mapping) else False
        for path, entry in table.items()
        if isinstance(entry, Mapping) or entry is False
    }
    return QuantizationPlan(_parse_quantization_entry(table, {}), modules)


def _parse_quantization_entry(entry: Json, default: Json) -> Quantization:
    merged = {**default, **entry}
    return Quantization(
        bits=merged["bits"], group_size=merged["group_size"], mode=merged.get("mode", "affine")
    )


def _select_fields(
    content: Json, kind: type, skip: frozenset[str] | set[str] = frozenset()
) -> dict[str, Any]:
    """Select the fields of ``kind`` that the file has; published configs hold many others."""
    names = set(kind.__dataclass_fields__) - set(skip)  # type: ignore[attr-defined]
    return {name: content[name] for name in names if name in content}


def _square_side(size: int | list[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConfigError(f"vision_config has the size {size}; expected square tiles and patches")
    return sides.pop()


def _dtype(content: Json, text: Json) -> str:
    name = (
        content.get("torch_dtype")
        or content.get("dtype")
        or text.get("torch_dtype")
        or text.get("dtype")
    )
    return str(name or "bfloat16").removeprefix("torch.")
