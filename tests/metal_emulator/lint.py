"""What Metal refuses and C++ for OpenCL accepts, read from clang's syntax tree and its LLVM IR."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NODE = re.compile(
    r"^[ |`-]*(\w+) 0x[0-9a-f]+ (?:parent 0x[0-9a-f]+ )?(?:prev 0x[0-9a-f]+ )?"
    r"<([^>]*(?:<[^>]*>[^>]*)*)>(.*)$"
)
PLACE = re.compile(r"\s*((?:line|col):[\d:]+|[^\s']+:\d+:\d+) ")
TYPE = re.compile(r"'([^']*)'(?::'([^']*)')?")
VARIABLES = {"VarDecl", "ParmVarDecl", "FieldDecl"}
COMPARISONS = ("'<'", "'>'", "'<='", "'>='", "'=='", "'!='")
PASSES_A_MASK_ON = {"ParenExpr", "ImplicitCastExpr", "BinaryOperator", "UnaryOperator"}
TAKES_A_MASK = re.compile(r" '(?:all|any|select)' ")
FUNCTION = re.compile(r'^define .*?@"?([\w.$]+)"?\(')
CALLED = re.compile(r'@"?([\w.$]+)"?\(')


def lint(tree: str, ir: str, files: set[str]) -> list[str]:
    """List what Metal refuses in these files, one line each: ``file:line: error: ...``."""
    found = sorted(set(_in_tree(tree, files)))
    messages = [f"{file}:{line}: error: {message}" for file, line, message in found]
    if recursive := _recursion(ir):
        messages.append(f"error: recursive function call of {recursive}")
    return messages


@dataclass
class Node:
    """One line of clang's dump."""

    depth: int
    kind: str
    rest: str
    callee: str = ""  # of a call: what it calls

    @property
    def type(self) -> str:
        """The type, without the names that a typedef gives it."""
        match = TYPE.search(self.rest)
        return (match[2] or match[1]) if match else ""


def _in_tree(tree: str, files: set[str]) -> Iterator[tuple[str, int, str]]:
    place = _Place()
    above: list[Node] = []
    for line in tree.split("\n"):
        match = NODE.match(line)
        if not match:
            continue
        node = Node(len(line) - len(line.lstrip(" |`-")), match[1], match[3])
        begin = place.enter(match[2], match[3])
        while above and above[-1].depth >= node.depth:
            above.pop()
        if node.kind == "DeclRefExpr":
            _name_callee(above, node)
        if begin[0] in files and not any(_is_implicit(a) for a in (*above, node)):
            for message in _objections(node, above):
                yield *begin, message
        above.append(node)


def _is_implicit(node: Node) -> bool:
    return node.kind.endswith("Decl") and " implicit" in node.rest


def _name_callee(above: Sequence[Node], node: Node) -> None:
    """Give the call its name: the first reference below it is what it calls."""
    call = next((a for a in reversed(above) if a.kind != "ImplicitCastExpr"), None)
    if call and call.kind == "CallExpr" and not call.callee:
        call.callee = node.rest


class _Place:
    """Where clang's dump is: it names a file or a line only when it changes."""

    def __init__(self) -> None:
        self.file, self.line = "", 0

    def enter(self, extent: str, rest: str) -> tuple[str, int]:
        """Follow a node's extent; returns where the node begins."""
        begins = []
        for part in extent.split(","):
            self._move(part)
            begins.append((self.file, self.line))
        if match := PLACE.match(rest):
            self._move(match[1])
        return begins[0]

    def _move(self, text: str) -> None:
        *file, line, column = ["", *text.strip().split(":")][-3:]
        if file == ["line"]:
            self.line = int(line)
        elif line != "col" and line.isdigit() and column.isdigit():
            self.file, self.line = file[0], int(line)


def _objections(node: Node, above: Sequence[Node]) -> Iterator[str]:
    kind, rest, written = node.kind, node.rest, node.type
    if kind in VARIABLES:
        name = (re.search(r"(\w+) '", rest) or ["", "?"])[1]
        if re.search(r"(?<!\*)__generic [^*&]*[*&]", written) and "lambda" not in written:
            yield f"'{name}': a pointer or reference type needs an explicit address space"
        if kind == "VarDecl" and re.search(r"(^|[ ])__global [^*&]*$", written):
            yield f"'{name}': program-scope and static variables must be constant"
    if _converts(node) and _element(written) == "bfloat":
        yield "implicit conversion to bfloat is not allowed in Metal: cast explicitly"
    if above and _converts(above[-1]) and {_element(written), _element(above[-1].type)} == _MIXED:
        yield "half and bfloat do not mix in Metal: cast one of them explicitly"
    is_mask = kind == "BinaryOperator" and rest.endswith(COMPARISONS) and "ext_vector" in written
    if is_mask and not _becomes_bools(above):
        yield "a comparison of vectors is a mask here, bool in Metal: put it into a bool vector"


_MIXED = {"half", "bfloat"}


def _converts(node: Node) -> bool:
    implicit = node.kind == "ImplicitCastExpr" and "part_of_explicit_cast" not in node.rest
    return implicit and "<FloatingCast>" in node.rest


def _element(written: str) -> str:
    word = (written.split() or [""])[-1]
    return "bfloat" if word == "__bf16" else word


def _becomes_bools(above: Sequence[Node]) -> bool:
    """Tell whether a mask goes where only true and false matter."""
    user = next((a for a in reversed(above) if a.kind not in PASSES_A_MASK_ON), None)
    if user is None:
        return False
    return "__msl_bools" in user.rest or bool(TAKES_A_MASK.search(user.callee))


def _recursion(ir: str) -> str | None:
    """Name a function that calls itself, over however many others."""
    calls: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in ir.split("\n"):
        if match := FUNCTION.match(line):
            current = calls.setdefault(match[1], set())
        elif " call " in line:
            current.update(CALLED.findall(line))
    return next((name for name in calls if _reaches(calls, name)), None)


def _reaches(calls: dict[str, set[str]], name: str) -> bool:
    seen: set[str] = set()
    ahead = set(calls[name])
    while ahead:
        if name in ahead:
            return True
        seen |= ahead
        ahead = {callee for caller in ahead for callee in calls.get(caller, ())} - seen
    return False
