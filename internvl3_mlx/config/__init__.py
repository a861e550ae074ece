"""Model configuration: ``config.json`` of any layout, in one form."""

from internvl3_mlx.config.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    WORD_BITS,
    ExpertsConfig,
    Layout,
    ModelConfig,
    Quantization,
    QuantizationPlan,
    TextConfig,
    VisionConfig,
)
from internvl3_mlx.config.read import parse_config, read_config
from internvl3_mlx.config.rope import RopeScaling

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "WORD_BITS",
    "ExpertsConfig",
    "Layout",
    "ModelConfig",
    "Quantization",
    "QuantizationPlan",
    "RopeScaling",
    "TextConfig",
    "VisionConfig",
    "parse_config",
    "read_config",
]
