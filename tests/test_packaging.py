"""What is built and installed is the tree, all of it and nothing else."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import internvl3_mlx

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it to Python 3.10

ROOT = Path(internvl3_mlx.__file__).parents[1]
PACKAGE = "internvl3_mlx"
ROOMS_AT_THE_ROOT = ("convert", "metal_kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
# mlx-lm requires transformers, which requires safetensors; naming them again would only add a
# second bound. torch is used where it is installed, for an independent check.
BY_OTHERS = {"transformers", "safetensors", "torch"}
# where a library's import name is not its distribution's
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "pydantic_core": "pydantic"}


def package_files() -> set[str]:
    """List the package's files as a wheel should hold them, the two rooms at the root included."""
    found = files_below(ROOT / PACKAGE, PACKAGE) - {
        f"{PACKAGE}/{room}" for room in ROOMS_AT_THE_ROOT
    }
    for room in ROOMS_AT_THE_ROOT:
        found |= files_below(ROOT / room, f"{PACKAGE}/{room}")
    return found


def files_below(folder: Path, name: str) -> set[str]:
    """List a folder's files under the name that it is installed by; links are not followed."""
    return {
        Path(name, inside, file).relative_to(".").as_posix()
        for place, _, files in os.walk(folder)
        for inside in [Path(place).relative_to(folder)]
        for file in files
        if "__pycache__" not in place and not file.startswith(".")
    }


def sources() -> list[Path]:
    folders = [ROOT / PACKAGE, *(ROOT / room for room in ROOMS_AT_THE_ROOT)]
    return [path for folder in folders for path in folder.rglob("*.py")]


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line).group().lower().replace("_", "-") for line in requirements}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Build a wheel from a copy, so that no leftover of an earlier build slips in."""
    copy, out = tmp_path_factory.mktemp("copy") / "project", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_every_package_is_listed():
    tree = {
        name.removesuffix("/__init__.py").replace("/", ".")
        for name in package_files()
        if name.endswith("/__init__.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(tree)


def test_the_wheel_holds_the_package_and_nothing_else_at_its_top(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    version = PROJECT["project"]["version"]
    assert tops == {PACKAGE, f"{PACKAGE}-{version}.dist-info"}


def test_the_wheel_holds_every_file_of_the_package(wheel):
    built = {name for name in wheel.namelist() if name.startswith(f"{PACKAGE}/")}
    assert built == package_files()


def test_the_wheel_carries_licence_notice_and_both_scripts(wheel):
    info = f"{PACKAGE}-{PROJECT['project']['version']}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= {*wheel.namelist()}
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "internvl3 = internvl3_mlx.cli.main:run" in scripts
    assert "internvl3-mlx = internvl3_mlx.cli.main:run" in scripts


@pytest.mark.parametrize("room", ROOMS_AT_THE_ROOT)
def test_a_room_at_the_root_is_linked_into_the_package(room):
    if not (ROOT / PACKAGE / room).is_symlink():
        pytest.skip("a tree without links")
    assert os.readlink(ROOT / PACKAGE / room) == f"../{room}"


@pytest.mark.parametrize("room", ROOMS_AT_THE_ROOT)
def test_a_room_at_the_root_refuses_a_second_name(room):
    done = subprocess.run(
        [sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True
    )
    advice = f"ImportError: import this package as internvl3_mlx.{room}, not as {room}"
    assert done.stderr.splitlines()[-1] == advice


UNTRACKED = shutil.ignore_patterns(".git", "venv", "build", "dist", "*.egg-info", "__pycache__")


def without_links(tree: Path, *, as_text: bool) -> Path:
    """Copy the project into ``tree``; its links become text files, or are missing."""
    shutil.copytree(ROOT, tree, symlinks=True, ignore=UNTRACKED)
    for room in ROOMS_AT_THE_ROOT:
        (tree / PACKAGE / room).unlink(missing_ok=True)
        if as_text:
            (tree / PACKAGE / room).write_text(f"../{room}")
    return tree


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Build an sdist from a copy and unpack it."""
    copy, out = tmp_path_factory.mktemp("copy") / "project", tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=UNTRACKED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(out, filter="data")
    return out / path.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def text_links(tmp_path_factory) -> Path:
    """Make the tree that a ZIP, or a checkout without symlinks, unpacks to."""
    return without_links(tmp_path_factory.mktemp("text") / "project", as_text=True)


@pytest.fixture(scope="module")
def no_links(tmp_path_factory) -> Path:
    return without_links(tmp_path_factory.mktemp("none") / "project", as_text=False)


@pytest.mark.parametrize("tree", ["sdist", "text_links", "no_links"])
def test_a_tree_without_links_imports_and_runs(tree, request):
    folder = request.getfixturevalue(tree)
    code = (
        "import internvl3_mlx.convert.calibration as calibration, internvl3_mlx.metal_kernels as m;"
        "print(calibration.__file__, m.__file__)"
    )
    assert run_in(folder, "-c", code).split() == [
        str(folder / "convert" / "calibration" / "__init__.py"),
        str(folder / "metal_kernels" / "__init__.py"),
    ]
    question = ["--model", "demo", "--prompt", "What is this?", "--max-tokens", "2", "--json"]
    answer = json.loads(run_in(folder, "-m", PACKAGE, "generate", *question))
    assert answer["text"]


QUICK_TESTS = (  # those that load torch take ten times as long
    "tests/metal_kernels/test_launch_plan.py",
    "tests/test_rooms.py::test_the_checks_see_every_room",
)


@pytest.mark.parametrize("tree", ["sdist", "text_links"])
def test_a_tree_without_links_passes_its_tests(tree, request):
    folder = request.getfixturevalue(tree)
    assert " passed" in run_in(
        folder, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *QUICK_TESTS
    )


def run_in(folder: Path, *arguments: str) -> str:
    """Run Python in a tree with nothing of ours installed before it on the path."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk all but what type checkers alone read."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from runtime_nodes(node)


def test_what_is_imported_is_declared():
    nodes = [
        node for path in sources() for node in runtime_nodes(ast.parse(path.read_text("utf-8")))
    ]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    libraries = {name.split(".")[0] for name in names} - {PACKAGE, *sys.stdlib_module_names}
    extras = PROJECT["project"]["optional-dependencies"]
    declared = requirement_names(PROJECT["project"]["dependencies"] + extras["all"])
    for extra in ("video", "heic", "pdf", "structured", "server"):
        declared |= requirement_names(extras[extra])
    wanted = {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in libraries}
    assert wanted - declared - BY_OTHERS == set()


def test_dependencies_have_lower_bounds_only():
    extras = PROJECT["project"]["optional-dependencies"]
    libraries = (extras[name] for name in ("video", "heic", "pdf", "structured", "server", "cuda"))
    ours = [*PROJECT["project"]["dependencies"], *(line for lines in libraries for line in lines)]
    for requirement in ours:
        bound = requirement.split(";")[0]
        assert re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+", bound), requirement


def test_the_changelog_knows_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{PROJECT['project']['version']}]" in changelog


def test_importing_the_package_imports_no_library():
    code = "import sys, internvl3_mlx; print(sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    heavy = {"mlx", "numpy", "PIL", "tokenizers", "huggingface_hub", "transformers", "click"}
    assert not heavy & {*ast.literal_eval(done.stdout)}


@pytest.mark.parametrize("name", internvl3_mlx.__all__)
def test_every_public_name_is_found(name):
    assert getattr(internvl3_mlx, name)
    assert name in dir(internvl3_mlx)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'internvl3_mlx' has no attribute 'lod'"):
        _ = internvl3_mlx.lod
