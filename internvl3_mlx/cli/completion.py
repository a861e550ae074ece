"""``internvl3 completion``: the script that makes a shell complete commands, flags and models."""

import click
from click.shell_completion import get_completion_class

from internvl3_mlx.cli import console
from internvl3_mlx.cli.options import SectionedCommand

PROGRAM = "internvl3"
VARIABLE = "_INTERNVL3_COMPLETE"
SHELLS = ("zsh", "bash", "fish")


@click.command(cls=SectionedCommand, short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print a script that completes commands, flags and models in zsh, bash or fish.

    For zsh put this line into ~/.zshrc (bash and fish alike, into their own files):

        eval "$(internvl3 completion zsh)"
    """
    from internvl3_mlx.cli.main import main

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"this click cannot complete in {shell}")
    console.write_line(kind(main, {}, PROGRAM, VARIABLE).source())
