"""What one host says of itself before a launch: versions, the model's files, and what it reaches.

``internvl3 launch`` runs this module on every host, over ssh, with a request as JSON.
"""

import json
import os
import socket
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import internvl3_mlx
from internvl3_mlx.device import on_gpu
from internvl3_mlx.errors import InternVL3Error

SETTINGS = ("INTERNVL3_COMPILE", "INTERNVL3_KERNELS")  # must be the same on all ranks
REACH_S = 5.0


def rank_facts() -> dict[str, str]:
    """Return what must be the same on all ranks, by its name."""
    return {
        "internvl3-mlx": internvl3_mlx.__version__,
        "mlx": installed_version("mlx"),
        "device": "gpu" if on_gpu() else "cpu",
        **{name: os.environ.get(name, "") for name in SETTINGS},
    }


def installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def find_model(model: str) -> Path | None:
    """Return the folder of a model on this host, without network access; None if it is not here."""
    from internvl3_mlx.convert.recipes import uniform_recipe
    from internvl3_mlx.files import cache_folder
    from internvl3_mlx.loading.fetch_model import DEFAULT_BITS
    from internvl3_mlx.loading.hub import cached_snapshot
    from internvl3_mlx.loading.resolve import resolve_model

    location = resolve_model(model)
    if location.folder is not None:
        return location.folder
    assert location.repo is not None
    copy = cache_folder() / f"{location.repo.split('/')[-1]}-{uniform_recipe(DEFAULT_BITS).name}"
    if location.size and (copy / "config.json").is_file():
        return copy
    return cached_snapshot(location.repo)


def model_facts(model: str) -> dict[str, str]:
    """Return what tells the files of a model from others; {} where they are not here."""
    from internvl3_mlx.generation.mirror import folder_facts

    folder = find_model(model)
    return {} if folder is None else folder_facts(folder)


def reach_problem(address: str) -> str:
    """Say why an address cannot be reached; nothing if it can."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), REACH_S).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""


def probe(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a request. model: whose files to look for. reach: an address of rank 0."""
    found: dict[str, Any] = {"facts": rank_facts()}
    try:
        if request.get("model"):
            found["model"] = model_facts(request["model"])
    except InternVL3Error as error:
        found["problem"] = str(error)
    if request.get("reach"):
        found["unreachable"] = reach_problem(request["reach"])
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe(json.loads(sys.argv[1]))) + "\n")
