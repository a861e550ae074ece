"""``config.json`` with the keys of the layout that is written."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from internvl3_mlx.checkpoints.keymap import LANGUAGE_LAYOUT
from internvl3_mlx.config import ModelConfig, Quantization
from internvl3_mlx.config.decoders import FAMILIES, FULL, SLIDING
from internvl3_mlx.config.foreign import visible_files
from internvl3_mlx.convert.language_part import language_modules, with_mlx_lm_keys
from internvl3_mlx.convert.plan import ConversionPlan
from internvl3_mlx.json_files import read_json
from internvl3_mlx.prompt.messages import Message, TextSegment
from internvl3_mlx.prompt.template import load_template
from internvl3_mlx.prompt.tokenizer import Tokenizer

Json = dict[str, Any]

AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}
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
SYSTEM_TURN = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", re.DOTALL)
LORA_KEYS = ("use_llm_lora", "use_backbone_lora")
MLX_KEYS = ("quantization", "quantization_config", "format")
PART_KEYS = ("vision_config", "llm_config", "text_config")
DTYPE_KEYS = ("torch_dtype", "dtype")


def build_config(plan: ConversionPlan, tokenizer: Tokenizer, dtype: str | None) -> Json:
    """Build the config of the plan's layout. Unknown keys of the source are kept where the layout
    stays."""
    own = read_json(plan.source / "config.json")
    writers = {
        "mlx": mlx_config,
        "original": original_config,
        "hf": hf_config,
        LANGUAGE_LAYOUT: language_config,
    }
    content = writers[plan.layout](own, plan, tokenizer)
    if any(key in content for key in LORA_KEYS):
        content |= dict.fromkeys(LORA_KEYS, 0)  # the adapters are merged now
    return replace_dtype(content, dtype) if dtype else content


def mlx_config(own: Json, plan: ConversionPlan, tokenizer: Tokenizer) -> Json:
    """Build the config that this package and mlx-vlm read."""
    content = own if own["model_type"] == "internvl_chat" else original_from_hf(plan.config)
    dropped = {"auto_map", *MLX_KEYS}
    content = {key: value for key, value in content.items() if key not in dropped}
    content["format"] = "mlx"
    content["image_token_index"] = tokenizer.image_id  # mlx-vlm's name for it
    if plan.quantized:
        content["quantization"] = content["quantization_config"] = quantization_config(
            plan.quantized
        )
    return content


def language_config(_: Json, plan: ConversionPlan, tokenizer: Tokenizer) -> Json:
    """Build the config of the language model alone, which mlx-lm reads."""
    content = with_mlx_lm_keys(hf_text_config(plan.config, tokenizer), plan.config.text)
    if modules := language_modules(plan.quantized):
        content["quantization"] = content["quantization_config"] = quantization_config(modules)
    return content


def quantization_config(quantized: Mapping[str, Quantization]) -> Json:
    """Give the most common quantization as the default, and every other module by its path."""
    [(default, _)] = Counter(quantized.values()).most_common(1)
    others = {path: asdict(q) for path, q in quantized.items() if q != default}
    return {**asdict(default), **others}


def original_config(own: Json, plan: ConversionPlan, _: Tokenizer) -> Json:
    """Build the config that OpenGVLab's remote code reads; it refers to that code on the hub."""
    chat = own["model_type"] == "internvl_chat"
    content = dict(own) if chat else original_from_hf(plan.config)
    content = {key: value for key, value in content.items() if key not in MLX_KEYS}
    if "llm_config" not in content and "text_config" in content:
        content["llm_config"] = content.pop("text_config")
    if not content.get("template"):
        content["template"] = "internvl2_5"
        content["system_message"] = content.get("system_message") or own_system_text(plan)
    has_code = bool(visible_files(plan.source, "modeling_*.py"))
    if "auto_map" not in content or not has_code:
        repo = FAMILIES[plan.config.text.family].remote_code
        content["auto_map"] = {kind: f"{repo}--{name}" for kind, name in AUTO_MAP.items()}
    return content


def own_system_text(plan: ConversionPlan) -> str | None:
    """Return the system text that the source's own chat template writes, if any."""
    segments = load_template(plan.config, plan.source).render([Message("user", "?")], None)
    first = segments[0]
    found = SYSTEM_TURN.match(first.text) if isinstance(first, TextSegment) else None
    return found[1] if found else None


def original_from_hf(config: ModelConfig) -> Json:
    """Translate a config of the hf layout to the keys of the original layout."""
    vision, text = asdict(config.vision), text_keys(config)
    family = FAMILIES[text.pop("family")]
    text["architectures"], text["model_type"] = [family.architecture], family.original_type
    text["torch_dtype"] = config.dtype
    top = asdict(config)
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "vision_config": {
            "model_type": "intern_vit_6b",
            "architectures": ["InternVisionModel"],
            "num_channels": 3,
            "hidden_act": "gelu",
            **vision,
        },
        "llm_config": {"hidden_act": "silu", **text},
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": config.dtype,
        **{key: top[key] for key in TOP_KEYS},
    }


def text_keys(config: ModelConfig) -> Json:
    """Return the language model's fields under the keys that files have, and ``family``.

    What the family says by itself (norms, sinks, the names of parts) is no key.
    """
    text = {key: x for key, x in asdict(config.text).items() if key not in SAID_BY_FAMILY}
    text["rope_scaling"] = config.text.rope_scaling.to_dict()
    names, experts = FAMILIES[config.text.family].experts, config.text.experts
    if names is not None and experts is not None:
        text[names.count[0]], text[names.per_token] = experts.count, experts.per_token
        text[names.intermediate_size] = experts.intermediate_size
        if names.renormalize is not None:
            text[names.renormalize] = experts.renormalize
    if windows := config.text.windows:
        text["layer_types"] = [SLIDING if window else FULL for window in windows]
        text["sliding_window"] = next(filter(None, windows), None)
    return text


SAID_BY_FAMILY = ("o_bias", "qk_norm", "sinks", "windows", "experts")


def hf_config(own: Json, plan: ConversionPlan, tokenizer: Tokenizer) -> Json:
    """Build the config that transformers' InternVL classes read, from version 4.52 on."""
    if own["model_type"] == "internvl":
        return {key: value for key, value in own.items() if key not in MLX_KEYS}
    config = plan.config
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": config.downsample_ratio,
        "image_seq_length": config.num_image_token,
        "image_token_id": tokenizer.image_id,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "vision_config": hf_vision_config(config),
        "text_config": hf_text_config(config, tokenizer),
    }


def hf_vision_config(config: ModelConfig) -> Json:
    """Build transformers' InternVLVisionConfig."""
    vision = config.vision
    return {
        "model_type": "internvl_vision",
        "architectures": ["InternVisionModel"],
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "intermediate_size": vision.intermediate_size,
        "image_size": [vision.image_size] * 2,
        "patch_size": [vision.patch_size] * 2,
        "num_channels": 3,
        "attention_bias": vision.qkv_bias,
        "use_qk_norm": vision.qk_normalization,
        "norm_type": vision.norm_type,
        "layer_norm_eps": vision.layer_norm_eps,
        "layer_scale_init_value": 0.1,
        "hidden_act": "gelu",
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,  # transformers' name for no norm after the last layer
    }


def hf_text_config(config: ModelConfig, tokenizer: Tokenizer) -> Json:
    """Build transformers' config of the language model."""
    text = text_keys(config)
    family = FAMILIES[text.pop("family")]
    bias = text.pop("qkv_bias")
    return {
        **text,
        **({"attention_bias": bias} if not family.qkv_bias else {}),  # Qwen2 has no such key
        "model_type": family.hf_type,
        "architectures": [family.hf_architecture],
        "hidden_act": "silu",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.im_end_id,
        "torch_dtype": config.dtype,
        "use_cache": True,
    }


def replace_dtype(content: Json, dtype: str) -> Json:
    """Replace the dtype wherever the config names one."""
    named = {key: dtype if key in DTYPE_KEYS else value for key, value in content.items()}
    return {
        key: replace_dtype(value, dtype) if isinstance(value, dict) and key in PART_KEYS else value
        for key, value in named.items()
    }
