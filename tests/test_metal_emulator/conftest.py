"""The emulator's tests need a compiler. On Linux it must be there; else they skip."""

from pathlib import Path

import pytest
from metal_emulator import reason_to_skip


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    if ours and (reason := reason_to_skip()):
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))
