"""Estimate what a model takes in memory from its headers, before it is loaded."""

from internvl3_mlx.checkpoints.build_model import compute_dtype
from internvl3_mlx.checkpoints.reader import open_checkpoint, parameters_by_part
from internvl3_mlx.config import read_config
from internvl3_mlx.config.published import QUANTIZED_BYTES_PER_PARAMETER
from internvl3_mlx.loading.fetch_model import LocalModel

LANGUAGE_MODEL = "language_model"


def estimate_weights_nbytes(local: LocalModel, bits: int | None = None) -> int:
    """Estimate the bytes of a model's weights. bits: those that it is quantized to on loading.

    What is not quantized takes the dtype that the model computes in: float32 on a CPU, otherwise
    the checkpoint's own.
    """
    config = read_config(local.folder)
    dense = compute_dtype(None, config.dtype).size
    parts = parameters_by_part(open_checkpoint(local.folder), config)
    total = 0.0
    for name, part in parts.items():
        if local.recipe is not None and name == LANGUAGE_MODEL:
            total += part.parameters * QUANTIZED_BYTES_PER_PARAMETER * (bits or 4) / 4
        elif part.nbytes < 1.5 * part.parameters:  # stored quantized
            total += part.nbytes
        else:
            total += part.parameters * dense
    return int(total)
