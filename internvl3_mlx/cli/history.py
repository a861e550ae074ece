"""``internvl3 history``: lists the conversations that were kept, or deletes them."""

import sys

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.flags import SectionedCommand, flag
from internvl3_mlx.cli.line_reader import typed_lines_path
from internvl3_mlx.cli.past_chats import NONE_YET, list_past_chats
from internvl3_mlx.errors import UserError


@click.command(
    cls=SectionedCommand,
    short_help="List past conversations, or delete them.",
    examples=(
        ("internvl3 history", "the conversations that were kept, the latest first"),
        ("internvl3 history --clear", "delete them, and the lines typed in chats"),
    ),
)
@flag("Run", "--clear", "clear", is_flag=True, help="Delete all of them.")
@flag("Run", "-y", "--yes", "yes", is_flag=True, help="Do not ask before deleting.")
@options.JSON_FLAG
@options.debug_flag
def history_command(clear: bool, yes: bool, as_json: bool) -> None:
    """List the conversations that internvl3 chat kept, the latest first, or delete them."""
    if clear:
        clear_history(yes=yes)
        return
    rows = list_past_chats()
    if as_json:
        console.print_json(rows, indent=2)
    elif rows:
        console.print_table({"conversations": rows})
    else:
        console.hint(NONE_YET)


def clear_history(*, yes: bool) -> None:
    """Delete logs, copies of images and typed lines, after a confirmation."""
    from internvl3_mlx.generation.conversation_log import clear_logs, list_logs

    count = console.format_count(len(list_logs()), "conversation")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("--clear deletes every past conversation; pass --yes to confirm")
        if not click.confirm(f"delete {count} and the typed lines?", err=True):
            return
    try:
        clear_logs()
        typed_lines_path().unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot delete {error.filename}: {error.strerror}") from error
    console.hint(f"deleted {count}")
