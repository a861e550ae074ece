"""Random checkpoints in the layout that OpenGVLab publishes, which both programs read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmarks.vocabulary import ADDED, FEW_MERGES, IMAGE_TOKEN, QWEN_MERGES, write_tokenizer
from internvl3_mlx.config import read_config
from internvl3_mlx.models.internvl import InternVL

BYTES = 256
HEAD_DIM = 64
STANDARD_DEVIATION = 0.05  # of the random weights: large enough that no two logits are equal
PATCH_WEIGHT = "vision_model.embeddings.patch_embedding.weight"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths and depths of a checkpoint. Tiles are always the real 448 pixels in patches of 14.

    vision_6b: the 6B tower's norms and heads. key_heads, hidden: 0 for a quarter of the query heads
    and four times the width.
    """

    vision_width: int = 256
    vision_layers: int = 6
    vision_6b: bool = False
    text_width: int = 128
    text_layers: int = 4
    head_dim: int = HEAD_DIM
    key_heads: int = 0
    hidden: int = 0
    merges: int = QWEN_MERGES

    @property
    def text_heads(self) -> int:
        return max(2, self.text_width // self.head_dim)


SHAPES = {
    "photo": Shape(),
    "deep": Shape(vision_width=64, vision_layers=1, text_layers=24, merges=FEW_MERGES),
    "heavy": Shape(
        vision_width=512, vision_layers=8, text_width=768, text_layers=8, merges=FEW_MERGES
    ),
    "balanced": Shape(text_width=512, text_layers=8, merges=FEW_MERGES),
    "server": Shape(
        vision_width=128, vision_layers=2, text_width=512, text_layers=8, merges=FEW_MERGES
    ),
    # the real widths, a few layers of them
    "tower 1024": Shape(
        vision_width=1024, vision_layers=3, text_width=64, text_layers=1, merges=FEW_MERGES
    ),
    "tower 3200": Shape(
        vision_width=3200,
        vision_layers=1,
        vision_6b=True,
        text_width=64,
        text_layers=1,
        merges=FEW_MERGES,
    ),
    "decoder 1b": Shape(
        vision_width=64,
        vision_layers=1,
        text_width=896,
        text_layers=4,
        key_heads=2,
        hidden=4864,
        merges=FEW_MERGES,
    ),
    "decoder 8b": Shape(
        vision_width=64,
        vision_layers=1,
        text_width=3584,
        text_layers=1,
        head_dim=128,
        key_heads=4,
        hidden=18944,
        merges=FEW_MERGES,
    ),
    "tiny": Shape(vision_width=64, vision_layers=1, text_layers=1, merges=FEW_MERGES),
}


def write_checkpoint(folder: Path, shape: Shape) -> Path:
    """Write a float32 checkpoint of ``shape`` into ``folder``, unless it exists."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, shape.merges)
    content = config(shape, ids)
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    (folder / "generation_config.json").write_text("{}", encoding="utf-8")
    weights = random_weights(folder, ids[IMAGE_TOKEN])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


def random_weights(folder: Path, image_id: int) -> dict[str, mx.array]:
    """Return random weights for every tensor, under the published names and shapes."""
    mx.random.seed(0)
    model = InternVL(read_config(folder), image_id)
    weights = {
        name: mx.random.normal(x.shape) * STANDARD_DEVIATION if x.ndim > 1 or "bias" in name else x
        for name, x in tree_flatten(model.parameters())
    }
    weights[PATCH_WEIGHT] = mx.contiguous(weights[PATCH_WEIGHT].transpose(0, 3, 1, 2))
    return weights


def config(shape: Shape, ids: dict[str, int]) -> dict[str, Any]:
    """Return config.json of the original layout, plus the one key that mlx-vlm takes from
    elsewhere."""
    end = ids["<|im_end|>"]
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internvl2_5",
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "force_image_size": 448,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "image_token_index": ids[IMAGE_TOKEN],
        "eos_token_id": end,
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_size": shape.vision_width,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_width // (128 if shape.vision_6b else HEAD_DIM),
            "intermediate_size": 4 * shape.vision_width,
            "image_size": 448,
            "patch_size": 14,
            "num_channels": 3,
            "layer_norm_eps": 1e-6,
            "norm_type": "rms_norm" if shape.vision_6b else "layer_norm",
            "qkv_bias": not shape.vision_6b,
            "qk_normalization": shape.vision_6b,
            "drop_path_rate": 0.0,
        },
        "llm_config": {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": shape.text_width,
            "num_hidden_layers": shape.text_layers,
            "num_attention_heads": shape.text_heads,
            "num_key_value_heads": shape.key_heads or max(1, shape.text_heads // 4),
            "intermediate_size": shape.hidden or 4 * shape.text_width,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "vocab_size": BYTES + shape.merges + len(ADDED),
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "eos_token_id": end,
            "torch_dtype": "float32",
        },
    }
