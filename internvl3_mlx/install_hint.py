"""The command that installs a missing extra, for the way the package was installed.

The package is not published on an index, so a hint never names it there.
"""

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "internvl3-mlx"
SOURCE_FOLDER = Path(__file__).resolve().parents[1]  # of a checkout that was not installed


def install_command(extra: str, libraries: str) -> str:
    """Return a pip command for ``extra``.

    libraries: the names to install by themselves where the package did not come from a folder.
    """
    folder, editable = installed_from()
    if folder is None or not (folder / "pyproject.toml").is_file():
        return f"pip install {libraries}"
    return f'pip install {"-e " if editable else ""}"{folder}[{extra}]"'


def installed_from() -> tuple[Path | None, bool]:
    """Return the folder that the package was installed from, and whether it is editable.

    PEP 610: an installer records the address of anything that did not come from an index.
    """
    try:
        record = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:
        return SOURCE_FOLDER, False
    try:
        content = json.loads(record or "{}")
        address, details = urlsplit(content["url"]), content["dir_info"]
    except (ValueError, KeyError, TypeError):
        return None, False
    if address.scheme != "file":
        return None, False
    return Path(unquote(address.path)), bool(details.get("editable", False))
