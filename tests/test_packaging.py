"""What is built and installed is the tree, all of it and nothing else."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
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
# where a library's import name is not its distribution's
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


def package_files() -> set[str]:
    """List the package's files as a wheel should hold them, the two linked rooms included."""
    return {
        Path(folder, name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / PACKAGE, followlinks=True)
        for name in names
        if "__pycache__" not in folder and not name.startswith(".")
    }


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
        str(Path(folder).relative_to(ROOT)).replace(os.sep, ".")
        for folder, _, names in os.walk(ROOT / PACKAGE, followlinks=True)
        if "__init__.py" in names
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
    assert os.readlink(ROOT / PACKAGE / room) == f"../{room}"


@pytest.mark.parametrize("room", ROOMS_AT_THE_ROOT)
def test_a_room_at_the_root_refuses_a_second_name(room):
    done = subprocess.run(
        [sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True
    )
    advice = f"ImportError: import this room as internvl3_mlx.{room}, not as {room}"
    assert done.stderr.splitlines()[-1] == advice


def test_what_is_imported_is_declared():
    nodes = [
        node
        for name in package_files()
        if name.endswith(".py")
        for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8")))
    ]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    libraries = {name.split(".")[0] for name in names} - {PACKAGE, *sys.stdlib_module_names}
    extras = PROJECT["project"]["optional-dependencies"]
    declared = requirement_names(PROJECT["project"]["dependencies"] + extras["all"])
    for extra in ("video", "heic", "pdf", "structured"):
        declared |= requirement_names(extras[extra])
    wanted = {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in libraries}
    # mlx-lm requires transformers; naming it again would only add a second bound
    assert wanted - declared - {"transformers"} == set()


def test_dependencies_have_lower_bounds_only():
    extras = PROJECT["project"]["optional-dependencies"]
    libraries = (extras[name] for name in ("video", "heic", "pdf", "structured", "cuda"))
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
