"""Threadgroup variables become references into an arena that the runtime watches."""

from collections.abc import Iterator, Sequence
from itertools import count

from metal_emulator.errors import KernelRefused
from metal_emulator.tokens import Token, collapse, plain, split_at


def threadgroup_variables(tokens: Sequence[Token]) -> Iterator[Token]:
    """Rewrite ``__local float a[4], b;``; a pointer to threadgroup memory is left as it is."""
    numbers = count(1)
    index = 0
    while index < len(tokens):
        token = tokens[index]
        starts = index == 0 or tokens[index - 1].text in {";", "{", "}"}
        if token.text == "__local" and starts:
            end = index
            while tokens[end].text not in {";", "end"} and tokens[end].kind != "end":
                end += 1
            parts = split_at(tokens[index + 1 : end], ",")
            if not _is_pointer(parts[0]):
                if not token.in_kernel:
                    raise KernelRefused(
                        f"{token.file}:{token.line}: error: "
                        "threadgroup variables may only be declared in a kernel function"
                    )
                yield collapse(tokens[index : end + 1], _references(parts, numbers, token.line))
                index = end + 1
                continue
        yield token
        index += 1


def _is_pointer(declaration: list[Token]) -> bool:
    """Tell whether a ``*`` or ``&`` stands outside every bracket, ahead of an initialiser."""
    depth = 0
    for token in declaration:
        depth += {"<": 1, "(": 1, "[": 1, ">": -1, ")": -1, "]": -1}.get(token.text, 0)
        if depth == 0 and token.text == "=":
            return False
        if depth == 0 and token.text in {"*", "&"}:
            return True
    return False


def _references(parts: list[list[Token]], numbers: Iterator[int], line: int) -> str:
    kind, name, sizes = _declarator(parts[0])
    declared = [(name, sizes), *(_declarator(part)[1:] for part in parts[1:])]
    return " ".join(
        f"__local auto& {name} = __msl_variable<{kind} {sizes}>({next(numbers)}, {line});"
        for name, sizes in declared
    )


def _declarator(tokens: list[Token]) -> tuple[str, str, str]:
    """Give type, name and array sizes. Metal accepts an initialiser and does not run it."""
    tokens = split_at(tokens, "=")[0]
    sizes = next((i for i, token in enumerate(tokens) if token.text == "["), len(tokens))
    kind = [token for token in tokens[: sizes - 1] if token.text != "const"]
    return plain(kind), tokens[sizes - 1].text, plain(tokens[sizes:])
