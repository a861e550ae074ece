"""Download the packages that training draws from, by name, with npm and apt.

``python -m examples.demo_model.fetch --packages packages``

Icon sets come from npm, clip art and typefaces from Debian. Nothing of them is passed on;
``NOTICE.md`` names their licenses.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.demo_model.icon_sets import (
    CLIP_ART,
    DEVELOPMENT_SETS,
    HELD_OUT_SETS,
    SCOPE,
    TRAIN_SETS,
)

FONT_PACKAGES = (
    "fonts-cabin", "fonts-cantarell", "fonts-comic-neue", "fonts-crosextra-caladea",
    "fonts-crosextra-carlito", "fonts-dejavu-core", "fonts-dosis", "fonts-ebgaramond",
    "fonts-firacode", "fonts-hack", "fonts-inconsolata", "fonts-jura", "fonts-karla",
    "fonts-lato", "fonts-liberation", "fonts-linuxlibertine", "fonts-noto-core",
    "fonts-open-sans", "fonts-play", "fonts-quicksand", "fonts-roboto-unhinted",
    "fonts-vollkorn", "fonts-averia-sans-gwf",
)  # fmt: skip


def main() -> None:
    """Fetch everything that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="the folder to fill")
    packages = parser.parse_args().packages
    packages.mkdir(parents=True, exist_ok=True)
    fetch_icons(packages)
    fetch_debian(packages, (CLIP_ART, *FONT_PACKAGES))
    (packages / "complete").touch()  # recipe.py looks for it


def fetch_icons(packages: Path) -> None:
    """Install the icon sets with npm, without running any of their scripts; all or none."""
    sets = (*TRAIN_SETS, *DEVELOPMENT_SETS.values(), *HELD_OUT_SETS.values())
    wanted = [f"{SCOPE}/{name}" for name in sets]
    installed = packages / "node_modules"
    if all((installed / name).is_dir() for name in wanted):
        return
    with set_aside(packages) as aside:
        flags = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", "."]
        run(["npm", "install", *flags, *wanted], aside)
        shutil.rmtree(installed, ignore_errors=True)
        (aside / installed.name).rename(installed)


def fetch_debian(packages: Path, names: Iterable[str]) -> None:
    """Download Debian packages and unpack them, installing nothing.

    An archive comes into the folder last, as the sign that all of it is there.
    """
    missing = [name for name in names if not list(packages.glob(f"{name}_*.deb"))]
    if not missing:
        return
    with set_aside(packages) as aside:
        run(["apt-get", "download", *missing], aside)
        for archive in sorted(aside.glob("*.deb")):
            run(["dpkg", "-x", str(archive.resolve()), "."], packages)
            archive.rename(packages / archive.name)


@contextmanager
def set_aside(packages: Path) -> Iterator[Path]:
    """Give an empty folder for what is not whole yet; a run that was killed may have left one."""
    aside = packages / "unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    yield aside
    shutil.rmtree(aside)


def run(command: list[str], folder: Path) -> None:
    """Run a package client; end with its words when it fails."""
    if shutil.which(command[0]) is None:
        sys.exit(f"{command[0]} is not installed; install it (Debian, Ubuntu), then run again")
    if subprocess.run(command, cwd=folder, check=False).returncode:
        sys.exit(f"{command[0]} failed in {folder}: see above; run again to fetch what is missing")


if __name__ == "__main__":
    main()
