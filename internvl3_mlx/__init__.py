"""InternVL3 vision-language models on Apple silicon, in MLX.

Importing the package is nearly free: each public name brings its module along on first use.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internvl3_mlx.conversion import convert_model
    from internvl3_mlx.convert.api import ConversionProgress, ConversionResult
    from internvl3_mlx.errors import (
        CheckpointError,
        ConfigError,
        DownloadError,
        ImageError,
        InternVL3Error,
        KeyMapError,
        MissingExtraError,
        PromptError,
        UserError,
    )
    from internvl3_mlx.generation.answer import Answer, AnswerChunk
    from internvl3_mlx.generation.conversation import Conversation
    from internvl3_mlx.generation.generation_config import GenerationConfig, GenerationOptions
    from internvl3_mlx.generation.processor import ModelInputs
    from internvl3_mlx.prompt.messages import Message, MessageMedia
    from internvl3_mlx.test_time_scaling.best_of import BestOfResult
    from internvl3_mlx.test_time_scaling.critic import Critic
    from internvl3_mlx.training.config import TrainConfig
    from internvl3_mlx.training.run import train
    from internvl3_mlx.vlm import VLM, generate, load, load_critic, stream_generate

    __version__: str

__all__ = [
    "VLM",
    "Answer",
    "AnswerChunk",
    "BestOfResult",
    "CheckpointError",
    "ConfigError",
    "Conversation",
    "ConversionProgress",
    "ConversionResult",
    "Critic",
    "DownloadError",
    "GenerationConfig",
    "GenerationOptions",
    "ImageError",
    "InternVL3Error",
    "KeyMapError",
    "Message",
    "MessageMedia",
    "MissingExtraError",
    "ModelInputs",
    "PromptError",
    "TrainConfig",
    "UserError",
    "__version__",
    "convert_model",
    "generate",
    "load",
    "load_critic",
    "stream_generate",
    "train",
]

HOMES = {
    "VLM": "vlm",
    "Answer": "generation.answer",
    "Conversation": "generation.conversation",
    "ConversionProgress": "convert.api",
    "ConversionResult": "convert.api",
    "ModelInputs": "generation.processor",
    "MessageMedia": "prompt.messages",
    "AnswerChunk": "generation.answer",
    "GenerationConfig": "generation.generation_config",
    "GenerationOptions": "generation.generation_config",
    "Message": "prompt.messages",
    "convert_model": "conversion",
    "generate": "vlm",
    "load": "vlm",
    "load_critic": "vlm",
    "BestOfResult": "test_time_scaling.best_of",
    "Critic": "test_time_scaling.critic",
    "stream_generate": "vlm",
    "TrainConfig": "training.config",
    "train": "training.run",
}

# convert/ and metal_kernels/ are folders beside this one, and links in it lead there. An sdist has
# no links, and some archives and checkouts have text files in their place: then look beside.
_HERE = os.path.dirname(os.path.abspath(__file__))
if not all(os.path.isdir(os.path.join(_HERE, name)) for name in ("convert", "metal_kernels")):
    __path__.append(os.path.dirname(_HERE))


def __getattr__(name: str) -> object:
    """Find a public name in its module, and keep it here for the next time."""
    if name == "__version__":
        value: object = _version()
    elif name in HOMES:
        value = getattr(import_module(f"internvl3_mlx.{HOMES[name]}"), name)
    elif name in __all__:
        value = getattr(import_module("internvl3_mlx.errors"), name)
    else:
        raise AttributeError(f"module 'internvl3_mlx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("internvl3-mlx")
    except PackageNotFoundError:
        return "0+checkout"  # imported from a checkout that was never installed
