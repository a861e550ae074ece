"""The command that installs a missing extra, for the way the package was installed.

The package is not published on an index, so a hint never names it there.
"""

import json
from importlib.metadata import distributions
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

    PEP 610: an installer records the address of anything that did not come from an index. The
    metadata that a build leaves in a checkout has no such record and says nothing.
    """
    found = [*distributions(name=DISTRIBUTION)]
    records = [record for each in found if (record := each.read_text("direct_url.json"))]
    if not records:
        return (None if found else SOURCE_FOLDER), False
    try:
        content = json.loads(records[0])
        address, details = urlsplit(content["url"]), content["dir_info"]
    except (ValueError, KeyError, TypeError):
        return None, False
    if address.scheme != "file":
        return None, False
    return Path(unquote(address.path)), bool(details.get("editable", False))
