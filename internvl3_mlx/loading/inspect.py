"""Describe a checkpoint from its config and headers, without loading it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.adapters.adapter_files import ADAPTER_CONFIG
from internvl3_mlx.adapters.peft import read_adapter_config
from internvl3_mlx.checkpoints.agreement import check_vocabulary
from internvl3_mlx.checkpoints.keymap import unused_tensors
from internvl3_mlx.checkpoints.reader import PART_NAMES, open_checkpoint, parameters_by_part
from internvl3_mlx.checkpoints.remap import plan_remap
from internvl3_mlx.config import ModelConfig, read_config
from internvl3_mlx.config.decoders import FAMILIES
from internvl3_mlx.config.model import FLASH_THRESHOLDS
from internvl3_mlx.config.published import PUBLISHED_SIZES, find_model_name
from internvl3_mlx.loading.fetch_adapter import adapter_snapshot
from internvl3_mlx.loading.hub import (
    cached_snapshot,
    check_contents,
    download_config,
    download_files,
    repo_info,
)
from internvl3_mlx.loading.ignored import list_ignored_keys
from internvl3_mlx.loading.inspect_adapter import (
    AdapterInfo,
    AdapterRepositoryInfo,
    inspect_adapter,
    is_adapter,
)
from internvl3_mlx.loading.resolve import resolve_model
from internvl3_mlx.prompt.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelPart:
    """One of the three parts: its name, its parameters and its bytes on disk."""

    name: str
    parameters: int
    nbytes: int

    @property
    def bits(self) -> float:
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class ModelInfo:
    """All that ``internvl3 info`` shows about a checkpoint."""

    folder: Path
    config: ModelConfig
    parts: tuple[ModelPart, ...]
    files: int
    nbytes: int
    stop_tokens: dict[str, int]
    ignored_keys: dict[str, list[str]]
    unused_tensors: list[str]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def active(self) -> dict[str, int]:
        """The parameters that a token goes through, of a mixture of experts alone."""
        experts = self.config.text.experts
        if experts is None:
            return {}
        one = 3 * self.config.text.hidden_size * experts.intermediate_size
        one += experts.bias * (2 * experts.intermediate_size + self.config.text.hidden_size)
        idle = self.config.text.num_hidden_layers * (experts.count - experts.per_token) * one
        return {"active_parameters": self.parameters - idle}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        parts = [{**asdict(part), "bits": round(part.bits, 2)} for part in self.parts]
        config = asdict(self.config)
        return {
            "folder": str(self.folder),
            **identity(self.config, self.folder.resolve(), self.parameters),
            "layout": self.config.layout,
            "parameters": self.parameters,
            **self.active,
            "nbytes": self.nbytes,
            "files": self.files,
            "parts": parts,
            "context": self.config.text.max_position_embeddings,
            "tokens_per_tile": self.config.num_image_token,
            "stop_tokens": self.stop_tokens,
            "ignored_keys": self.ignored_keys,
            **({"unused_tensors": self.unused_tensors} if self.unused_tensors else {}),
            **flash_info(self.config),
            "trained": self.config.trained,
            "config": config,
        }


@dataclass(frozen=True)
class RepositoryInfo:
    """What ``internvl3 info`` shows about a repository that is not on this machine."""

    repo: str
    nbytes: int
    config: ModelConfig

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "repository": self.repo,
            "downloaded": False,
            "layout": self.config.layout,
            "nbytes": self.nbytes,
            **identity(self.config, Path(self.repo)),
            "layers": self.config.text.num_hidden_layers,
            "hidden_size": self.config.text.hidden_size,
            "context": self.config.text.max_position_embeddings,
            "tokens_per_tile": self.config.num_image_token,
            **flash_info(self.config),
            "config": asdict(self.config),
        }


Description = ModelInfo | RepositoryInfo | AdapterInfo | AdapterRepositoryInfo


def inspect_model(model: str) -> Description:
    """Describe a folder, a size or a repository; one that is not downloaded by its configs.

    An adapter is described, too.
    """
    location = resolve_model(model)
    if location.folder is not None and is_adapter(location.folder):
        return inspect_adapter(location.folder)
    folder = location.folder or cached_snapshot(location.repo or "")
    if folder is None:
        return inspect_repository(location.repo or "")
    checkpoint = open_checkpoint(folder)
    config, _ = plan_remap(checkpoint, read_config(folder))
    tokenizer = Tokenizer.from_folder(folder)
    check_vocabulary(tokenizer, config)
    return ModelInfo(
        folder=folder,
        config=config,
        parts=tuple(
            ModelPart(PART_NAMES[part], size.parameters, size.nbytes)
            for part, size in parameters_by_part(checkpoint, config).items()
        ),
        files=len({info.file for info in checkpoint.tensors.values()}),
        nbytes=checkpoint.nbytes,
        stop_tokens=stop_tokens(tokenizer),
        ignored_keys=list_ignored_keys(folder, config.layout),
        unused_tensors=unused_tensors(checkpoint.tensors),
    )


def inspect_repository(repo: str) -> Description:
    """Describe a repository on the hub from its configs alone, the only files downloaded.

    An adapter that is on this machine is described from its files.

    Raises CheckpointError or ConfigError for a model that cannot be used, UserError for an unknown
    name, DownloadError without a network.
    """
    if (folder := adapter_snapshot(repo, local=True)) is not None and is_adapter(folder):
        return inspect_adapter(folder)
    remote = repo_info(repo)
    if remote.is_adapter:
        folder = download_files(repo, (ADAPTER_CONFIG,), None)
        settings = read_adapter_config(folder / ADAPTER_CONFIG)
        return AdapterRepositoryInfo(repo, remote.nbytes, settings)
    check_contents(remote)
    return RepositoryInfo(repo, remote.nbytes, download_config(repo))


def identity(config: ModelConfig, place: Path, parameters: int = 0) -> dict[str, Any]:
    """Name a model's family, size and stage, as far as its names and parameters tell them.

    parameters: of the whole model; 0 where they are not known.
    """
    name = next(filter(None, map(find_model_name, place.parts[::-1])), None)
    counts = {size.parameters: size for size in PUBLISHED_SIZES.values()}
    size = name or counts.get(parameters)
    row = FAMILIES[config.text.family]
    known = {"family": f"InternVL{size.family}", "size": size.base} if size else {}
    return {
        **known,
        **({"stage": name.stage or "final"} if name else {}),
        "language_model": row.title,
        "output_head": "tied to the embedding" if config.text.tie_word_embeddings else "untied",
    }


def flash_info(config: ModelConfig) -> dict[str, Any]:
    """Describe how a Flash model compresses tiles; nothing for other models."""
    if not config.flash_mode:
        return {}
    thresholds = {name: getattr(config, name) for name in FLASH_THRESHOLDS}
    return {"tokens_per_compressed_tile": config.num_compressed_token, **thresholds}


def stop_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    names = {entry.id: name for name, entry in tokenizer.added.items()}
    return {names.get(token, str(token)): token for token in sorted(tokenizer.stop_ids)}
