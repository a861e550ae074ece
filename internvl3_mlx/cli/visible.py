"""The one gate to the terminal: control characters of names and messages are made visible.

A terminal executes control characters (ESC, but also U+009B and the rest of C1), and bidirectional
overrides let a name read as another. Everything that is shown goes through here, except our own
styling and images.
"""

import json

BIDI_CONTROLS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
LINE_SEPARATORS = (0x2028, 0x2029)
C1 = range(0x7F, 0xA0)  # and DEL
TAB, NEWLINE = 9, 10


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


SURROGATES = range(0xD800, 0xE000)  # what Python makes of bytes in names that are not UTF-8
BYTE_SURROGATES = 0xDC00  # a byte is shown as itself


def _surrogate(code: int) -> str:
    byte = code - BYTE_SURROGATES
    return _escape(byte if 0x80 <= byte < 0x100 else code)


_CONTROLS = (*range(32), *C1, *BIDI_CONTROLS, *LINE_SEPARATORS)
_IN_TEXT = {code: _escape(code) for code in _CONTROLS if code not in (TAB, NEWLINE)}
_IN_TEXT |= {code: _surrogate(code) for code in SURROGATES}
_IN_NAMES = {**_IN_TEXT, TAB: "\\t", NEWLINE: "\\n"}
_IN_ANSWERS = dict.fromkeys(_IN_TEXT.keys() - {*LINE_SEPARATORS, 0x061C, 0x200E, 0x200F})
_IN_JSON = {code: f"\\u{code:04x}" for code in (*C1, *BIDI_CONTROLS, *LINE_SEPARATORS, *SURROGATES)}


def visible(text: str) -> str:
    r"""Make control characters visible, as in ``\x1b``; tabs and newlines remain."""
    return text.translate(_IN_TEXT)


def visible_name(text: str) -> str:
    r"""Make every control character visible, newlines too: a name stays on its line."""
    return text.translate(_IN_NAMES)


def without_controls(text: str) -> str:
    """Drop control characters from a model's text, but the marks that Arabic and Hebrew use."""
    return text.translate(_IN_ANSWERS)


def json_text(content: object, *, indent: int | None = None) -> str:
    """Return JSON with readable letters, and with every control character escaped.

    Bytes of a name that are not UTF-8 are escaped too, so that ``os.fsencode`` gives them back.
    """
    return json.dumps(content, ensure_ascii=False, indent=indent).translate(_IN_JSON)
