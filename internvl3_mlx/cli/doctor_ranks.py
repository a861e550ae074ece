"""``internvl3 doctor --distributed``: the hosts of a launch and the messages between them."""

from typing import Any

from internvl3_mlx.cli import console
from internvl3_mlx.errors import UserError

HOW = "internvl3 launch --hosts mac1,mac2 doctor --distributed"
ARITHMETIC = "messages of a token (arithmetic from these times; tokens/s if computing took none)"


def run_distributed(*, as_json: bool) -> None:
    """Measure on all ranks; rank 0 prints. Raises UserError outside of a launch."""
    from internvl3_mlx.distributed.process_group import init_distributed

    group = init_distributed()
    if group.size == 1:
        raise UserError(f"--distributed measures between hosts; start it with: {HOW}")
    from internvl3_mlx.multi_host.measure import measure_ranks

    found = measure_ranks(group)
    if not group.is_main:
        return
    if as_json:
        console.print_json(found, indent=2)
        return
    console.print_table(format_found(found))


def format_found(found: dict[str, Any]) -> dict[str, Any]:
    """Return the table that is printed."""
    ranks = {
        f"rank {number}": ", ".join(
            [
                one["host"],
                f"mlx {one['mlx']}",
                f"internvl3-mlx {one['internvl3-mlx']}",
                one["device"],
            ]
        )
        for number, one in enumerate(found["ranks"])
    }
    messages = {
        f"{one['operation']} {format_bytes(one['nbytes'])}": (
            f"{one['seconds'] * 1e3:.3f} ms, {one['bytes_per_second'] / console.MB:,.0f} MB/s"
        )
        for one in found["messages"]
    }
    costs = {
        one["model"]: (
            f"{one['sums']} sums, {one['seconds'] * 1e3:.1f} ms, at most {one['most_tps']:.0f} "
            "tokens/s"
        )
        for one in found["arithmetic"]
    }
    return {"backend": found["backend"], "ranks": ranks, "messages": messages, ARITHMETIC: costs}


def format_bytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MB" if nbytes >= 2**20 else f"{nbytes / 2**10:.0f} KB"
