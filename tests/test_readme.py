"""What the pages show works: commands parse, names can be imported, links exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import internvl3_mlx
from internvl3_mlx.cli.main import COMMANDS, main

ROOT = Path(internvl3_mlx.__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs/guide").glob("*.md")),
    "docs/metal.md",
    "docs/quantization.md",
)
OTHER_PAGES = (
    "CHANGELOG.md",
    "docs/README.md",
    "docs/glossary.md",
    "docs/performance.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs/adr").glob("*.md")),
)
MAX_README_WORDS = 900
ENDS = {"|", ">", "&&"}


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of one language on all pages."""
    pages = "\n".join((ROOT / page).read_text("utf-8") for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", pages, re.DOTALL)


def commands() -> list[list[str]]:
    """List the words after each ``internvl3``, up to a pipe or the next command."""
    found = []
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        for start, word in enumerate(words):
            if word == "internvl3":
                rest = words[start + 1 :]
                stop = next((at for at, word in enumerate(rest) if word in ENDS), len(rest))
                found.append(rest[:stop])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_on_the_pages_parses(words):
    name, *rest = words
    assert name in COMMANDS
    context = main.make_context("internvl3", [])
    command = main.get_command(context, name)
    command.make_context(name, rest, parent=context)


def test_the_first_command_asks_about_an_image_that_ships():
    first = commands()[0]
    assert first[first.index("--model") + 1] == "demo"
    assert (ROOT / first[1]).is_file()


@pytest.mark.parametrize("code", blocks("python"))
def test_every_name_that_python_examples_import_exists(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "internvl3_mlx":
            assert {alias.name for alias in node.names} <= {*internvl3_mlx.__all__}


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES])
def test_links_between_pages_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text("utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_published_size_is_in_the_table():
    from internvl3_mlx.config.published import PUBLISHED_SIZES

    page = (ROOT / "docs/guide/models.md").read_text("utf-8")
    table = re.findall(r"^\| `(\w[\w.-]*)` \| (\S+) \|", page, re.M)
    assert dict(table) == {name: size.repo for name, size in PUBLISHED_SIZES.items()}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= MAX_README_WORDS


def test_the_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text("utf-8")
    linked = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", index)}
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {(ROOT / "docs/README.md").resolve()} <= linked


def test_the_glossary_has_sixty_words_at_most():
    rows = re.findall(r"^\| (?!word \|)", (ROOT / "docs/glossary.md").read_text("utf-8"), re.M)
    assert len(rows) <= 60


def test_the_python_guide_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "internvl3_mlx").symlink_to(ROOT / "internvl3_mlx")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/guide/python.md").read_text("utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    exec(compile(code, "docs/guide/python.md", "exec"), {})  # the page is ours
    assert capsys.readouterr().out.startswith("dog ")
    assert (tmp_path / "demo-8bit" / "config.json").is_file()
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
