"""Start the server with every login of a Mac: a property list for launchd."""

import os
import plistlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from internvl3_mlx.errors import UserError, WriteError
from internvl3_mlx.files import atomic_write

LABEL = "internvl3-mlx.serve"
PRIVATE = 0o600  # the file may hold the key
KEY_VARIABLE = "INTERNVL3_API_KEY"
KEPT_VARIABLES = ("INTERNVL3_CACHE", "INTERNVL3_CONFIG", "HF_HOME", "HF_HUB_CACHE")


def install_agent(arguments: Sequence[str], api_key: str | None, home: Path) -> Path:
    """Write the property list of a server with these arguments, and return its path.

    Raises UserError elsewhere than on a Mac, WriteError for a file that is not ours.
    """
    if not is_mac():
        raise UserError("--install needs launchd, which only macOS has; start serve yourself here")
    path = agent_path(home)
    check_ours(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.touch(mode=PRIVATE)
        part.chmod(PRIVATE)
        part.write_bytes(plistlib.dumps(agent(arguments, api_key, home, os.environ)))
    return path


def is_mac() -> bool:
    return sys.platform == "darwin"


def agent_path(home: Path) -> Path:
    return home / "Library" / "LaunchAgents" / f"{LABEL}.plist"


def agent(
    arguments: Sequence[str], api_key: str | None, home: Path, environment: Mapping[str, str]
) -> dict[str, object]:
    """Describe the job: it starts at login, and again where it has failed."""
    log = str(home / "Library" / "Logs" / "internvl3-serve.log")
    variables = {name: environment[name] for name in KEPT_VARIABLES if name in environment}
    if api_key is not None:
        variables[KEY_VARIABLE] = api_key
    return {
        "Label": LABEL,
        "ProgramArguments": [sys.executable, "-m", "internvl3_mlx", "serve", *arguments],
        "EnvironmentVariables": variables,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 30,
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }


def check_ours(path: Path) -> None:
    """Raise WriteError if the path holds something else than an agent of ours."""
    if not path.exists():
        return
    try:
        label = plistlib.loads(path.read_bytes()).get("Label")
    except (OSError, AttributeError, plistlib.InvalidFileException, ValueError):
        label = None
    if label != LABEL:
        raise WriteError(f"{path} is not a file of internvl3 serve; move it away")


def describe_agent(path: Path) -> list[str]:
    """Say how to start the job now, and how to remove it."""
    domain = f"gui/{os.getuid()}"
    return [
        f"wrote {path}; the server starts with your next login",
        f"start it now:  launchctl bootstrap {domain} {path}",
        f"remove it:     launchctl bootout {domain}/{LABEL}; rm {path}",
    ]
