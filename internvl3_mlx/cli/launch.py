"""``internvl3 launch``: runs a command with one model on several hosts."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.flags import SectionedCommand, flag
from internvl3_mlx.cli.ranks import LED, SYMMETRIC
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import did_you_mean

if TYPE_CHECKING:
    from internvl3_mlx.multi_host.hosts import LaunchPlan

COMMANDS = (*LED, *SYMMETRIC)


@click.command(
    cls=SectionedCommand,
    short_help="Run a command with one model on several hosts.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    examples=(
        ("internvl3 launch --hosts mac1,mac2 chat --model 78b", "a chat, the model on two Macs"),
        ("internvl3 launch --hostfile hosts.json serve --model 78b", "over Thunderbolt"),
        ("internvl3 launch -n 2 generate --model demo p.jpg", "two processes here, for a try"),
    ),
)
@flag(
    "Network", "--hosts", "hosts", metavar="NAME,NAME",
    help="The hosts, this one first, as ssh knows them.",
)  # fmt: skip
@flag(
    "Network", "--hostfile", "hostfile", metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A hostfile of mlx.launch, as mlx.distributed_config writes it.",
)  # fmt: skip
@flag(
    "Network", "-n", "count", metavar="N", type=click.IntRange(min=2),
    help="So many processes on this machine.",
)  # fmt: skip
@flag(
    "Network", "--backend", "backend", type=click.Choice(["ring", "jaccl"]),
    help="ring for any network, jaccl for RDMA over Thunderbolt; else what the hostfile says.",
)  # fmt: skip
@flag(
    "Network", "--python", "python", metavar="PATH",
    help="Python on each host; by default the path of the one that runs here.",
)  # fmt: skip
@options.QUIET_FLAG
@options.debug_flag
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def launch_command(command: tuple[str, ...], quiet: bool, **given: Any) -> None:
    """Run chat, generate, eval or train with one model on several hosts.

    COMMAND is the command with its flags. Versions, the model's files and the connection are
    checked on each host first, over ssh. The exit code is the command's own.
    """
    from internvl3_mlx.multi_host.hosts import check_hosts, check_plan
    from internvl3_mlx.multi_host.launch import launch

    if command[0] not in COMMANDS:
        raise UserError(
            f"internvl3 {command[0]} cannot run on several hosts; "
            f"{did_you_mean(command[0], COMMANDS)}"
        )
    plan = make_plan(given)
    check_plan(plan)
    with console.spinner("checking the hosts", quiet=quiet):
        check_hosts(plan, model_of(command))
    raise SystemExit(launch(plan, command, console.error))


def make_plan(given: dict[str, Any]) -> "LaunchPlan":
    """Read which hosts are meant. Raises UserError unless it is said once."""
    from internvl3_mlx.multi_host.hosts import LaunchPlan, local_hosts, named_hosts, read_hostfile

    ways = [name for name in ("hosts", "hostfile", "count") if given[name]]
    if len(ways) != 1:
        raise UserError("say where to run in one way: --hosts, --hostfile or -n")
    if given["hostfile"]:
        plan = read_hostfile(given["hostfile"])
    elif given["hosts"]:
        names = [name.strip() for name in given["hosts"].split(",") if name.strip()]
        plan = LaunchPlan(named_hosts(names))
    else:
        plan = LaunchPlan(local_hosts(given["count"]))
    changes = {name: given[name] for name in ("backend", "python") if given[name]}
    return replace(plan, **changes)


def model_of(command: tuple[str, ...]) -> str | None:
    """Return what --model of the command names, if it is given."""
    for word, following in zip(command, (*command[1:], ""), strict=True):
        if word == "--model":
            return following or None
        if word.startswith("--model="):
            return word.partition("=")[2]
    return None
