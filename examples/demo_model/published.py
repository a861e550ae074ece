"""Fill the recipe's PyTorch model with the weights of a converted checkpoint."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = "model.safetensors"
PATCH = "vision_model.embeddings.patch_embedding.weight"


def published_weights(folder: Path) -> dict[str, Tensor]:
    """Read a converted or an exported checkpoint as a float32 state dict of ``InternVL``."""
    weights = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    if weights[PATCH].shape[1] != 3:  # MLX keeps channels last
        weights[PATCH] = weights[PATCH].permute(0, 3, 1, 2).contiguous()
    return weights
