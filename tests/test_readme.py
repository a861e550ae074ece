"""What the pages promise can be typed: every command parses, every name can be imported."""

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
    *(f"docs/guide/{name}.md" for name in ("command-line", "chat", "training", "adapters")),
    "docs/metal.md",
)
ENDS = {"|", ">", "&&"}


def blocks(language: str) -> list[str]:
    """Cut the fenced blocks of one language out of all pages."""
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


def test_the_first_command_asks_about_a_picture_that_ships():
    first = commands()[0]
    assert first[first.index("--model") + 1] == "demo"
    assert (ROOT / first[1]).is_file()


@pytest.mark.parametrize("code", blocks("python"))
def test_every_name_that_python_examples_import_exists(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "internvl3_mlx":
            assert {alias.name for alias in node.names} <= {*internvl3_mlx.__all__}


@pytest.mark.parametrize("page", [*PAGES, "docs/README.md", "CHANGELOG.md"])
def test_links_between_pages_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text("utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_published_size_is_in_the_table():
    from internvl3_mlx.loading.resolve import PUBLISHED_SIZES

    table = re.findall(r"^\| `(\w+)` \| (\S+) \|", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert dict(table) == {name: size.repo for name, size in PUBLISHED_SIZES.items()}
