"""The command group: imports commands when they are used and reports errors in one line."""

import os
from importlib import import_module
from typing import Any, NoReturn

import click

from internvl3_mlx.cli import console
from internvl3_mlx.cli.faults import describe_fault, is_explained
from internvl3_mlx.cli.flags import HelpContext
from internvl3_mlx.cli.options import DEBUG_KEY
from internvl3_mlx.cli.ranks import is_follower, is_launched, join_ranks, leave_ranks
from internvl3_mlx.cli.streams import name_home_folder, open_standard_streams, silence_output
from internvl3_mlx.errors import InternVL3Error
from internvl3_mlx.files import did_you_mean

# each is the function NAME_command in cli/NAME.py
COMMANDS = (
    "bench", "chat", "completion", "config", "convert", "doctor", "eval", "fuse", "generate",
    "history", "info", "launch", "models", "rollouts", "score", "serve", "train",
)  # fmt: skip
# commands of mlx-lm, ollama and LM Studio whose job another command does here
OTHER_PROGRAMS = {
    "lora": "internvl3 train fine-tunes",
    "run": "internvl3 chat starts a conversation",
    "pull": "internvl3 models pull downloads a model",
    "list": "internvl3 models lists the models on this machine",
    "ls": "internvl3 models lists the models on this machine",
    "rm": "internvl3 models rm removes a model",
    "show": "internvl3 info MODEL describes a model",
    "ps": "internvl3 serve keeps models loaded; internvl3 models lists those on this machine",
    "create": "internvl3 config set aliases.NAME.model MODEL names a model with settings",
    "cp": "internvl3 config set aliases.NAME.model MODEL names a model",
    "push": "internvl3 convert --upload-repo uploads a model",
    "upload": "internvl3 convert --upload-repo uploads a model",
    "download": "internvl3 models pull downloads a model",
    "ask": "internvl3 generate answers one question",
    "server": "internvl3 serve starts a server",
    "evaluate": "internvl3 eval evaluates a model",
    "benchmark": "internvl3 bench measures this machine",
    "quantize": "internvl3 convert -q quantizes a model",
    "dequantize": "internvl3 convert --dequantize does that",
    "merge": "internvl3 fuse merges an adapter into its model",
    "finetune": "internvl3 train fine-tunes",
    "fine-tune": "internvl3 train fine-tunes",
    "dora": "internvl3 train fine-tunes",
    "sft": "internvl3 train fine-tunes",
    "version": "internvl3 --version prints the version",
    "help": "internvl3 --help lists the commands, internvl3 COMMAND --help explains one",
}
FAILED, INTERRUPTED = 1, 130


class LazyGroup(click.Group):
    """A group that imports a command's module only when the command is used."""

    context_class = HelpContext

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"internvl3_mlx.cli.{cmd_name}")
        command = getattr(module, f"{cmd_name}_command")
        return command if isinstance(command, click.Command) else None

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Report a mistake in the group's own flags as one in a command's is."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            raise SystemExit(_report_failure(error, debug=False)) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            name = args[0]
            hint = OTHER_PROGRAMS.get(name) or did_you_mean(name, COMMANDS)
            raise click.UsageError(f"unknown command {name!r}; {hint}", ctx)
        follow = join_ranks(args[0]) if args and is_launched() else None
        if follow is not None:
            return args[0], click.Command(args[0], callback=lambda: ctx.exit(follow())), []
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        """Run the command. A broken pipe and click's own exits are left to click."""
        try:
            super().invoke(ctx)
            return
        except (click.exceptions.Exit, BrokenPipeError):
            raise
        except (KeyboardInterrupt, click.Abort):
            console.end_line()
            code = INTERRUPTED
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001  nobody should see a traceback
            code = _report_failure(error, debug=ctx.meta.get(DEBUG_KEY, False))
        ctx.exit(code)


def _report_failure(error: BaseException, *, debug: bool) -> int:
    """Report an error in one line; return the exit code."""
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
    about = describe_fault(error)
    if is_explained(error):
        console.error(about)
        return FAILED
    console.error(about if debug else f"{about} (run again with --debug for the traceback)")
    return FAILED


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
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
    help="Print the version.",
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """InternVL3 vision-language models on Apple silicon."""
    if ctx.invoked_subcommand is None:
        console.write_line(ctx.get_help())


def run() -> NoReturn:
    """Run the program: entry point of both console scripts and of ``python -m internvl3_mlx``."""
    open_standard_streams()
    name_home_folder()
    if is_follower():
        silence_output()
    try:
        main(prog_name="internvl3")
    except SystemExit as end:
        leave_ranks(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except OSError as error:  # what click itself writes, such as the help
        if not is_explained(error):
            raise
        console.error(describe_fault(error))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes it once more
        raise SystemExit(FAILED) from None
    raise SystemExit(0)
