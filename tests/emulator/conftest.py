"""The emulator's tests need a compiler. On Linux it must be there; else they skip."""

import sys
from pathlib import Path

import pytest
from metal_emulator import why_unusable


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    if not ours or sys.platform == "linux":
        return
    if reason := why_unusable():
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))
