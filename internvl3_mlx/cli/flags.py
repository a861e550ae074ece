"""Click options made from descriptions of settings, and a help that is grouped and has examples.

A ``FieldInfo`` holds the help, section, bounds and spellings of a setting. A flag that is not given
passes no value, so that defaults stay with the code that uses them.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

import click

from internvl3_mlx.cli.layout import wrap_text
from internvl3_mlx.option_fields import FieldInfo, field_info, field_type

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]
OTHER_SECTION = "Other"
HELP_MARGIN, MIN_HELP_WIDTH = 2, 30
FIRST_COLUMN, TWO_COLUMNS = 30, 78  # the terms of a list, and the width that both columns need
LINE_CONTINUES = " \\"
SECTIONS = (
    "Question", "Images", "Answer", "Reasoning", "Best of N", "Critic", "Model", "Network",
    "Serving", "Limits", "Data", "Training", "Weights", "Preference", "GRPO", "Distillation",
    "Run", "Quantization", "Quality",
    "Upload", "Output", "Speed", "Memory", "Positions", OTHER_SECTION,
)  # fmt: skip
TYPES = {int: click.INT, float: click.FLOAT, str: click.STRING, tuple: click.STRING}
METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "NAMES"}


class HelpContext(click.Context):
    """A context whose help fits terminals from 40 columns; click's own takes 50 at least."""

    def make_formatter(self) -> click.HelpFormatter:
        columns = shutil.get_terminal_size().columns
        width = max(min(columns, self.max_content_width or columns) - HELP_MARGIN, MIN_HELP_WIDTH)
        return HelpFormatter(width=width)


class HelpFormatter(click.HelpFormatter):
    """Writes a list in two columns, or on a narrow terminal the description below its term."""

    def write_dl(
        self,
        rows: Iterable[tuple[str, str]],
        col_max: int = FIRST_COLUMN,
        col_spacing: int = 2,
    ) -> None:
        rows = list(rows)
        narrow = self.width < TWO_COLUMNS and max(len(term) for term, _ in rows) > self.width // 3
        if not narrow:
            super().write_dl(rows, col_max, col_spacing)
            return
        both = " /\n" + " " * self.current_indent  # --flag / --no-flag
        super().write_dl([(term.replace(" / ", both), text) for term, text in rows], 2)


class SectionedOption(click.Option):
    """An option that appears under its own heading in the help."""

    def __init__(self, *args: Any, section: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section = section

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Show defaults without parentheses, and leave ranges to the error message."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        if "default" in extra:
            extra["default"] = extra["default"].strip("()")
        return extra


class SectionedCommand(click.Command):
    """A command whose help groups its options under headings and ends with examples.

    examples: command lines with a comment each.
    suggestions: flags that people may try, each with the flag that the error suggests instead.
    """

    context_class = HelpContext

    def __init__(
        self,
        *args: Any,
        examples: Sequence[tuple[str, str]] = (),
        suggestions: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.suggestions = dict(suggestions or {})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in SECTIONS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections[getattr(param, "section", OTHER_SECTION)].append(record)
        for title in filter(sections.get, SECTIONS):
            with formatter.section(title):
                formatter.write_dl(sections[title])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                indent = " " * formatter.current_indent
                width = formatter.width - len(indent) - len(LINE_CONTINUES)
                for command, comment in self.examples:
                    lines = [*wrap_text(f"# {comment}", width)]
                    lines += f"{LINE_CONTINUES}\n  ".join(wrap_text(command, width)).split("\n")
                    formatter.write("".join(f"{indent}{line}\n" for line in lines))
        super().format_epilog(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            suggested = self.suggestions.get(error.option_name)
            if suggested is None:
                raise
            message = f"no such option {error.option_name!r}; did you mean {suggested}?"
            raise click.UsageError(message, error.ctx) from error


def flag(section: str, *names: str, **kwargs: Any) -> Decorator:
    """Declare one option under a heading of the help."""
    return click.option(*names, cls=SectionedOption, section=section, **kwargs)


def apply_flags(flags: Iterable[Decorator], command: Function) -> Function:
    """Give ``command`` some flags, to be listed in this order."""
    for declare in reversed([*flags]):
        command = declare(command)
    return command


def flags_from(cls: type, special: Mapping[str, Decorator] | None = None) -> Decorator:
    """Return a decorator that gives a command a flag for each described field of a dataclass.

    special: flags made elsewhere, by field name.
    """
    special = special or {}
    flags = [
        special[entry.name] if entry.name in special else flag_from_field(cls, entry)
        for entry in fields(cls)
        if entry.metadata or entry.name in special
    ]
    return lambda command: apply_flags(flags, command)


def flag_from_field(cls: type, entry: "Field[Any]", default_text: str = "") -> Decorator:
    """Make a flag from one field of a dataclass."""
    kind, _ = field_type(cls, entry.name)
    default = None if entry.default is MISSING else entry.default
    return make_flag(entry.name, field_info(entry), kind, default, default_text)


def make_flag(
    name: str, info: FieldInfo, kind: type, default: object, default_text: str = "", **extra: Any
) -> Decorator:
    """Make a flag from the description of a setting, its type and the default it shows."""
    shown = default_text or info.default_text or format_default(default)
    if kind is bool:
        spellings, more = switch_arguments(name, info)
    else:
        spellings, more = info.flags or (flag_name(name),), value_arguments(info, kind)
    if "flag_value" in more:
        shown = ""
    arguments = {"help": info.help, "default": None, "show_default": shown or False}
    return flag(info.section, *spellings, name, **{**arguments, **more, **extra})


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def switch_arguments(name: str, info: FieldInfo) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return spellings and click arguments of a switch.

    A switch has --x and --no-x, unless the field has its own spelling: that one turns it on, or
    off if it begins with --no-.
    """
    if not info.flags:
        on = flag_name(name)
        return (f"{on}/--no-{on[2:]}",), {}
    turns_on = not any(spelling.startswith("--no-") for spelling in info.flags)
    return info.flags, {"flag_value": turns_on, "type": bool}


def value_arguments(info: FieldInfo, kind: type) -> dict[str, Any]:
    if info.choices:
        return {"type": click.Choice(info.choices), "metavar": info.metavar or None}
    return {"type": TYPES[kind], "metavar": info.metavar or METAVARS[kind]}


def format_default(value: object) -> str:
    """Format a default for the help; nothing for None."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
