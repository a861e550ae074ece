import shlex
from dataclasses import fields

import click
import pytest

from internvl3_mlx.cli import options
from internvl3_mlx.cli.flags import OTHER_SECTION, SECTIONS, SectionedOption, format_default
from internvl3_mlx.cli.generate import generate_command
from internvl3_mlx.cli.main import COMMANDS, main
from internvl3_mlx.cli.slash_commands import COMMANDS_BY_NAME
from internvl3_mlx.cli.train import train_command
from internvl3_mlx.generation.generation_config import GenerationConfig

DEFAULTS = {field.name: field.default for field in fields(GenerationConfig)}
SHOWN = {
    param.name: param.show_default
    for param in generate_command.params
    if isinstance(getattr(param, "show_default", None), str)
}


def test_every_setting_but_those_of_a_conversation_has_a_flag():
    assert {*DEFAULTS} - {*options.GENERATION_FLAGS} == {"history", "video"}
    assert {*options.GENERATION_FLAGS} <= {*DEFAULTS}


@pytest.mark.parametrize("name", sorted(SHOWN.keys() & DEFAULTS.keys()))
def test_the_help_names_the_default_that_is_used(name):
    default = DEFAULTS[name]
    elsewhere = "depends on the device" if name == "prefill_step_size" else "the model's own"
    assert SHOWN[name] == (elsewhere if default is None else format_default(default))


def test_a_flag_that_is_not_given_has_no_value_of_its_own():
    given = {
        param.name: param.default for param in generate_command.params if param.name in DEFAULTS
    }
    context = generate_command.make_context("generate", ["-p", "why?"])
    assert {name for name in given if context.params[name] not in (None, ())} == set()


def test_every_flag_says_what_it_does():
    flags = [param for param in generate_command.params if isinstance(param, SectionedOption)]
    assert [flag.name for flag in flags if not (flag.help or flag.hidden)] == []


def test_every_heading_of_the_help_is_in_use():
    params = [param for command in commands() for param in command.params]
    used = {getattr(param, "section", OTHER_SECTION) for param in params} | {OTHER_SECTION}
    assert used == {*SECTIONS}


def test_every_setting_is_written_once():
    spellings = [name for param in generate_command.params for name in param.opts]
    assert len(spellings) == len(set(spellings))


def named_commands():
    """Yield each command with the words that call it; a group's own task is its command run."""
    context = main.make_context("internvl3", [])
    for name in COMMANDS:
        command = main.get_command(context, name)
        if not isinstance(command, click.Group):
            yield [name], command
            continue
        for part, member in command.commands.items():
            yield [name] if part == "run" else [name, part], member


def commands():
    return [command for _, command in named_commands()]


def test_every_command_ends_its_help_with_two_or_three_examples_that_parse():
    for names, command in named_commands():
        assert len(command.examples) in (2, 3), command.name
        for line, comment in command.examples:
            words = shlex.split(line.removeprefix('eval "$(').removesuffix(')"'), comments=True)
            given = words[1 : words.index("|") if "|" in words else None]
            called, rest = given[: len(names)], given[len(names) :]
            rest = rest[: rest.index(">")] if ">" in rest else rest
            assert (words[0], called) == ("internvl3", names)
            command.make_context(names[-1], rest, resilient_parsing=False)
            assert comment


def test_a_flag_has_one_meaning_in_all_commands():
    meanings = {}
    for command in commands():
        for param in command.params:
            if isinstance(param, click.Option):
                takes = "choice" if isinstance(param.type, click.Choice) else param.metavar
                for spelling in [*param.opts, *param.secondary_opts]:
                    meanings.setdefault(spelling, set()).add((param.is_flag, takes))
    meanings["--q-bits"].discard((False, "N"))  # convert takes any bits, load those of a cache
    # the adapter: train writes it to a folder, the others read it, from the hub as well
    meanings["--adapter-path"].discard((False, "FOLDER"))
    [written] = [param for param in train_command.params if "--adapter-path" in param.opts]
    assert written.metavar == "FOLDER"
    assert {flag: found for flag, found in meanings.items() if len(found) > 1} == {}


def test_suggested_flags_exist():
    for command in commands():
        known = {
            spelling
            for param in command.params
            for spelling in [*param.opts, *param.secondary_opts]
        }
        for former, suggested in command.suggestions.items():
            assert former not in known
            assert suggested.split()[0] in {*known, *COMMANDS, *COMMANDS_BY_NAME}
