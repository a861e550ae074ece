"""What native libraries write to standard error by themselves does not reach the terminal."""

import json
import os
import random
import subprocess
import sys
import threading

import pytest
from fixtures.damaged_checkpoints import copied
from fixtures.image_files import encoded, noise
from fixtures.mutants import damage
from fixtures.tiny import Recipe

from internvl3_mlx import load
from internvl3_mlx.errors import CheckpointError, ImageError
from internvl3_mlx.images.load import open_image
from internvl3_mlx.images.pages import open_pages
from internvl3_mlx.native_output import native_errors_hidden


def test_a_panic_of_a_tokenizer_is_one_line_and_no_backtrace(tmp_path, capfd):
    folder = copied(Recipe(), tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "a longer prefix than any token has"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_libtiff_says_nothing_by_itself(capfd):
    whole, refused = encoded(noise(33, 17), "TIFF", compression="tiff_lzw"), 0
    for seed in range(120):
        data = damage(whole, random.Random(seed))
        for read in (open_image, open_pages):
            try:
                read(data)
            except ImageError:
                refused += 1
    assert refused > 60
    assert capfd.readouterr().err == ""


def test_standard_error_is_back_when_the_last_of_several_threads_is_done(capfd):
    inside, done = threading.Barrier(3), threading.Event()

    def hide():
        with native_errors_hidden():
            inside.wait()
            os.write(2, b"hidden")
            done.wait()

    threads = [threading.Thread(target=hide) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    done.set()
    for thread in threads:
        thread.join()
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"


def test_what_another_thread_prints_meanwhile_arrives():
    program = """
import os, sys, threading
from internvl3_mlx.native_output import native_errors_hidden
for turn in range(2):
    with native_errors_hidden():
        os.write(2, b"hidden ")
        print("shown", turn, file=sys.stderr)
print("after", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "shown 0\nshown 1\nafter\n"
