"""Count modules, small files, import cycles, names used twice and README words.

``python -m benchmarks.code_size`` prints the table of docs/adr/0011-the-fields-words.md.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "internvl3_mlx"
LINKED = ("convert", "metal_kernels")  # packages at the repository root
SMALL_LINES = 60


def main() -> None:
    modules = {module_name(path): path for path in source_files()}
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules.items()}
    imports = {name: set(imported_modules(path, modules)) for name, path in modules.items()}
    rows = {
        "modules": len(modules),
        f"files under {SMALL_LINES} lines": sum(count < SMALL_LINES for count in lines.values()),
        "import cycles": len(find_cycles(imports)),
        "class names used twice": len(repeated_classes(modules)),
        "words in README": len((ROOT / "README.md").read_text("utf-8").split()),
    }
    for name, value in rows.items():
        print(f"| {name} | {value:,} |")
    for cycle in find_cycles(imports):
        print("cycle:", ", ".join(sorted(cycle)))
    print("used twice:", ", ".join(repeated_classes(modules)))


def source_files() -> list[Path]:
    folders = [ROOT / PACKAGE, *(ROOT / name for name in LINKED)]
    found = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    return sorted(found)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = (PACKAGE, *parts) if parts[0] in LINKED else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a file imports anywhere, lazily or for types.

    A package named on the way to one of its modules does not count.
    """
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in modules:
                    yield full
                elif node.module in modules and node.module != PACKAGE:
                    yield node.module


def find_cycles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of more than one module."""
    reach = {name: reachable(name, imports) for name in imports}
    found: list[set[str]] = []
    for name in imports:
        cycle = {other for other in reach[name] if name in reach.get(other, ())}
        if len(cycle) > 1 and cycle not in found:
            found.append(cycle)
    return found


def reachable(start: str, imports: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in imports.get(waiting.pop(), ()):
            if name not in seen:
                seen.add(name)
                waiting.append(name)
    return seen


def repeated_classes(modules: dict[str, Path]) -> list[str]:
    counts = Counter(
        node.name
        for path in modules.values()
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    return sorted(name for name, count in counts.items() if count > 1)


if __name__ == "__main__":
    main()
