"""Describe an adapter from its settings and headers, without loading it."""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.adapters.adapter_files import (
    ADAPTER_CONFIG,
    MLX_ADAPTER_WEIGHTS,
    base_model_name,
    find_adapter_files,
    is_mlx_adapter,
)
from internvl3_mlx.adapters.mlx_adapter import read_mlx_adapter
from internvl3_mlx.adapters.peft import LORA_TENSOR, read_adapter_config
from internvl3_mlx.json_files import read_json_leniently
from internvl3_mlx.yaml_files import read_yaml

METRICS, TRAIN_CONFIG, STATE = "metrics.csv", "train_config.yaml", "state.json"  # our own runs'
TRAINER_STATE = "trainer_state.json"  # transformers' Trainer, and those built upon it
SWIFT_ARGS = "args.json"  # ms-swift


@dataclass(frozen=True)
class AdapterInfo:
    """All that ``internvl3 info`` shows about an adapter.

    ``ranks`` and ``targets`` count layers; ``saved`` are modules stored whole; ``data`` and
    ``steps`` are as the training left them in the folder, or None.
    """

    folder: Path
    kind: str
    base: str | None
    ranks: dict[int, int]
    alpha: float | int | None
    targets: dict[str, int]
    saved: tuple[str, ...]
    parameters: int
    nbytes: int
    files: tuple[str, ...]
    data: str | None
    steps: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; what is not known is left out."""
        table = {"adapter": self.kind, **asdict(self), "folder": str(self.folder)}
        del table["kind"]
        table["ranks"] = {str(rank): count for rank, count in self.ranks.items()}
        table["saved"], table["files"] = list(self.saved), list(self.files)
        return {name: value for name, value in table.items() if value not in (None, [], {})}


@dataclass(frozen=True)
class AdapterRepositoryInfo:
    """What ``internvl3 info`` shows about an adapter on the hub that is not on this machine."""

    repo: str
    nbytes: int
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; what is not known is left out."""
        targets = self.settings.get("target_modules")
        table = {
            "adapter": adapter_kind(self.settings),
            "repository": self.repo,
            "downloaded": False,
            "base": base_model_name(self.settings),
            "rank": self.settings.get("r"),
            "alpha": self.settings.get("lora_alpha"),
            "targets": sorted(map(str, targets)) if isinstance(targets, list) else targets,
            "nbytes": self.nbytes,
        }
        return {name: value for name, value in table.items() if value is not None}


def adapter_kind(settings: Mapping[str, Any]) -> str:
    if settings.get("use_dora"):
        return "DoRA"
    return "rsLoRA" if settings.get("use_rslora") else "LoRA"


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def inspect_adapter(folder: Path) -> AdapterInfo:
    """Describe an adapter folder.

    Raises UserError or CheckpointError if it is not a LoRA or DoRA adapter that can be loaded.
    """
    if is_mlx_adapter(folder):
        return inspect_mlx_adapter(folder)
    files = find_adapter_files(folder)
    settings = read_adapter_config(files.config)
    tensors = files.tensors()
    matches = {name: LORA_TENSOR.fullmatch(name) for name in tensors}
    down = {m["module"]: tensors[n].shape[0] for n, m in matches.items() if m and m["side"] == "A"}
    dora = settings.get("use_dora") or any(m and m["magnitude"] for m in matches.values())
    return AdapterInfo(
        folder=folder,
        kind=adapter_kind({**settings, "use_dora": dora}),
        base=base_model_name(settings),
        ranks=dict(Counter(down.values()).most_common()),
        alpha=settings.get("lora_alpha"),
        targets=dict(Counter(module.rpartition(".")[2] for module in down).most_common()),
        saved=tuple(sorted({n.rpartition(".")[0] for n, m in matches.items() if m is None})),
        parameters=sum(count_elements(info.shape) for info in tensors.values()),
        nbytes=sum(info.nbytes for info in tensors.values()),
        files=tuple(file.name for file in (files.weights, *files.full)),
        data=training_data(folder),
        steps=training_steps(folder),
    )


def inspect_mlx_adapter(folder: Path) -> AdapterInfo:
    """Describe an adapter in mlx-lm's format."""
    deltas, settings = read_mlx_adapter(folder)
    modules = [name.removesuffix(".weight") for name in deltas]
    arrays = [
        x for w in deltas.values() for x in (w.lora_a, w.lora_b, w.magnitude) if x is not None
    ]
    return AdapterInfo(
        folder=folder,
        kind=adapter_kind(settings),
        base=None,
        ranks=dict(Counter(w.lora_a.shape[0] for w in deltas.values()).most_common()),
        alpha=settings["lora_alpha"],
        targets=dict(Counter(module.rpartition(".")[2] for module in modules).most_common()),
        saved=(),
        parameters=sum(x.size for x in arrays),
        nbytes=sum(x.nbytes for x in arrays),
        files=(MLX_ADAPTER_WEIGHTS,),
        data=training_data(folder),
        steps=training_steps(folder),
    )


def count_elements(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def training_data(folder: Path) -> str | None:
    """Return the data that an adapter was trained on, from what its trainer left."""
    for run in (folder, folder.parent, folder.parent.parent):
        if (run / TRAIN_CONFIG).is_file():
            return str(read_yaml(run / TRAIN_CONFIG, "settings").get("data") or "") or None
    named = read_json_leniently(folder / SWIFT_ARGS).get("dataset")
    return ", ".join(map(str, named)) if isinstance(named, list) else named and str(named)


def training_steps(folder: Path) -> int | None:
    """Return the optimizer steps of the training, from what its trainer left."""
    for name, key in ((TRAINER_STATE, "global_step"), (STATE, "update")):
        if isinstance(steps := read_json_leniently(folder / name).get(key), int):
            return steps
    try:
        with (folder / METRICS).open(encoding="utf-8", newline="") as file:
            rows = [row["update"] for row in csv.DictReader(file)]
        return int(rows[-1]) if rows else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
