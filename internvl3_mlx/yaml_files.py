"""One reader for all YAML files, within bounds."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl3_mlx.errors import UserError
from internvl3_mlx.user_paths import read_small_file

if TYPE_CHECKING:
    from yaml.nodes import Node

MAX_NODES = 100_000  # values, those behind an alias counted each time: they multiply
VALUE_ERRORS = (ValueError, RecursionError, OverflowError)  # of dates, numbers and nesting

RUN_CONFIG = "train_config.yaml"  # where a training run keeps its own configuration


def read_yaml(path: Path, expected: str) -> Mapping[str, Any]:
    """Read a YAML file that holds a mapping; ``expected`` describes its keys in the error.

    Raises UserError for a file that is missing, not a regular one, too large, or not valid YAML.
    """
    import yaml

    data = read_small_file(path)
    try:
        text = data.decode("utf-8-sig")
        check_size(yaml.compose(text, yaml.SafeLoader), path)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, *VALUE_ERRORS) as error:
        line = " ".join(str(error).split()) or "it is nested too deeply"
        raise UserError(f"{path} is not valid YAML: {line}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is not a YAML mapping; expected {expected}")
    return content


def check_size(root: "Node | None", path: Path) -> None:
    """Raise UserError for aliases of aliases that stand for more values than a file can hold."""
    counts: dict[int, float] = {}

    def count(node: Any) -> float:
        if isinstance(node, tuple):  # a key and its value
            return sum(map(count, node))
        if id(node) not in counts:
            counts[id(node)] = float("inf")  # an alias to what it is part of
            parts = node.value if isinstance(node.value, list) else []
            counts[id(node)] = 1 + sum(map(count, parts))
        return counts[id(node)]

    if root is not None and count(root) > MAX_NODES:
        raise UserError(f"{path} stands for more than {MAX_NODES:,} values; write it without &")
