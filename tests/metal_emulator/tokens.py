"""Preprocessed Metal text as tokens that know where they came from."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metal_emulator.errors import KernelRefused

TOKEN = re.compile(
    r"""(?P<marker>^[ \t]*\#[^\n]*$)
    |(?P<space>\s+)
    |(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
    |(?P<word>[A-Za-z_]\w*)
    |(?P<sign>\[\[|->\*?|::|<<=|>>=|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|<<|.)""",
    re.M | re.S | re.X,
)
LINE_MARKER = re.compile(r'\s*#(?:line)?\s*(\d+)\s+"([^"]*)"')
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclass(slots=True)
class Token:
    """One significant token; ``before`` is the white space and the line markers ahead of it."""

    kind: str
    text: str
    before: str
    file: str
    line: int
    in_kernel: bool = False


def tokenize(text: str) -> list[Token]:
    """Split the text. The last token is empty and carries what follows the last significant one."""
    tokens: list[Token] = []
    file, line, before = "?", 1, ""
    for match in TOKEN.finditer(text):
        kind, piece = match.lastgroup, match.group()
        if kind == "marker":
            before += piece
            if found := LINE_MARKER.match(piece):
                file, line = found[2], int(found[1]) - 1
        elif kind == "space":
            before += piece
            line += piece.count("\n")
        else:
            tokens.append(Token(kind, piece, before, file, line))
            line += piece.count("\n")
            before = ""
    return [*tokens, Token("end", "", before, file, line)]


def refusal(token: Token, message: str) -> KernelRefused:
    """Return an error that names the position of the token."""
    return KernelRefused(f"{token.file}:{token.line}: error: {message}")


def join(tokens: Iterable[Token]) -> str:
    return "".join(token.before + token.text for token in tokens)


def plain(tokens: Iterable[Token]) -> str:
    """Write the tokens on one line, without markers."""
    return " ".join(token.text for token in tokens if token.text)


def collapse(tokens: Sequence[Token], text: str) -> Token:
    """Put ``text`` in the place of the tokens; lines and line markers stay as they were."""
    first = tokens[0]
    before = first.before + "".join(token.before for token in tokens[1:])
    return Token("made", text, before, first.file, first.line, first.in_kernel)


def closing(tokens: Sequence[Token], start: int) -> int:
    """Find what closes the bracket at ``start``."""
    opening = tokens[start].text
    depth = 0
    for index in range(start, len(tokens)):
        if tokens[index].text == opening:
            depth += 1
        elif tokens[index].text == CLOSING[opening]:
            depth -= 1
            if depth == 0:
                return index
    raise refusal(tokens[start], f"'{opening}' is never closed")


def attribute_end(tokens: Sequence[Token], start: int) -> int:
    """Find the last ``]`` of the attribute that the ``[[`` at ``start`` opens."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += {"[[": 2, "[": 1, "]": -1}.get(tokens[index].text, 0)
        if depth == 0:
            return index
    raise refusal(tokens[start], "'[[' is never closed")


def split_at(tokens: Iterable[Token], separator: str) -> list[list[Token]]:
    """Split at the separators that lie outside every bracket."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += {"[[": 2, "(": 1, "[": 1, "{": 1, "<": 1}.get(token.text, 0)
        depth -= {")": 1, "]": 1, "}": 1, ">": 1}.get(token.text, 0)
        if token.text == separator and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]
