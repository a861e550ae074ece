"""What a power cut could cost: files are on the disk before they replace others."""

import os
import sys

from internvl3_mlx.files import atomic_files


def test_files_that_replace_others_are_on_the_disk_first(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with atomic_files(tmp_path, ("a", "b")) as part:
        for name in ("a", "b"):
            (part / name).write_text(name)
    written = {(tmp_path / name).stat().st_ino for name in ("a", "b")}
    assert written <= {*events[: events.index("rename")]}
    assert events[-1] == tmp_path.stat().st_ino
