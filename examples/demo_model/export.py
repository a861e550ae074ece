"""Write a checkpoint in the original internvl_chat layout: config, weights, tokenizer.

``python -m examples.demo_model.export --run runs/demo --out exported``
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from examples.demo_model.model import DemoConfig, InternVL
from examples.demo_model.tokenizer import SPECIAL, SYSTEM, open_tokenizer
from internvl3_mlx.files import atomic_write
from internvl3_mlx.records.json_values import write_json

MAX_TILES = 4
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def main() -> None:
    """Export a run's newest weights, or fresh random ones when no run is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="training folder; leave out for untrained weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    options = parser.parse_args()
    tokenizer = open_tokenizer((options.run or options.out) / "tokenizer.json")
    torch.manual_seed(0)
    model = InternVL(DemoConfig(tokenizer.get_vocab_size()))
    if options.run:
        model.load_state_dict(torch.load(options.run / "state.pt", weights_only=True)["model"])
    export(model, tokenizer, options.out, dtype=options.dtype, trained=options.run is not None)


def export(model: InternVL, tokenizer: Tokenizer, out: Path, *, dtype: str, trained: bool) -> None:
    """Write configuration, weights and tokenizer into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config_of(model.config, dtype, trained))
    write_json(out / "generation_config.json", {"_from_model_config": True})
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL[1:]),
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_positions,
        },
    )
    weights = {
        name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in model.state_dict().items()
    }
    with atomic_write(out / "model.safetensors") as part:
        save_file(weights, part, metadata={"format": "pt"})


def config_of(c: DemoConfig, dtype: str, trained: bool) -> dict:
    """Describe the model with the key names of the released InternVL3 checkpoints."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "demo_trained": trained,
        "template": "internvl2_5",
        "system_message": SYSTEM,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "force_image_size": c.image_size,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": MAX_TILES,
        "pad2square": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vision_config": vision_config(c, dtype),
        "llm_config": text_config(c, dtype),
    }


def vision_config(c: DemoConfig, dtype: str) -> dict:
    """Describe the tower."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": c.vision_width,
        "num_hidden_layers": c.vision_layers,
        "num_attention_heads": c.vision_heads,
        "intermediate_size": c.vision_mlp,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "num_channels": 3,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "qk_normalization": False,
        "initializer_factor": 1.0,
        "torch_dtype": dtype,
    }


def text_config(c: DemoConfig, dtype: str) -> dict:
    """Describe the decoder."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": c.text_width,
        "num_hidden_layers": c.text_layers,
        "num_attention_heads": c.text_heads,
        "num_key_value_heads": c.text_kv_heads,
        "intermediate_size": c.text_mlp,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_positions,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": dtype,
    }


if __name__ == "__main__":
    main()
