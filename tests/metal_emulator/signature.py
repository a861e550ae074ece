"""A kernel's signature: which parameter is which buffer, and which a position of the thread."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from metal_emulator.tokens import Token, attribute_end, plain, refusal, split_at

# attribute -> its first place in the runtime's row of positions (runtime.h has the same order)
POSITIONS = {
    "thread_position_in_grid": 0,
    "threadgroup_position_in_grid": 3,
    "thread_position_in_threadgroup": 6,
    "threads_per_threadgroup": 9,
    "threads_per_grid": 12,
    "threadgroups_per_grid": 15,
    "dispatch_threads_per_threadgroup": 18,
    "grid_origin": 21,
    "grid_size": 24,
    "thread_index_in_threadgroup": 27,
    "thread_index_in_simdgroup": 28,
    "simdgroup_index_in_threadgroup": 29,
    "simdgroups_per_threadgroup": 30,
    "threads_per_simdgroup": 31,
    "thread_execution_width": 31,
    "dispatch_simdgroups_per_threadgroup": 32,
    "thread_index_in_quadgroup": 33,
    "quadgroup_index_in_threadgroup": 34,
    "quadgroups_per_threadgroup": 35,
    "dispatch_quadgroups_per_threadgroup": 36,
}
ADDRESS_SPACES = {"device", "constant", "threadgroup", "thread"}
MOST_BUFFERS = 31
ATTRIBUTE = re.compile(r"(\w+)\s*(?:\(\s*(\w+)\s*\))?$")


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter: buffer number ``index``, or a position starting at ``index``."""

    name: str
    is_buffer: bool
    index: int
    optional: bool = False


def read_parameters(tokens: Sequence[Token]) -> list[Parameter]:
    """Read the parameters between the parentheses; unnumbered buffers get the lowest free index."""
    described = [_describe(part) for part in split_at(tokens, ",")]
    taken = {index for _, is_buffer, index, _ in described if is_buffer and index is not None}
    free = (index for index in range(len(described) + len(taken)) if index not in taken)
    parameters = [
        Parameter(name, is_buffer, next(free) if index is None else index, optional)
        for name, is_buffer, index, optional in described
    ]
    buffers = {parameter.index for parameter in parameters if parameter.is_buffer}
    if len(buffers) > MOST_BUFFERS or max(buffers, default=0) >= MOST_BUFFERS:
        raise refusal(tokens[0], f"more than {MOST_BUFFERS} buffer arguments")
    return parameters


def _describe(part: list[Token]) -> tuple[str, bool, int | None, bool]:
    """Give name, whether it is a buffer, its number and whether it may be left out."""
    words, attributes = _without_attributes(part)
    name = _name(words)
    is_pointer = any(token.text in {"*", "&", "["} for token in words)
    known = [ATTRIBUTE.match(text) for text in attributes]
    optional = any(match and match[1] == "function_constant" for match in known)
    for text, match in zip(attributes, known, strict=True):
        kind = match[1] if match else text
        if kind == "buffer":
            _need_address_space(words, name)
            return name, True, int(match[2]), optional
        if kind in POSITIONS:
            return name, False, POSITIONS[kind], optional
        if kind != "function_constant":
            raise refusal(part[0], f"unknown attribute [[{text}]] of kernel parameter '{name}'")
    if not is_pointer:
        raise refusal(part[0], f"kernel parameter '{name}' has no address space and no attribute")
    _need_address_space(words, name)
    return name, True, None, optional


def _without_attributes(part: list[Token]) -> tuple[list[Token], list[str]]:
    words: list[Token] = []
    attributes: list[str] = []
    index = 0
    while index < len(part):
        if part[index].text == "[[":
            end = attribute_end(part, index)
            inner = split_at(part[index + 1 : end - 1], ",")
            attributes += ["".join(token.text for token in item) for item in inner]
            index = end
        else:
            words.append(part[index])
        index += 1
    return words, attributes


def _name(words: list[Token]) -> str:
    names = words
    for index, token in enumerate(words):
        if token.text == "[":
            names = words[:index]
            break
    return [token.text for token in names if token.kind == "word"][-1]


def _need_address_space(words: list[Token], name: str) -> None:
    if not ADDRESS_SPACES & {token.text for token in words}:
        raise refusal(words[0], f"kernel parameter '{name}': a pointer needs an address space")
    if {"threadgroup", "thread"} & {token.text for token in words}:
        raise refusal(words[0], f"kernel parameter '{plain(words)}' is neither device nor constant")
