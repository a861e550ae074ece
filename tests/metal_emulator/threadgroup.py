"""Threadgroup variables become references into an arena that the runtime watches."""

from collections.abc import Iterator, Sequence
from itertools import count

from metal_emulator.tokens import Token, collapse, plain, refusal, split_at


def threadgroup_variables(tokens: Sequence[Token]) -> Iterator[Token]:
    """Rewrite ``__local float a[4], b;``; a pointer to threadgroup memory is left as it is."""
    numbers = count(1)
    index = 0
    while index < len(tokens):
        end = _declaration_end(tokens, index)
        if end:
            references = _references(tokens[index:end], numbers)
            yield collapse(tokens[index : end + 1], references)
        else:
            yield tokens[index]
        index = (end or index) + 1


def _declaration_end(tokens: Sequence[Token], index: int) -> int | None:
    """Find the semicolon of the declaration of variables that begins at ``index``, if one does."""
    starts = index == 0 or tokens[index - 1].text in {";", "{", "}"}
    if tokens[index].text != "__local" or not starts:
        return None
    ahead = range(index, len(tokens))
    end = next(i for i in ahead if tokens[i].text == ";" or tokens[i].kind == "end")
    if _is_pointer(tokens[index + 1 : end]):
        return None
    if not tokens[index].in_kernel:
        raise refusal(
            tokens[index], "threadgroup variables may only be declared in a kernel function"
        )
    return end


def _is_pointer(declaration: Sequence[Token]) -> bool:
    """Return whether a ``*`` or ``&`` is outside every bracket, before an initializer."""
    depth = 0
    for token in declaration:
        depth += {"<": 1, "(": 1, "[": 1, ">": -1, ")": -1, "]": -1}.get(token.text, 0)
        if depth == 0 and token.text in {"=", ",", "*", "&"}:
            return token.text in {"*", "&"}
    return False


def _references(declaration: Sequence[Token], numbers: Iterator[int]) -> str:
    parts, line = split_at(declaration[1:], ","), declaration[0].line
    kind, name, sizes = _declarator(parts[0])
    declared = [(name, sizes), *(_declarator(part)[1:] for part in parts[1:])]
    return " ".join(
        f"__local auto& {name} = __msl_variable<{kind} {sizes}>({next(numbers)}, {line});"
        for name, sizes in declared
    )


def _declarator(tokens: list[Token]) -> tuple[str, str, str]:
    """Give type, name and array sizes. Metal accepts an initializer and does not run it."""
    tokens = split_at(tokens, "=")[0]
    sizes = next((i for i, token in enumerate(tokens) if token.text == "["), len(tokens))
    kind = [token for token in tokens[: sizes - 1] if token.text != "const"]
    return plain(kind), tokens[sizes - 1].text, plain(tokens[sizes:])
