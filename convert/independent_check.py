"""Check our reading of a source against an independent one: transformers, from the raw files.

Comparing a target with its source proves nothing about a config that both read the same wrong way.
Here transformers builds the language model from the raw JSON, the safetensors library reads the
tensors, and the logits of a passage are compared with ours.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.errors import CheckpointError

LIBRARIES = ("torch", "transformers", "safetensors")
CLASSES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}  # by model_type
TEXT_CONFIGS = ("llm_config", "text_config")
PREFIXES = {  # of a stored tensor -> of transformers' language model, the more telling first
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "language_model.": "model.",
    "lm_head.": "lm_head.",
}
MAX_PARAMETERS = 2e9  # of the language model, in float32 in memory
MAX_KL = 1e-3  # nats; a correct reading in float32 stays far below, one in bfloat16 below


def reference_log_probs_text(folder: Path, token_ids: list[int]) -> mx.array | None:
    """Return transformers' log-probabilities after each token but the last: (L - 1, vocab) float32.

    None where a library is missing, the model is quantized, large, or of another family.
    """
    if not all(map(importlib.util.find_spec, LIBRARIES)):
        return None
    # not by our own reader, which this checks
    content = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    text = next((content[key] for key in TEXT_CONFIGS if content.get(key)), None)
    name = CLASSES.get((text or {}).get("model_type", ""))
    if text is None or name is None or content.get("quantization"):
        return None
    return run_transformers(folder, name, text, content, token_ids)


def run_transformers(
    folder: Path, name: str, text: Mapping[str, Any], content: Mapping[str, Any], ids: list[int]
) -> mx.array | None:
    """Build the language model from the raw config and tensors, and run it in float32."""
    import torch
    import transformers

    state = text_state(folder)
    if not state or sum(x.numel() for x in state.values()) > MAX_PARAMETERS:
        return None
    kind = getattr(transformers, name)
    config = kind.config_class(**text)
    tied = "lm_head.weight" not in state
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = kind(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        return None  # names of a version of the family that transformers does not know
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0, :-1]
    return mx.array(torch.log_softmax(logits.float(), dim=-1).numpy())


def text_state(folder: Path) -> dict[str, Any]:
    """Read the language model's tensors as float32 under transformers' names."""
    from safetensors import safe_open

    state: dict[str, Any] = {}
    for file in sorted({info.file for info in open_checkpoint(folder).tensors.values()}):
        if file.suffix != ".safetensors":
            return {}
        with safe_open(str(file), framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118, it is no dictionary
                prefix = next((p for p in PREFIXES if name.startswith(p)), None)
                if prefix is not None:
                    short = PREFIXES[prefix] + name.removeprefix(prefix)
                    state[short] = stream.get_tensor(name).float()
    return state


def check_reading(folder: Path, token_ids: list[int], ours: mx.array) -> float | None:
    """Compare our log-probabilities of a text with transformers'; return the KL divergence.

    None where that is not possible. Raises CheckpointError when they differ.
    """
    theirs = reference_log_probs_text(folder, token_ids)
    if theirs is None or theirs.shape != ours.shape:
        return None
    per_token = (mx.exp(theirs) * (theirs - ours)).sum(axis=-1)
    kl = cast(float, mx.maximum(per_token, 0).mean().item())
    if not kl <= MAX_KL:
        raise CheckpointError(
            f"our reading of {folder} differs from that of transformers (KL {kl:.4f}); nothing was "
            "written; please report its config.json"
        )
    return kl
