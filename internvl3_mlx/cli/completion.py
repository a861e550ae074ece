"""``internvl3 completion``: the script that makes a shell complete commands, flags and models."""

from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from internvl3_mlx.cli import console
from internvl3_mlx.cli.options import SectionedCommand

PROGRAM = "internvl3"
VARIABLE = "_INTERNVL3_COMPLETE"
FAMILY = "internvl3"
SHELLS = ("zsh", "bash", "fish")


@click.command(cls=SectionedCommand, short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that completes commands, flags and models in zsh, bash or fish.

    For zsh put this line into ~/.zshrc (bash and fish alike, into their own files):

        eval "$(internvl3 completion zsh)"
    """
    from internvl3_mlx.cli.main import main

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"this click cannot complete in {shell}")
    console.line(kind(main, {}, PROGRAM, VARIABLE).source())


def models(_ctx: click.Context, _param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Complete ``--model``: sizes, the demo, the family's repositories in the cache, folders."""
    from internvl3_mlx.loading.resolve import DEMO, SIZES

    names = [*SIZES, DEMO, *cached_repositories()]
    found = [CompletionItem(name) for name in names if name.startswith(typed)]
    return [*found, CompletionItem(typed, type="dir")]


def cached_repositories() -> list[str]:
    """List the family's repositories in the hub's cache by the names of their folders."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*--*")
    names = [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]
    return sorted(name for name in names if FAMILY in name.lower())
