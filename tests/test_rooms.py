"""House rules that a machine can check: who imports whom, who prints, how long is too long."""

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import internvl3_mlx

ROOT = Path(internvl3_mlx.__file__).parents[1]
PACKAGE = "internvl3_mlx"
ROOMS_AT_THE_ROOT = ("convert", "metal_kernels")

# A room imports only from its own group's members' left: same group, no imports between two rooms.
ORDER = (
    ("install_hint", "durable", "native_output", "demo", "prefetch", "ending_signals"),
    ("errors",),
    ("write_guards", "user_paths"),
    ("files", "json_files", "yaml_files", "device", "option_fields", "distributed"),
    ("disk",),
    ("metrics", "records"),
    ("memory", "gpu_errors", "affine_quantize"),
    ("config",),
    ("images", "prompt", "metal_kernels"),
    ("models",),
    ("checkpoints",),
    ("adapters",),
    ("convert",),
    ("loading",),
    ("generation", "conversion"),
    ("test_time_scaling",),
    ("vlm",),
    ("evaluation",),
    ("training", "profiling"),
    ("serving",),
    ("multi_host",),
    ("cli",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
OUTSIDE = ("__init__", "__main__")  # the package's front door names every room

# library -> the rooms that may import it at all
HOMES = {
    "PIL": {"images", "evaluation"},  # evaluation renders images of its own
    "pillow_heif": {"images"},
    "av": {"images"},
    "pypdfium2": {"images"},
    "llguidance": {"generation"},
    "tokenizers": {"prompt"},
    "jinja2": {"prompt"},
    "click": {"cli"},
    "rich": {"cli"},
    "prompt_toolkit": {"cli"},
    "segno": {"cli"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "pydantic": {"serving"},
    "pydantic_core": {"serving"},
}
SLOW = {"transformers", "mlx_lm"}  # seconds to import, so never at the top of a module
LONGEST_FUNCTION, LONGEST_FILE = 60, 400


@cache
def source_files() -> list[Path]:
    """List our modules. ``rglob`` follows no symlinks: the rooms at the root are added."""
    folders = [ROOT / PACKAGE, *(ROOT / room for room in ROOMS_AT_THE_ROOT)]
    found = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return [
        path
        for path in found
        if not any((ROOT / PACKAGE / room) in path.parents for room in ROOMS_AT_THE_ROOT)
    ]


def room_of(path: Path) -> str:
    first, *rest = path.relative_to(ROOT).parts
    return first if first in ROOMS_AT_THE_ROOT else Path(rest[0]).stem


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Yield what is imported, dotted; ``from internvl3_mlx import load`` gives where load lives."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                home = internvl3_mlx.HOMES.get(alias.name, alias.name)
                yield f"{PACKAGE}.{home}" if module == PACKAGE else module


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs when the module is imported: no function bodies, nothing for checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from at_import_time(node)


@cache
def tree_of(path: Path) -> ast.AST:
    return ast.parse(path.read_text("utf-8"))


def violations(check: Callable[[Path], object]) -> dict[str, object]:
    """Return what a check finds, by file; all files at once, since each would be a test of 5 ms."""
    found = {str(path.relative_to(ROOT)): check(path) for path in source_files()}
    return {name: wrong for name, wrong in found.items() if wrong}


def test_every_room_has_a_place_in_the_order():
    assert {room_of(path) for path in source_files()} - {*OUTSIDE} <= {*RANK}


def test_a_room_imports_only_from_rooms_to_its_left():
    assert violations(imported_from_the_right) == {}


def imported_from_the_right(path: Path) -> set[str]:
    room = room_of(path)
    if room in OUTSIDE:
        return set()
    names = [name.split(".") for name in imports(ast.walk(tree_of(path)))]
    rooms = {name[1] for name in names if name[0] == PACKAGE and len(name) > 1}
    rooms -= {room, "__version__"}
    return {other for other in rooms if RANK[other] >= RANK[room]}


Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def import_graph() -> Graph:
    """Map each module to those it imports anywhere: lazily and for type checkers too.

    The package's front door names every room, so it is left out.
    """
    paths = {module_name(path): path for path in source_files() if room_of(path) not in OUTSIDE}
    return {
        name: imported_modules(tree_of(path), {*paths}) - {name} for name, path in paths.items()
    }


def imported_modules(tree: ast.AST, modules: set[str]) -> set[str]:
    """Give those of ``modules`` that a file imports; ``from a import b`` may import module a.b."""
    found = {*imports(ast.walk(tree))}
    found |= {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return found & modules


def circles(graph: Graph) -> list[list[str]]:
    """List the groups of nodes that reach each other (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            at = stack.index(node)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in order:
            visit(node)
    return sorted(found)


def test_no_imports_form_a_circle():
    assert circles(import_graph()) == []


def test_no_imports_between_packages_form_a_circle():
    rooms: Graph = {}
    for name, imported in import_graph().items():
        room = name.split(".")[1]
        rooms.setdefault(room, set()).update(other.split(".")[1] for other in imported)
    assert circles({room: others - {room} for room, others in rooms.items()}) == []


def test_circles_through_lazy_and_checking_imports_are_found():
    lazy = "def f():\n from internvl3_mlx.b import c\n"
    checking = "if TYPE_CHECKING:\n from internvl3_mlx import a\n"
    modules = {"internvl3_mlx.a", "internvl3_mlx.b", "internvl3_mlx.b.c"}
    graph = {
        "internvl3_mlx.a": imported_modules(ast.parse(lazy), modules),
        "internvl3_mlx.b.c": imported_modules(ast.parse(checking), modules),
    }
    assert circles(graph) == [["internvl3_mlx.a", "internvl3_mlx.b.c"]]
    assert circles(
        {"1": {"2"}, "2": {"3", "4"}, "3": {"1"}, "4": {"5"}, "5": {"4"}, "6": {"1"}}
    ) == [
        ["1", "2", "3"],
        ["4", "5"],
    ]
    assert circles({"1": {"2", "3"}, "2": {"3"}, "3": set()}) == []


def test_a_library_stays_in_its_room():
    assert violations(libraries_astray) == {}


def libraries_astray(path: Path) -> set[str]:
    names = {name.split(".")[0] for name in imports(ast.walk(tree_of(path)))}
    return {name for name in names & {*HOMES} if room_of(path) not in HOMES[name]}


def test_slow_libraries_are_imported_inside_functions():
    assert violations(slow_imports) == {}


def slow_imports(path: Path) -> set[str]:
    return SLOW & {name.split(".")[0] for name in imports(at_import_time(tree_of(path)))}


def test_imports_are_absolute():
    assert violations(relative_imports) == {}


def relative_imports(path: Path) -> list[int]:
    """Return the lines of relative imports."""
    nodes = ast.walk(tree_of(path))
    return [node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


def test_only_the_screen_prints():
    assert violations(prints) == {}


def prints(path: Path) -> list[int]:
    """Return the lines that print."""
    if path.relative_to(ROOT) == Path(PACKAGE, "cli", "console.py"):
        return []
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if getattr(call.func, "id", "") == "print"
        or getattr(call.func, "attr", "") in {"echo", "secho"}
    ]


def test_functions_keep_their_budget():
    assert violations(long_functions) == {}


def long_functions(path: Path) -> dict[str, int]:
    functions = [
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {node.name: code_lines(node) for node in functions}
    return {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION}


def test_files_keep_their_budget():
    assert violations(lines_too_many) == {}


def lines_too_many(path: Path) -> int:
    return max(0, len(path.read_text("utf-8").splitlines()) - LONGEST_FILE)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines; the docstring of a public function may describe each argument."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function) is not None
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_the_checks_see_every_room():
    rooms = {room_of(path) for path in source_files()}
    assert {"cli", "convert", "metal_kernels", "errors"} <= rooms
    assert violations(room_of).keys() == {str(path.relative_to(ROOT)) for path in source_files()}


def test_every_check_finds_what_it_looks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / PACKAGE / "models" / "wrong.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import click, mlx_lm\nfrom . import layers\nfrom internvl3_mlx.cli import main\n"
        "def long():\n    print(1)\n" + 60 * "    pass\n" + 400 * "\n"
    )
    assert imported_from_the_right(path) == {"cli"}
    assert libraries_astray(path) == {"click"}
    assert slow_imports(path) == {"mlx_lm"}
    assert relative_imports(path) == [2]
    assert prints(path) == [5]
    assert long_functions(path) == {"long": 62}
    assert lines_too_many(path) == 65


def test_imports_of_every_form_are_seen():
    code = "import a.b, c\nfrom d.e import f\nfrom internvl3_mlx import load, config\n"
    assert [*imports(ast.walk(ast.parse(code)))] == [
        "a.b",
        "c",
        "d.e",
        "internvl3_mlx.vlm",
        "internvl3_mlx.config",
    ]


def test_what_runs_on_import_excludes_functions_and_checkers():
    code = (
        "if TYPE_CHECKING:\n import a\n"
        "def f():\n import b\n"
        "class C:\n import c\n def g(self):\n  import d\n"
    )
    assert [*imports(at_import_time(ast.parse(code)))] == ["c"]
