"""``internvl3 completion``: prints the script for completion in a shell."""

import click
from click.shell_completion import get_completion_class

from internvl3_mlx.cli import console
from internvl3_mlx.cli.flags import SectionedCommand

PROGRAM = "internvl3"
VARIABLE = "_INTERNVL3_COMPLETE"
SHELLS = ("zsh", "bash", "fish")


@click.command(
    cls=SectionedCommand,
    short_help="Print the completion script for a shell.",
    examples=(
        ('eval "$(internvl3 completion zsh)"', "in ~/.zshrc"),
        ('eval "$(internvl3 completion bash)"', "in ~/.bashrc"),
        ("internvl3 completion fish | source", "in ~/.config/fish/config.fish"),
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print a script that completes commands, flags and models in zsh, bash or fish."""
    group = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"completion in {shell} is not supported; choose another shell")
    console.write_line(kind(group, {}, PROGRAM, VARIABLE).source())
