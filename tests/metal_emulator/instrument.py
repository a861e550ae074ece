"""A call to the runtime before each access that a kernel's LLVM IR makes of shared memory."""

import os
import re
from collections.abc import Iterator

from metal_emulator.errors import KernelRefused

SIZES = {"float": 4, "half": 2, "bfloat": 2, "double": 8, "ptr": 8}
KIND = r"(<[^>]*>|\[[^\]]*\]|\w+|ptr(?: addrspace\(\d+\))?)"
NAME = r'(%[\w.$"-]+)'
LOAD = re.compile(
    rf"^\s+%\S+ = load (?:atomic |volatile )*{KIND}, ptr addrspace\((\d)\) {NAME}, align (\d+)"
)
STORE = re.compile(
    rf"^\s+store (?:atomic |volatile )*{KIND} .*?, ptr addrspace\((\d)\) {NAME}, align (\d+)"
)
POINTER = rf"ptr(?: addrspace\((\d)\))?([^,]*?)({NAME[1:-1]}|@\S+)"
COPY = re.compile(
    rf"^\s+call void @llvm\.mem(?:cpy|move|set)\.\S+\({POINTER}, "
    rf"(?:{POINTER}|i8 \S+), i64 (\S+), i1 \w+\)"
)
MISSED = re.compile(r"\s+(%\S+ = )?(load|store) (?!ptr).*addrspace\([1345]\) (?![@g])")
ATOMIC = re.compile(r"call void @__msl_atomic_(begin|end)")
DEBUG = re.compile(r", !dbg (![0-9]+)")
CONSTANT = re.compile(
    r'^(@[\w.$"]+) = (?!.*\bexternal\b).*?addrspace\(2\) (?:global|constant) (.*)', re.M
)
LARGEST = 0xFFFF  # what the size field of a call holds
WRITE, IS_ATOMIC, SPACE, ALIGNMENT = 1 << 16, 1 << 17, 18, 21  # runtime.h unpacks these


def instrument(ir: str) -> tuple[str, list[str]]:
    """Insert the calls; returns the IR and the sites, ``file:line:column``, that they name."""
    sites = Sites(ir)
    out: list[str] = []
    skipped = atomic = False
    for number, line in enumerate(ir.split("\n")):
        if line.startswith("define "):
            skipped = "@__msl_entry(" in line
        if found := ATOMIC.search(line):
            atomic = found[1] == "begin"
            continue
        if not skipped:
            for place, access in enumerate(accesses(line)):
                out += access.call(f"%__msl{number}.{place}", atomic, sites, line)
        out.append(line)
    out += [
        *_constant_tables(ir),
        "declare void @__msl_access(i64, i32, i32)",
        "declare void @__msl_access_many(i64, i64, i32, i32)",
    ]
    return "\n".join(out), sites.names


def without_marks(ir: str) -> str:
    """Take the atomic marks out of IR that runs unchecked."""
    return "\n".join(line for line in ir.split("\n") if not ATOMIC.search(line))


def _constant_tables(ir: str) -> Iterator[str]:
    """List the program's own constants for the runtime: where each lies and how long it is."""
    rows = []
    for name, rest in CONSTANT.findall(ir):
        size = f"ptrtoint (ptr getelementptr ({_first_type(rest)}, ptr null, i32 1) to i64)"
        place = f"ptr addrspacecast (ptr addrspace(2) {name} to ptr)"
        rows.append(f"{{ ptr, i64 }} {{ {place}, i64 {size} }}")
    yield f"@__msl_constant_count = constant i32 {len(rows)}"
    yield f"@__msl_constants = constant [{len(rows)} x {{ ptr, i64 }}] [{', '.join(rows)}]"


def _first_type(text: str) -> str:
    """Cut the type off that a constant's definition begins with."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "[<{") - (letter in "]>}")
        if depth == 0 and letter in "]>} ":
            return text[: index + (letter != " ")]
    raise KernelRefused(f"the emulator cannot read the constant {text}")


class Access:
    """One access: a pointer, its address space, how many bytes, and how they must be aligned."""

    def __init__(self, pointer: str, space: str, size: str, align: str, writes: bool) -> None:
        self.pointer, self.space, self.size, self.writes = pointer, space, size, writes
        self.align = (int(align) & -int(align)).bit_length() - 1

    def call(self, name: str, atomic: bool, sites: "Sites", line: str) -> Iterator[str]:
        """Write the instructions that tell the runtime of this access."""
        debug = DEBUG.search(line)
        tail, site = (debug[0] if debug else ""), sites.number(debug[1] if debug else "")
        info = int(self.space) << SPACE | self.align << ALIGNMENT
        info |= (WRITE if self.writes else 0) | (IS_ATOMIC if atomic else 0)
        yield f"  {name} = ptrtoint ptr addrspace({self.space}) {self.pointer} to i64{tail}"
        if self.size.isdigit() and int(self.size) <= LARGEST:
            info |= int(self.size)
            yield f"  call void @__msl_access(i64 {name}, i32 {info}, i32 {site}){tail}"
        else:
            arguments = f"i64 {name}, i64 {self.size}, i32 {info}, i32 {site}"
            yield f"  call void @__msl_access_many({arguments}){tail}"


def accesses(line: str) -> Iterator[Access]:
    """Find what one line of IR reads and writes outside the thread's own memory."""
    if "load " in line or "store " in line:
        load, store = LOAD.match(line), STORE.match(line)
        if found := load or store:
            kind, space, pointer, align = found.groups()
            if space != "0":
                yield Access(pointer, space, str(size_of(kind)), align, bool(store))
        elif MISSED.match(line) and "alloca" not in line:
            raise KernelRefused(f"the emulator cannot watch this access: {line.strip()}")
    elif "@llvm.mem" in line and "call" in line:
        if found := COPY.match(line):
            to_space, to_align, to, from_space, from_align, source, size = found.groups()
            if to_space and to.startswith("%"):
                yield Access(to, to_space, size, _alignment(to_align), writes=True)
            if from_space and source.startswith("%"):
                yield Access(source, from_space, size, _alignment(from_align), writes=False)
        elif "addrspace" in line:
            raise KernelRefused(f"the emulator cannot watch this copy: {line.strip()}")


def _alignment(attributes: str) -> str:
    found = re.search(r"align (\d+)", attributes)
    return found[1] if found else "1"


def size_of(kind: str) -> int:
    """Give the bytes of a type as LLVM writes it."""
    kind = kind.strip()
    if kind in SIZES:
        return SIZES[kind]
    if match := re.fullmatch(r"i(\d+)", kind):
        return max(1, int(match[1]) // 8)
    if match := re.fullmatch(r"[<\[](\d+) x (.+)[>\]]", kind):
        return int(match[1]) * size_of(match[2])
    if kind.startswith("ptr addrspace"):
        return SIZES["ptr"]
    raise KernelRefused(f"the emulator does not know the size of {kind}")


class Sites:
    """The places in the kernel's text that accesses come from, by their debug location."""

    def __init__(self, ir: str) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._files = dict(re.findall(r'^(!\d+) = !DIFile\(filename: "([^"]*)"', ir, re.M))
        self._scopes = {
            match[1]: tuple(re.search(rf"{key}: (!\d+)", match[2]) for key in ("file", "scope"))
            for match in re.finditer(
                r"^(!\d+) = (?:distinct )?!DI(?!Location)\w+\((.*)\)$", ir, re.M
            )
        }
        self._places = {
            match[1]: match.groups()[1:]
            for match in re.finditer(
                r"^(!\d+) = (?:distinct )?!DILocation\(line: (\d+)"
                r"(?:, column: (\d+))?, scope: (!\d+)",
                ir,
                re.M,
            )
        }

    def number(self, location: str) -> int:
        """Return the number of the site of a ``!dbg`` location."""
        if location not in self._numbers:
            self._numbers[location] = len(self.names)
            line, column, scope = self._places.get(location, ("?", "?", ""))
            self.names.append(f"{self._file(scope)}:{line}:{column or 0}")
        return self._numbers[location]

    def _file(self, scope: str) -> str:
        while scope in self._scopes:
            file, outer = self._scopes[scope]
            if file:
                return os.path.basename(self._files.get(file[1], "?"))
            if not outer:
                break
            scope = outer[1]
        return "?"
