"""Read a ``TrainConfig`` from YAML and flags, and write one as YAML. Unknown keys are refused.

method: sft
model: 2b
data: receipts/
learning_rate: 1e-4
train: [lora, mlp1]
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import UserError
from internvl3_mlx.files import atomic_write, did_you_mean
from internvl3_mlx.option_fields import parse_value
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.yaml_files import RUN_CONFIG, read_yaml

CONFIG_FILE = RUN_CONFIG
SOURCES = ("data", "valid_data", "test_data")  # may be lists in YAML
ALL_SETTINGS = "run internvl3 train --help for all settings"


def build_config(flags: Mapping[str, Any], path: Path | None = None) -> TrainConfig:
    """Merge flags over the YAML file; what neither sets takes the method's preset or default.

    Raises ``UserError`` that names the file, the key and the value.
    """
    from_file = read_config_file(path) if path else {}
    return TrainConfig(**from_file | parse_values(flags, "the command line"))


def write_config_file(config: TrainConfig, path: Path) -> None:
    """Write all settings as YAML from which ``build_config`` makes an equal ``TrainConfig``."""
    import yaml

    with atomic_write(path) as temporary:
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        temporary.write_text(text, encoding="utf-8")


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML file as values of the types of the fields; raises ``UserError``."""
    return parse_values(read_yaml(path, "keys such as model, data and method"), str(path))


def parse_values(content: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Convert each value to the type of its field; raise ``UserError`` for unknown keys."""
    known = [entry.name for entry in fields(TrainConfig)]
    for key in content:
        if key not in known:
            hint = did_you_mean(str(key).replace("-", "_"), known, otherwise=ALL_SETTINGS)
            raise UserError(f"{where}: unknown setting {key!r}; {hint}")
    joined = {key: join_sources(key, value) for key, value in content.items()}
    return {key: parse_value(TrainConfig, key, value, where) for key, value in joined.items()}


def join_sources(key: Any, value: Any) -> Any:
    """Write a list of data sources in YAML as the flag has it: ``a.jsonl,b.jsonl:0.5``."""
    is_list = key in SOURCES and isinstance(value, list) and all(isinstance(v, str) for v in value)
    return ",".join(value) if is_list else value
