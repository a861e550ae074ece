"""The settings whose default differs from method to method."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from internvl3_mlx.training.config_fields import MODEL_PARTS, RANDOM

# method -> settings whose default differs from that of sft
PREFERENCE_PRESET: Mapping[str, Any] = MappingProxyType(
    {
        "learning_rate": 5e-6,
        "batch_size": 1,
        "grad_accumulation_steps": 16,
        "max_seq_length": 12288,
    }
)
NO_MPO: Mapping[str, Any] = MappingProxyType({"dpo_weight": 0.0, "bco_weight": 0.0})
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "sft": {},
    "mpo": PREFERENCE_PRESET,
    "dpo": {**PREFERENCE_PRESET, "dpo_weight": 1.0, "bco_weight": 0.0, "sft_weight": 0.0},
    "orpo": {**PREFERENCE_PRESET, **NO_MPO, "orpo_weight": 0.1},
    "simpo": {
        **PREFERENCE_PRESET, **NO_MPO, "sft_weight": 0.0, "simpo_weight": 1.0, "beta": 2.0,
    },
    "kto": {
        **PREFERENCE_PRESET, **NO_MPO, "sft_weight": 0.0, "kto_weight": 1.0,
        "batch_size": 4, "grad_accumulation_steps": 4,
    },
    "grpo": {
        "learning_rate": 1e-5, "batch_size": 1, "grad_accumulation_steps": 8, "lora_dropout": 0.0,
        "beta": 0.0,
    },
    "prm": {},
    "distill": {},
    "pretrain": {
        "train": MODEL_PARTS,
        "packing": True,
        "loss_reduction": "square",
        "v2pe_delta": RANDOM,
        "text_ratio": 0.25,
        "batch_size": 1,
        "grad_accumulation_steps": 8,
    },
})  # fmt: skip
