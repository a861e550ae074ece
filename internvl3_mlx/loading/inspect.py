"""What a checkpoint is, told from its headers alone: nothing is loaded."""

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from internvl3_mlx.checkpoints.keymap import ResolvedRule
from internvl3_mlx.checkpoints.reader import Checkpoint, open_checkpoint
from internvl3_mlx.checkpoints.remap import plan_remap
from internvl3_mlx.config import WORD_BITS, ModelConfig, QuantizationPlan, read_config
from internvl3_mlx.errors import UserError
from internvl3_mlx.loading.hub import cached_snapshot
from internvl3_mlx.loading.resolve import resolve_model
from internvl3_mlx.prompt.tokenizer import Tokenizer

PART_NAMES = {
    "vision_model": "vision tower",
    "mlp1": "projector",
    "language_model": "language model",
}


@dataclass(frozen=True)
class ModelPart:
    """One of the three parts: its parameters and its bytes on disk."""

    name: str
    parameters: int
    nbytes: int

    @property
    def bits(self) -> float:
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class ModelInfo:
    """Everything ``internvl3 info`` shows of a checkpoint."""

    folder: Path
    config: ModelConfig
    parts: tuple[ModelPart, ...]
    files: int
    nbytes: int
    stop_tokens: dict[str, int]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain values, for JSON."""
        parts = [{**asdict(part), "bits": round(part.bits, 2)} for part in self.parts]
        config = asdict(self.config)
        return {
            "folder": str(self.folder),
            "layout": self.config.layout,
            "parameters": self.parameters,
            "nbytes": self.nbytes,
            "files": self.files,
            "parts": parts,
            "context": self.config.text.max_position_embeddings,
            "tokens_per_tile": self.config.num_image_token,
            "stop_tokens": self.stop_tokens,
            "trained": self.config.trained,
            "config": config,
        }


def inspect_model(model: str) -> ModelInfo:
    """Describe a folder, a size or a cached repository; raise UserError when it is not here."""
    folder = find_local_folder(model)
    checkpoint = open_checkpoint(folder)
    config, moves = plan_remap(checkpoint, read_config(folder))
    tokenizer = Tokenizer.from_folder(folder)
    return ModelInfo(
        folder=folder,
        config=config,
        parts=tuple(parameters_by_part(checkpoint, config, moves)),
        files=len({info.file for info in checkpoint.tensors.values()}),
        nbytes=checkpoint.nbytes,
        stop_tokens=stop_tokens(tokenizer),
    )


def stop_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    names = {entry.id: name for name, entry in tokenizer.added.items()}
    return {names.get(token, str(token)): token for token in sorted(tokenizer.stop_ids)}


def find_local_folder(model: str) -> Path:
    place = resolve_model(model)
    folder = place.folder or cached_snapshot(place.repo or "")
    if folder is None:
        raise UserError(
            f"{place.repo} is not on this machine; "
            f"`internvl3 generate --model {model}` would fetch it"
        )
    return folder


def parameters_by_part(
    checkpoint: Checkpoint, config: ModelConfig, moves: list[ResolvedRule]
) -> list[ModelPart]:
    """Add up each part's tensors; packed weights count as what they unpack to."""
    totals = {name: [0, 0] for name in PART_NAMES}
    for move in moves:
        total = totals[move.targets[0].split(".", 1)[0]]
        for source in move.sources:
            info = checkpoint.tensors[source]
            total[0] += parameter_count(
                info.shape, info.dtype, move.targets[0], config.quantization
            )
            total[1] += info.nbytes
    return [
        ModelPart(PART_NAMES[name], parameters, nbytes)
        for name, (parameters, nbytes) in totals.items()
    ]


def parameter_count(
    shape: tuple[int, ...], dtype: str, target: str, plan: QuantizationPlan | None
) -> int:
    module, _, kind = target.rpartition(".")
    if kind in ("scales", "biases"):
        return 0
    if dtype == "U32" and plan is not None:
        return prod(shape) * WORD_BITS // plan.for_module(module).bits
    return prod(shape)
