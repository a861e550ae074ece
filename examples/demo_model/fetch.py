"""Download the packages that training draws from, by name, with npm and apt.

``python -m examples.demo_model.fetch --packages packages``

Icon sets come from npm, clip art and typefaces from Debian. Nothing of them is passed on;
``NOTICE.md`` names their licenses.
"""

import argparse
import subprocess
import sys
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
    for name in (CLIP_ART, *FONT_PACKAGES):
        fetch_debian(packages, name)
    (packages / "complete").touch()  # recipe.py looks for it


def fetch_icons(packages: Path) -> None:
    """Install the icon sets with npm, without running any of their scripts."""
    sets = (*TRAIN_SETS, *DEVELOPMENT_SETS.values(), *HELD_OUT_SETS.values())
    wanted = [f"{SCOPE}/{name}" for name in sets]
    missing = [name for name in wanted if not (packages / "node_modules" / name).is_dir()]
    if missing:
        flags = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", "."]
        run(["npm", "install", *flags, *missing], packages)


def fetch_debian(packages: Path, name: str) -> None:
    """Download a Debian package and unpack it, installing nothing."""
    if not list(packages.glob(f"{name}_*.deb")):
        run(["apt-get", "download", name], packages)
        (archive,) = packages.glob(f"{name}_*.deb")
        run(["dpkg", "-x", archive.name, "."], packages)


def run(command: list[str], folder: Path) -> None:
    """Run a package client; end with its words when it fails."""
    if subprocess.run(command, cwd=folder, check=False).returncode:
        sys.exit(f"{command[0]} failed in {folder}: see above; run again to fetch what is missing")


if __name__ == "__main__":
    main()
