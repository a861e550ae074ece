"""The file that was copied in the Finder: more than the clipboard's image, which is its icon.

Copying a file puts its address on the pasteboard, and beside it, as an image, a picture of the
icon. Pillow reads only the image there.
"""

import os
import subprocess
import sys

OSASCRIPT = "osascript"
TIMEOUT_S = 10
# a text on the clipboard would be coerced to an address, so what is there is asked first
COPIED_FILE = (
    'if (clipboard info for «class furl») is {} then return ""',
    "POSIX path of (the clipboard as «class furl»)",
)


def copied_file() -> str | None:
    """Return the path of the first file on a Mac's clipboard; None if there is none."""
    return ask_for_file() if sys.platform == "darwin" else None


def ask_for_file() -> str | None:
    """Ask the pasteboard, by AppleScript, as Pillow does for images."""
    command = [OSASCRIPT, *(word for line in COPIED_FILE for word in ("-e", line))]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    path = os.fsdecode(done.stdout).rstrip("\n")
    return path if path and os.path.exists(path) else None
