"""Check our reading of a source against an independent one: transformers, from the raw files.

Comparing a target with its source proves nothing about a config that both read the same wrong way.
Here transformers builds the whole model from the raw JSON and the raw tensors, and the logits of a
question about an image and of a passage are compared with ours.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.raw_files import RawPart, read_raw_config, read_raw_parts
from internvl3_mlx.errors import CheckpointError

LIBRARIES = ("torch", "transformers")
TEXT_TYPES = {  # model_type of a language model -> transformers' class for it
    **{name: name for name in ("qwen2", "qwen3")},
    **dict.fromkeys(("llama", "internlm2", "internlm3"), "llama"),
}
TEXT_CONFIGS = ("llm_config", "text_config")
VISION_KEYS = {  # of the original layout -> transformers' key, and the original's default
    "hidden_size": ("hidden_size", None),
    "num_hidden_layers": ("num_hidden_layers", None),
    "num_attention_heads": ("num_attention_heads", None),
    "intermediate_size": ("intermediate_size", None),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "qkv_bias": ("attention_bias", False),
    "qk_normalization": ("use_qk_norm", True),
}
MODULES = {  # the beginning of a neutral name -> of transformers' name
    "text.embedding": "model.language_model.embed_tokens",
    "text.norm": "model.language_model.norm",
    "text.head": "lm_head",
    "tower.patch": "model.vision_tower.embeddings.patch_embeddings.projection",
    "projector.norm": "model.multi_modal_projector.layer_norm",
    "projector.1": "model.multi_modal_projector.linear_1",
    "projector.2": "model.multi_modal_projector.linear_2",
}
BARE = {
    "tower.class": "model.vision_tower.embeddings.cls_token",
    "tower.position": "model.vision_tower.embeddings.position_embeddings",
}
TEXT_MODULES = {
    **{part: f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
TOWER_MODULES = {
    **{part: f"attention.{part}_proj" for part in "qkv"},
    **{f"{part}_norm": f"attention.{part}_norm" for part in "qk"},
    "o": "attention.projection_layer",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of R, G and B
MAX_PARAMETERS, BYTES_PER_PARAMETER = 2.5e9, 4  # of the model, in float32 in memory
MEMORY_SHARE = 0.4  # of the machine's memory that it may take
MAX_KL = 1e-3  # nats; a correct reading in float32 stays far below, one in bfloat16 below


def reference_log_probs(
    folder: Path, samples: Sequence[CalibrationSample], image_id: int
) -> list[mx.array] | None:
    """Return transformers' log-probabilities after each scored token: (K, vocab) float32 each.

    None where a library is missing, or the model is quantized, large, of another family, or one
    that transformers would compute in another way.
    """
    if not all(map(importlib.util.find_spec, LIBRARIES)):
        return None
    content = read_raw_config(folder)
    config = model_config(content, image_id)
    parts = read_raw_parts(folder)
    if config is None or content.get("quantization") or not parts or not fits(parts):
        return None
    return run_transformers(config, parts, samples)


def fits(parts: Mapping[str, RawPart]) -> bool:
    """Tell whether a model is small enough to be run whole in float32."""
    count = sum(part.weight.data.shape[1] * len(part.rows) for part in parts.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return count < MAX_PARAMETERS and count * BYTES_PER_PARAMETER < MEMORY_SHARE * memory


def model_config(content: Mapping[str, Any], image_id: int) -> dict[str, Any] | None:
    """Return the config of transformers' InternVL for a raw config.json; None if it has none."""
    parts = (content[key] for key in TEXT_CONFIGS if content.get(key))
    text: Mapping[str, Any] = next(parts, {})
    kind = TEXT_TYPES.get(text.get("model_type", ""))
    if kind is None:
        return None
    text = {**text, "model_type": kind}
    if content["model_type"] == "internvl":
        return {**content, "text_config": text, "image_token_id": image_id}
    if content.get("ps_version") != "v2":
        return None
    given = content["vision_config"]
    vision = {
        name: given[key] if given.get(key) is not None else default
        for key, (name, default) in VISION_KEYS.items()
    }
    layer = content.get("select_layer")
    return {
        "model_type": "internvl",
        "text_config": text,
        "vision_config": {**vision, "model_type": "internvl_vision", "hidden_act": "gelu"},
        "downsample_ratio": content.get("downsample_ratio", 0.5),
        "vision_feature_layer": -1 if layer is None else layer,
        "image_token_id": image_id,
        "tie_word_embeddings": False,
    }


def run_transformers(
    config: dict[str, Any], parts: Mapping[str, RawPart], samples: Sequence[CalibrationSample]
) -> list[mx.array] | None:
    """Build the model from the raw config and tensors, and run it in float32."""
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    settings = InternVLConfig(**{k: v for k, v in config.items() if k != "model_type"})
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(settings)
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    state = {}
    for neutral, part in parts.items():
        name = module_name(neutral)
        if name in expected:
            state[name] = torch.from_numpy(part_values(part, expected[name]))
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected or len(state) < len(parts):
        return None  # of a version of the family that transformers does not know
    language = model.model.language_model
    language.rotary_emb = type(language.rotary_emb)(settings.text_config)
    model.eval()
    return [run_sample(model, sample) for sample in samples]


def run_sample(model: Any, sample: CalibrationSample) -> mx.array:
    """Return the log-probabilities after the scored tokens of one sample: (K, vocab)."""
    import torch

    pixels = None
    if sample.tiles is not None:
        mean, deviation = (np.array(x, np.float32) for x in IMAGENET)
        normalized = (sample.tiles.astype(np.float32) / 255 - mean) / deviation
        pixels = torch.from_numpy(np.ascontiguousarray(normalized.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        ids = torch.tensor([sample.token_ids])
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, sample.first_scored : -1]
    return mx.array(torch.log_softmax(logits.float(), dim=-1).numpy())


def module_name(neutral: str) -> str | None:
    """Translate a neutral name to transformers'; None for an unknown one."""
    base, _, kind = neutral.rpartition(".")
    if base in BARE:
        return BARE[base]
    if base in MODULES:
        return f"{MODULES[base]}.{kind}"
    part, number, name = base.split(".")
    if part == "text":
        return f"model.language_model.layers.{number}.{TEXT_MODULES[name]}.{kind}"
    prefix = f"model.vision_tower.encoder.layer.{number}."
    if name.startswith("scale"):
        return f"{prefix}lambda_{name.removeprefix('scale')}"
    return f"{prefix}{TOWER_MODULES[name]}.{kind}"


def part_values(part: RawPart, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values of a part in PyTorch's order of axes."""
    values = part.weight.rows(part.rows)
    stored = (len(part.rows), *part.weight.shape[1:])
    if stored != shape and len(stored) == len(shape) == 4:  # noqa: PLR2004, patches of MLX
        return np.ascontiguousarray(values.reshape(stored).transpose(0, 3, 1, 2))
    return np.ascontiguousarray(values.reshape(shape))


def check_reading(
    folder: Path, samples: Sequence[CalibrationSample], ours: Sequence[mx.array], image_id: int
) -> float | None:
    """Compare our log-probabilities of some samples with transformers'; return the largest KL.

    None where that is not possible. Raises CheckpointError when they differ.
    """
    theirs = reference_log_probs(folder, samples, image_id)
    if theirs is None or [x.shape for x in theirs] != [x.shape for x in ours]:
        return None
    largest = 0.0
    for expected, actual in zip(theirs, ours, strict=True):
        per_token = (mx.exp(expected) * (expected - actual)).sum(axis=-1)
        kl = cast(float, mx.maximum(per_token, 0).mean().item())
        if not kl <= MAX_KL:
            raise CheckpointError(
                f"our reading of {folder} differs from that of transformers (KL {kl:.4f}); nothing "
                "was written; please report its config.json"
            )
        largest = max(largest, kl)
    return largest
