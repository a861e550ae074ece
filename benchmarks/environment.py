"""A second virtual environment: this one without PyTorch."""

import site
import subprocess
import sys
from pathlib import Path

TORCH = ("torch", "torchvision", "torchaudio", "torchgen", "functorch", "triton")


def environment_without_torch(folder: Path) -> str:
    """Make a virtual environment of links to this one's packages except PyTorch's; return its
    Python."""
    python = folder / "bin" / "python"
    if python.exists():
        return str(python)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (target,) = folder.glob("lib/python*/site-packages")
    for source in map(Path, site.getsitepackages()):
        for entry in source.iterdir():
            name = entry.name.split("-")[0].split(".")[0]
            if name not in TORCH and not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)
    return str(python)
