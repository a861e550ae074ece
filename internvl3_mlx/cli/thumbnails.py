"""Small images inside the terminal, by the two escape sequences that terminals support."""

from base64 import b64encode
from collections.abc import Callable, Mapping

ROWS = 8  # terminal lines per image
CHUNK = 4096  # maximum payload of one kitty sequence, in bytes

ThumbnailEncoder = Callable[[bytes], str]


def choose_thumbnail_encoder(
    env: Mapping[str, str], *, wanted: bool | None = None
) -> ThumbnailEncoder | None:
    """Return the encoder for this terminal, or None if it cannot display images.

    ``wanted``: None displays them where this is known to work; True also in VS Code and through
    tmux, which have to be configured for it; False never.
    """
    if wanted is False or env.get("TERM") == "dumb":
        return None
    program = env.get("TERM_PROGRAM", "")
    inside_tmux = bool(env.get("TMUX"))
    draw = ENCODERS.get(program)
    if env.get("KITTY_WINDOW_ID") or env.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        draw = encode_kitty
    if wanted and draw is None:
        draw = encode_iterm
    if inside_tmux or program == "vscode":
        return wrap_for_tmux(draw or encode_iterm, inside_tmux) if wanted else None
    return draw


def encode_iterm(png: bytes) -> str:
    """Return an OSC 1337 sequence, iTerm2's own."""
    head = f"\x1b]1337;File=inline=1;size={len(png)};height={ROWS};preserveAspectRatio=1:"
    return f"{head}{b64encode(png).decode()}\a\n"


def encode_kitty(png: bytes) -> str:
    """Return kitty's graphics sequences, with the payload in chunks."""
    data = b64encode(png).decode()
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    text = ""
    for number, chunk in enumerate(chunks, start=1):
        more = int(number < len(chunks))
        head = f"a=T,f=100,r={ROWS},m={more}" if number == 1 else f"m={more}"
        text += f"\x1b_G{head};{chunk}\x1b\\"
    return text + "\n"


def wrap_for_tmux(draw: ThumbnailEncoder, inside: bool) -> ThumbnailEncoder:
    """Return an encoder whose sequences tmux passes through."""
    if not inside:
        return draw

    def wrapped(png: bytes) -> str:
        escaped = draw(png).rstrip("\n").replace("\x1b", "\x1b\x1b")
        return f"\x1bPtmux;{escaped}\x1b\\\n"

    return wrapped


ENCODERS: dict[str, ThumbnailEncoder] = {
    "iTerm.app": encode_iterm,
    "WezTerm": encode_iterm,
    "ghostty": encode_kitty,
    "vscode": encode_iterm,
}
