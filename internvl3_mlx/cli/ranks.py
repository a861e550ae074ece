"""A command on several hosts: rank 0 runs it, the other ranks follow.

``mlx.launch`` starts the same command on each of them; which one this is, its environment says.
"""

import os
import signal
from collections.abc import Callable

from internvl3_mlx.cli import console
from internvl3_mlx.errors import UserError

RANK_VARIABLE = "MLX_RANK"  # set by the launcher
LED = ("chat", "eval", "generate", "rollouts", "score", "serve")
SYMMETRIC = ("doctor", "train")  # each rank runs these itself


def is_launched() -> bool:
    return RANK_VARIABLE in os.environ


def is_follower() -> bool:
    return os.environ.get(RANK_VARIABLE, "0") != "0"


def join_ranks(command: str) -> "Callable[[], int] | None":
    """Connect with the other ranks; return what this one runs in place of the command, if so.

    Raises UserError for a command that only one process can run.
    """
    from internvl3_mlx.distributed.process_group import init_distributed
    from internvl3_mlx.distributed.team import TEAM, Leader, open_team
    from internvl3_mlx.multi_host.follow import FOLLOWER_TYPES, follow
    from internvl3_mlx.multi_host.probe import rank_facts

    group = init_distributed()
    if group.size == 1 or command in SYMMETRIC:
        return None
    if command not in LED:
        raise UserError(
            f"internvl3 {command} runs in one process; start it without the launcher "
            f"(several can run {', '.join((*LED, *SYMMETRIC))})"
        )
    if not group.is_main:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends the answer, or the program
    team = open_team(group, rank_facts(), FOLLOWER_TYPES, console.error)
    TEAM.append(team)
    if isinstance(team, Leader):
        return None
    return lambda: follow(team)


def leave_ranks(code: int) -> None:
    """Let the other ranks end as this one does."""
    if not is_launched():
        return
    from internvl3_mlx.distributed.team import TEAM, Leader

    while TEAM:
        team = TEAM.pop()
        if isinstance(team, Leader):
            team.dismiss(code)
