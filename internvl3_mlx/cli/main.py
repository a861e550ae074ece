"""The command group: finds commands when they are used, and turns failures into one line each."""

import difflib
import errno
import sys
from importlib import import_module
from typing import NoReturn

import click

from internvl3_mlx.cli import console
from internvl3_mlx.cli.options import DEBUG_KEY
from internvl3_mlx.errors import InternVL3Error

# each is the function NAME_command in cli/NAME.py
COMMANDS = (
    "bench", "chat", "completion", "convert", "doctor", "fuse", "generate", "info", "train",
)  # fmt: skip
FAILED, INTERRUPTED = 1, 130


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"internvl3_mlx.cli.{cmd_name}")
        command = getattr(module, f"{cmd_name}_command")
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}; {advice}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        """Run the command. A broken pipe and click's own exits pass through; click ends them."""
        try:
            super().invoke(ctx)
            return
        except (click.exceptions.Exit, BrokenPipeError):
            raise
        except (KeyboardInterrupt, click.Abort):
            console.end_line()
            code = INTERRUPTED
        except Exception as error:  # noqa: BLE001  the last door: nobody should meet a traceback
            code = _report_failure(error, debug=ctx.meta.get(DEBUG_KEY, False))
        ctx.exit(code)


def _report_failure(error: Exception, *, debug: bool) -> int:
    """Say in one line what went wrong; return the exit code."""
    if debug:
        console.print_traceback(error)
    if isinstance(error, InternVL3Error):
        console.error(str(error))
        return error.exit_code
    if isinstance(error, click.ClickException):
        console.error(error.format_message())
        if isinstance(error, click.UsageError) and error.ctx is not None:
            console.hint(f"see {error.ctx.command_path} --help")
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        console.error(
            "cannot write the answer: no space left where it goes; make room and ask again"
        )
        return FAILED
    about = f"{type(error).__name__}: {error}".removesuffix(": ")
    console.error(about if debug else f"{about} (run again with --debug to see where)")
    return FAILED


def _show_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        import internvl3_mlx

        console.write_line(f"internvl3-mlx {internvl3_mlx.__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Print the version and leave.",
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """InternVL3 vision-language models on Apple silicon."""
    if ctx.invoked_subcommand is None:
        console.write_line(ctx.get_help())


def run() -> NoReturn:
    """Start the program: the two console scripts and ``python -m internvl3_mlx`` come here."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter must not end us
    main(prog_name="internvl3")
    raise SystemExit(0)
