"""A QR code for the terminal, as half blocks."""

from internvl3_mlx.errors import MissingExtraError

QUIET_ZONE = 2  # light modules around the code, which readers need
BLOCKS = {(0, 0): "█", (0, 1): "▀", (1, 0): "▄", (1, 1): " "}  # (above, below) -> what is light


def qr_lines(text: str) -> list[str]:
    """Return the lines of a QR code, two rows of modules in each. Light modules are drawn.

    Raises MissingExtraError without segno.
    """
    try:
        import segno
    except ImportError as error:
        raise MissingExtraError("a QR code", "segno", "server") from error
    code = segno.make(text, error="l", micro=False)
    rows = [[int(bool(module)) for module in row] for row in code.matrix_iter(border=QUIET_ZONE)]
    if len(rows) % 2:
        rows.append([0] * len(rows[0]))
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return ["".join(BLOCKS[pair] for pair in zip(*lines, strict=True)) for lines in pairs]
