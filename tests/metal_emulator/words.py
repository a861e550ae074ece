"""The words that Metal and C++ for OpenCL spell differently, and those that Metal refuses."""

import re
from collections.abc import Sequence

from metal_emulator.tokens import Token, closing, refusal

SCALARS = (
    *("char", "uchar", "short", "ushort", "int", "uint", "long", "ulong"),
    *("half", "float", "bfloat", "bool"),
)
VECTORS = {f"{scalar}{n}" for scalar in SCALARS for n in (2, 3, 4)}
SPELLED = {"device": "__global", "threadgroup": "__local", "static_cast": "__msl_cast"}
CAST_BY_NAME = {"half", "bfloat"}  # between the two clang has no conversion of its own
# plain identifiers in Metal, keywords in OpenCL
RENAMED = {
    *("local", "global", "generic", "pipe", "read_only", "write_only", "read_write"),
    *("event_t", "sampler_t", "queue_t", "image1d_t", "image2d_t", "image3d_t"),
    *("atomic_int", "atomic_uint", "atomic_bool", "atomic_float"),
}
REFUSED = {
    **dict.fromkeys(("vertex", "fragment"), "a keyword in Metal"),
    **dict.fromkeys(
        (
            *("double", "goto", "dynamic_cast", "typeid", "throw", "try", "catch", "new", "delete"),
            *("virtual", "__global", "__local", "__constant", "__private", "__generic"),
        ),
        "not supported in Metal",
    ),
}
BFLOAT = re.compile(r"([\d.][\d.eE+-]*)(?:bf|BF)$")
# where vec<T, n> follows these, nothing is deduced from it, and T may be bool
BEFORE_A_TYPE = {"typedef", "=", ";", "{", "}", "const", "constexpr", ""}
BEFORE_A_CONSTRUCTOR = {")", "constexpr", "{", "}", ";", ":", "explicit", "inline", ""}


def spell_words(tokens: Sequence[Token]) -> Sequence[Token]:
    """Spell every word as C++ for OpenCL does, in place."""
    for index, token in enumerate(tokens):
        if token.kind == "number" and (found := BFLOAT.match(token.text)):
            token.text = f"((bfloat){found[1]}f)"
        elif token.kind == "word":
            _refuse(token, tokens[index + 1])
            if token.text in VECTORS or token.text == "vec":
                _vector(tokens, index)
            elif token.text in CAST_BY_NAME and _is_a_cast(tokens, index):
                token.text = f"__msl_cast<{token.text}>"
            elif token.text == "thread":
                token.text = "" if _qualifies_a_temporary(tokens, index) else "__private"
            elif token.text == "constant":
                token.text = "__constant" if _after_parenthesis(tokens, index) else _CONSTANT
            elif token.text in RENAMED:
                token.text = "__id_" + token.text
            else:
                token.text = SPELLED.get(token.text, token.text)
    return tokens


_CONSTANT = "const __constant"  # Metal's constant implies const


def _refuse(token: Token, following: Token) -> None:
    word = token.text
    reason = REFUSED.get(word)
    if word == "long" and following.text == "long":
        word, reason = "long long", "not supported in Metal"
    if reason:
        raise refusal(token, f"'{word}' is {reason}")


def _is_a_cast(tokens: Sequence[Token], index: int) -> bool:
    return tokens[index + 1].text == "(" and tokens[index - 1].text != "operator"


def _vector(tokens: Sequence[Token], index: int) -> None:
    """Turn ``float4(`` and ``vec<T, 2>(`` into calls of a template that counts the components."""
    before = tokens[index - 1].text if index else ""
    if before == "operator":
        return
    end = index
    if tokens[index].text == "vec":
        if tokens[index + 1].text != "<":
            return
        end = closing(tokens, index + 1)
    scoped = before == "::" and tokens[index - 2].text == "metal"
    if tokens[end + 1].text != "(":
        start = index - 2 if scoped else index
        if end > index and _deduces_nothing(tokens, start):
            tokens[index].text = "__vec" if scoped else "metal::__vec"
        return
    if scoped:
        tokens[index - 1].text = tokens[index - 2].text = ""
    name = "__vec" if tokens[index].text == "vec" else tokens[index].text
    tokens[index].text = f"__msl_make<{'metal::' * (name == '__vec')}{name}"
    tokens[end].text += ">"


def _deduces_nothing(tokens: Sequence[Token], index: int) -> bool:
    """Tell whether the type at ``index`` is only named, which an alias template's is not."""
    if index == 0 or tokens[index - 1].text not in BEFORE_A_TYPE:
        return index == 0
    return not (tokens[index - 1].text == "=" and tokens[index - 4].text == ">")


def _after_parenthesis(tokens: Sequence[Token], index: int) -> bool:
    """Tell whether a member function is qualified here: ``) constant`` or ``) const constant``."""
    before = tokens[index - 1].text
    return before == ")" or (before == "const" and tokens[index - 2].text == ")")


def _qualifies_a_temporary(tokens: Sequence[Token], index: int) -> bool:
    """Tell whether ``thread`` qualifies a constructor or a conversion operator.

    What those make is a temporary, which lives in OpenCL's generic space.
    """
    if not _after_parenthesis(tokens, index):
        return False
    start = _opening(tokens, index - 1 if tokens[index - 1].text == ")" else index - 2)
    name, before = tokens[start - 1], tokens[start - 2].text
    if name.kind != "word":
        return False
    if before == ">":
        opening = _opening(tokens, start - 2)
        return tokens[opening - 1].text == "template"
    return before == "operator" or before in BEFORE_A_CONSTRUCTOR


def _opening(tokens: Sequence[Token], end: int) -> int:
    """Find what opens the ``)`` or ``>`` at ``end``."""
    closer = tokens[end].text
    opener = {")": "(", ">": "<"}[closer]
    depth = 0
    for index in range(end, -1, -1):
        depth += {closer: 1, opener: -1}.get(tokens[index].text, 0)
        if depth == 0:
            return index
    raise refusal(tokens[end], f"'{closer}' opens nowhere")
