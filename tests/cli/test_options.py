from dataclasses import fields

import pytest

from internvl3_mlx.cli import options
from internvl3_mlx.cli.convert import convert_command
from internvl3_mlx.cli.generate import generate_command
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


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_the_help_names_the_default_that_is_used(name):
    default = DEFAULTS[name]
    chosen_elsewhere = "what suits the device" if name == "prefill_step_size" else "the model's own"
    assert SHOWN[name] == (chosen_elsewhere if default is None else str(default))


def test_a_flag_that_is_not_given_has_no_value_of_its_own():
    given = {
        param.name: param.default for param in generate_command.params if param.name in DEFAULTS
    }
    context = generate_command.make_context("generate", ["-p", "why?"])
    assert {name for name in given if context.params[name] not in (None, ())} == set()


def test_every_flag_says_what_it_does():
    flags = [
        param for param in generate_command.params if isinstance(param, options.SectionedOption)
    ]
    assert [flag.name for flag in flags if not (flag.help or flag.hidden)] == []


def test_every_heading_of_the_help_is_in_use():
    params = [*generate_command.params, *convert_command.params, *train_command.params]
    used = {getattr(param, "section", options.OTHER_SECTION) for param in params}
    assert used == {*options.SECTIONS}


def test_every_setting_is_written_once():
    spellings = [name for param in generate_command.params for name in param.opts]
    assert len(spellings) == len(set(spellings))
