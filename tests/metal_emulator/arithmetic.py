"""Counters of the arithmetic that a kernel's threads do, put into its optimized LLVM IR.

Optimized, loops are unrolled and constants folded, as Apple's compiler will do: what is left is the
work. Vectors count by their elements. Of integer operations only those on bits count whose operands
come from memory: that is unpacking; the others make addresses, which no two compilers do alike.
"""

import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("bits", "conversions", "floats")
OPCODES = {
    **dict.fromkeys(("and", "or", "xor", "shl", "lshr", "ashr"), "bits"),
    **dict.fromkeys(("uitofp", "sitofp", "fptoui", "fptosi", "fpext", "fptrunc"), "conversions"),
    **dict.fromkeys(("fadd", "fsub", "fmul", "fdiv", "fneg"), "floats"),
}
OPERATION = re.compile(
    r"^\s+(%\S+) = (\w+)(?: [a-z]+)*? (?:<(\d+) x )?(i8|i16|i32|float|half|bfloat)\b"
)
FUSED = re.compile(
    r"^\s+%\S+ = (?:tail )?call (?:[a-z]+ )*(?:<(\d+) x )?float>? @(?:llvm\.fm|fmaf)"
)
LOAD = re.compile(r"^\s+(%\S+) = load [^,]+, ptr addrspace\([13]\)")  # device, threadgroup
DERIVED = re.compile(r"^\s+(%\S+) = (?:extractelement|trunc|zext|bitcast|select|phi|freeze)\b")
NAME = re.compile(r"%[\w.$-]+")
TERMINATOR = re.compile(r"^  (?:br|ret|switch|unreachable)\b")
TABLE = "@__msl_arithmetic"


def with_counters(ir: str) -> str:
    """Add what each basic block does to a table, whenever it is run."""
    out: list[str] = []
    counted: Counter[str] = Counter()
    data: set[str] = set()
    for number, line in enumerate(ir.split("\n")):
        if line.startswith("define "):
            counted.clear()
            data.clear()
        counted.update(work(line, data))
        if TERMINATOR.match(line):
            out += additions(counted, number)
            counted.clear()
        out.append(line)
    return "\n".join([*out, f"{TABLE} = global [{len(KINDS)} x i64] zeroinitializer"])


def work(line: str, data: set[str]) -> dict[str, int]:
    """Return the operations of one line of IR, by kind; ``data``: names of what memory held."""
    if loaded := LOAD.match(line):
        data.add(loaded[1])
        return {}
    if fused := FUSED.match(line):
        return {"floats": int(fused[1] or 1)}
    found = OPERATION.match(line)
    kind = OPCODES.get(found[2]) if found else None
    if kind is None or kind == "bits":
        named = DERIVED.match(line) or (found if kind else None)
        if not named or data.isdisjoint(NAME.findall(line)):
            return {}
        data.add(named[1])
    return {kind: int(found[3] or 1)} if found and kind else {}


def additions(counted: Counter[str], number: int) -> Iterator[str]:
    """Yield the lines that add a block's operations."""
    for index, kind in enumerate(KINDS):
        if amount := counted[kind]:
            name = f"%__msl.{number}.{index}"
            place = f"getelementptr ([{len(KINDS)} x i64], ptr {TABLE}, i64 0, i64 {index})"
            yield f"  {name} = load i64, ptr {place}"
            yield f"  {name}.sum = add i64 {name}, {amount}"
            yield f"  store i64 {name}.sum, ptr {place}"
