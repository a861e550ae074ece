"""What Metal refuses and C++ for OpenCL accepts, read from clang's syntax tree and its LLVM IR."""

import re
from collections.abc import Iterator

NODE = re.compile(
    r"^[ |`-]*(\w+) 0x[0-9a-f]+ (?:parent 0x[0-9a-f]+ )?(?:prev 0x[0-9a-f]+ )?"
    r"<([^>]*(?:<[^>]*>[^>]*)*)>(.*)$"
)
PLACE = re.compile(r"\s*((?:line|col):[\d:]+|[^\s']+:\d+:\d+) ")
TYPE = re.compile(r"'([^']*)'(?::'([^']*)')?")
VARIABLES = {"VarDecl", "ParmVarDecl", "FieldDecl"}
FUNCTION = re.compile(r'^define .*?@"?([\w.$]+)"?\(')
CALLED = re.compile(r'@"?([\w.$]+)"?\(')


def lint(tree: str, ir: str, files: set[str]) -> list[str]:
    """List what Metal refuses in these files, one line each: ``file:line: error: ...``."""
    found = sorted(set(_in_tree(tree, files)))
    messages = [f"{file}:{line}: error: {message}" for file, line, message in found]
    if recursive := _recursion(ir):
        messages.append(f"error: recursive function call of {recursive}")
    return messages


def _in_tree(tree: str, files: set[str]) -> Iterator[tuple[str, int, str]]:
    place = _Place()
    skipped_below: int | None = None
    for line in tree.split("\n"):
        match = NODE.match(line)
        if not match:
            continue
        kind, extent, rest = match.groups()
        begin = place.enter(extent, rest)
        depth = len(line) - len(line.lstrip(" |`-"))
        if skipped_below is not None and depth > skipped_below:
            continue
        skipped_below = depth if kind.endswith("Decl") and " implicit" in rest else None
        if skipped_below is None and begin[0] in files:
            for message in _objections(kind, rest):
                yield *begin, message


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


def _objections(kind: str, rest: str) -> Iterator[str]:
    match = TYPE.search(rest)
    written = (match[2] or match[1]) if match else ""
    if kind in VARIABLES and " implicit " not in rest:
        name = (re.search(r"(\w+) '", rest) or ["", "?"])[1]
        if re.search(r"__generic [^*&]*[*&]", written) and "lambda" not in written:
            yield f"'{name}': a pointer or reference type needs an explicit address space"
        if kind == "VarDecl" and re.search(r"(^|[ ])__global [^*&]*$", written):
            yield f"'{name}': program-scope and static variables must be constant"
    if kind == "ImplicitCastExpr" and "part_of_explicit_cast" not in rest:
        if "<FloatingCast>" in rest and written.split()[-1:] in (["__bf16"], ["bfloat"]):
            yield "implicit conversion to bfloat is not allowed in Metal: cast explicitly"


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
