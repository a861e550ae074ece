"""Which model a critic's name stands for: a published critic, a model, or an adapter of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from internvl3_mlx.adapters.adapter_files import ADAPTER_CONFIG
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.json_files import read_json
from internvl3_mlx.test_time_scaling.critic import PRM_SYSTEM
from internvl3_mlx.user_paths import expand_user
from internvl3_mlx.yaml_files import RUN_CONFIG, read_yaml

PRM_METHOD = "prm"  # of internvl3 train
PUBLISHED_CRITICS: Mapping[str, str] = MappingProxyType(
    {
        "visualprm": "OpenGVLab/VisualPRM-8B-v1_1",
        "visualprm-8b": "OpenGVLab/VisualPRM-8B",
        "visualprm-8b-v1.1": "OpenGVLab/VisualPRM-8B-v1_1",
    }
)


@dataclass(frozen=True)
class CriticSource:
    """A model, the adapter to load with it, and the system prompt it was trained with, if known."""

    model: str
    adapter: str | None = None
    system: str | None = None


def find_critic(name: str) -> CriticSource:
    """Resolve a critic's name; a folder with an adapter is loaded with its base model.

    A critic that ``internvl3 train --method prm`` wrote is used with the system prompt of its data.
    Raises UserError for a misspelled name, and for an adapter that does not name its base model.
    """
    folder = expand_user(name)
    if not folder.is_dir():
        return CriticSource(PUBLISHED_CRITICS.get(name.lower()) or check_spelling(name))
    system = PRM_SYSTEM if is_prm_run(folder) or is_prm_run(folder.parent) else None
    if not (folder / ADAPTER_CONFIG).is_file():
        return CriticSource(name, system=system)
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{folder} does not say which model it adapts (base_model_name_or_path in "
            f"{ADAPTER_CONFIG}); fuse it with internvl3 fuse and name the result"
        )
    return CriticSource(base, str(folder), system)


def check_spelling(name: str) -> str:
    """Return the name of a model; raises UserError for one that is almost a published critic's."""
    near = did_you_mean(name.lower(), PUBLISHED_CRITICS, otherwise="")
    if near and "/" not in name:
        raise UserError(f"no critic {name!r}; {near}")
    return name


def is_prm_run(folder: Path) -> bool:
    path = folder / RUN_CONFIG
    return path.is_file() and read_yaml(path, "the settings of a run").get("method") == PRM_METHOD
