"""Pictures inside the terminal: the right sequence where it is known to work, else nothing."""

import base64
import io

import pytest
from fixtures.image_files import noise
from PIL import Image

from internvl3_mlx.cli.thumbnails import CHUNK, choose_thumbnail_encoder, encode_iterm, encode_kitty
from internvl3_mlx.images.load import LoadedImage, preview_png

PNG = b"\x89PNG" + bytes(range(256)) * 40


@pytest.mark.parametrize(
    ("env", "draw"),
    [
        ({"TERM_PROGRAM": "iTerm.app"}, encode_iterm),
        ({"TERM_PROGRAM": "WezTerm"}, encode_iterm),
        ({"TERM_PROGRAM": "ghostty"}, encode_kitty),
        ({"TERM": "xterm-kitty"}, encode_kitty),
        ({"KITTY_WINDOW_ID": "1"}, encode_kitty),
        ({"TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM_PROGRAM": "WarpTerminal"}, None),
        ({"TERM_PROGRAM": "vscode"}, None),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/x"}, None),
        ({"TERM_PROGRAM": "iTerm.app", "TERM": "dumb"}, None),
        ({}, None),
    ],
)
def test_each_terminal_gets_its_own_sequence_or_none(env, draw):
    assert choose_thumbnail_encoder(env) is draw
    assert choose_thumbnail_encoder(env, wanted=False) is None


def test_vs_code_and_tmux_show_images_when_asked():
    assert choose_thumbnail_encoder({"TERM_PROGRAM": "vscode"}, wanted=True) is encode_iterm
    wrapped = choose_thumbnail_encoder({"TERM_PROGRAM": "iTerm.app", "TMUX": "x"}, wanted=True)(PNG)
    assert wrapped.startswith("\x1bPtmux;\x1b\x1b]1337;")
    assert wrapped.endswith("\x1b\\\n")


def test_osc_1337_carries_the_whole_file():
    text = encode_iterm(PNG)
    assert text.startswith(f"\x1b]1337;File=inline=1;size={len(PNG)};")
    assert base64.b64decode(text.partition(":")[2].removesuffix("\a\n")) == PNG


def test_kitty_sequences_are_chunks_that_join_to_the_file():
    parts = encode_kitty(PNG).rstrip("\n").split("\x1b\\")[:-1]
    payloads = [part.partition(";")[2] for part in parts]
    assert base64.b64decode("".join(payloads)) == PNG
    assert max(map(len, payloads)) <= CHUNK
    assert [part.count("m=1") for part in parts] == [1] * (len(parts) - 1) + [0]


def test_a_preview_is_small_and_keeps_its_shape():
    png = preview_png(LoadedImage(noise(900, 300), "wide"))
    assert Image.open(io.BytesIO(png)).size == (480, 160)
