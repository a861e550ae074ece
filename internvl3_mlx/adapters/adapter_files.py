"""Find the files of an adapter folder as PEFT, ms-swift, LLaMA-Factory and we write them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.checkpoints.reader import TensorInfo, read_header
from internvl3_mlx.config.foreign import visible_files
from internvl3_mlx.errors import CheckpointError, KeyMapError, UserError
from internvl3_mlx.prompt.tokenizer import Tokenizer
from internvl3_mlx.prompt.tokenizer_files import read_added_tokens

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_CARD = "README.md"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TORCH_ADAPTER_WEIGHTS = "adapter_model.bin"  # older versions of PEFT
MLX_ADAPTER_WEIGHTS = "adapters.safetensors"  # mlx-lm's and mlx-vlm's format
FULL_WEIGHTS = ("vit.safetensors",)  # ms-swift: the tower and projector, trained in full
TRAINING_STATE = ("state.safetensors",)  # in the checkpoints of our own runs; not weights
UNREAD = ("non_lora_trainables.bin", "non_lora_state_dict.bin", "non_lora_state_dict.safetensors")
FILES = (
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, TORCH_ADAPTER_WEIGHTS, *FULL_WEIGHTS, MLX_ADAPTER_WEIGHTS,
)  # fmt: skip
NUMBER = re.compile(r"(\d+)$")
SHOWN_FOLDERS = 3


@dataclass(frozen=True)
class AdapterFiles:
    """The files of one adapter: its settings, its weights, and weights that were trained whole."""

    config: Path
    weights: Path
    full: tuple[Path, ...] = ()

    def tensors(self) -> dict[str, TensorInfo]:
        """Return the headers of the weights. Raises KeyMapError for a name in two files."""
        found: dict[str, TensorInfo] = {}
        for file in (self.weights, *self.full):
            for info in read_header(file):
                if info.name in found:
                    raise KeyMapError(
                        f"{info.name} is in both {found[info.name].file.name} and {file.name}; "
                        "keep one of them"
                    )
                found[info.name] = info
        return found


def find_adapter_files(folder: Path) -> AdapterFiles:
    """Find the files of an adapter.

    Raises CheckpointError for a folder that is not an adapter, with the folder that may be meant,
    and UserError for weights beside the adapter that are of an unknown purpose.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; an adapter is a folder saved by PEFT")
    weights = next(
        (folder / n for n in (ADAPTER_WEIGHTS, TORCH_ADAPTER_WEIGHTS) if (folder / n).is_file()),
        None,
    )
    if weights is None and (folder / MLX_ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is an adapter in mlx-lm's format; expected PEFT's")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise missing_file(folder, ADAPTER_CONFIG)
    if weights is None:
        raise missing_file(folder, ADAPTER_WEIGHTS)
    full = tuple(folder / name for name in FULL_WEIGHTS if (folder / name).is_file())
    check_other_weights(folder, {weights, *full})
    return AdapterFiles(folder / ADAPTER_CONFIG, weights, full)


def is_mlx_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in mlx-lm's format, and none in PEFT's."""
    names = (ADAPTER_WEIGHTS, TORCH_ADAPTER_WEIGHTS)
    has_peft = any((folder / name).is_file() for name in names)
    return not has_peft and (folder / MLX_ADAPTER_WEIGHTS).is_file()


def missing_file(folder: Path, name: str) -> CheckpointError:
    """Say which file is missing, and which folders below are adapters."""
    inside = [path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")]
    if inside:
        latest = sorted(inside, key=checkpoint_order, reverse=True)
        shown = ", ".join(map(str, latest[:SHOWN_FOLDERS]))
        return CheckpointError(f"no {name} in {folder}; did you mean {shown}?")
    return CheckpointError(f"no {name} in {folder}; an adapter is a folder saved by PEFT")


def checkpoint_order(folder: Path) -> tuple[int, str]:
    """Order checkpoint-9 before checkpoint-10."""
    match = NUMBER.search(folder.name)
    return int(match[1]) if match else -1, folder.name


def check_other_weights(folder: Path, known: set[Path]) -> None:
    """Raise UserError for weights beside an adapter that would otherwise be passed over."""
    others = [
        path
        for path in visible_files(folder, "*.safetensors")
        if path not in known and path.name not in TRAINING_STATE
    ]
    others += [folder / name for name in UNREAD if (folder / name).is_file()]
    others = [path for path in others if path.name not in TRAINING_STATE]
    if others:
        raise UserError(
            f"{others[0]} lies beside the adapter and is of an unknown purpose; merge it where it "
            "was trained, or move it away if it is not needed"
        )


def check_adapter_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError if an adapter was trained with tokens that the model's tokenizer lacks."""
    tokens = read_added_tokens(folder)
    new = [name for name in tokens if name not in tokenizer.added and name != "<video>"]
    new = [name for name in new if len(tokenizer.encode_text(name, specials=True)) > 1]
    if new:
        raise UserError(
            f"the adapter in {folder} was trained with {len(new)} more tokens than the model has, "
            f"such as {new[0][:40]!r}; merge it into its model where it was trained, and load that"
        )


def base_model_name(settings: Mapping[str, Any]) -> str | None:
    """Return the model that an adapter was trained on, as its author's machine called it."""
    name = settings.get("base_model_name_or_path")
    return str(name) if name else None


def explain_grown_vocabulary(
    wrong: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> str | None:
    """Say that saved embeddings have another vocabulary; None if something else differs.

    wrong: names, the model's shapes and the adapter's.
    """
    for name, model, adapter in wrong:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and model[1:] == adapter[1:]:
            return (
                f"the adapter was trained with a vocabulary of {adapter[0]} tokens, the model has "
                f"{model[0]} ({name}); merge it into its model where it was trained, and load that"
            )
    return None
