"""``internvl3 doctor --distributed``: what is measured between ranks, and what follows from it."""

import json
import subprocess

import pytest
from click.testing import CliRunner
from fixtures.rank_processes import INTERNVL3, PATIENCE_S

from internvl3_mlx.cli.doctor_ranks import format_found
from internvl3_mlx.cli.main import main
from internvl3_mlx.multi_host.measure import GATHER, SUM, MessageTime, token_costs

TIMES = [
    MessageTime(SUM, 8_192, 1e-4),
    MessageTime(SUM, 16_384, 2e-4),
    MessageTime(SUM, 1_048_576, 1e-2),
    MessageTime(GATHER, 303_348, 5e-3),
]


def test_two_ranks_are_named_and_their_messages_timed(tmp_path):
    done = subprocess.run(
        [*INTERNVL3, "launch", "-n", "2", "doctor", "--distributed", "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backend"] == "ring"
    assert len(found["ranks"]) == 2
    assert {"host", "mlx", "internvl3-mlx", "device"} <= {*found["ranks"][1]}
    assert [(one["operation"], one["nbytes"]) for one in found["messages"]] == [
        (SUM, 8_192), (SUM, 16_384), (SUM, 1_048_576), (GATHER, 303_348),
    ]  # fmt: skip
    assert all(one["seconds"] > 0 for one in found["messages"])
    shown = format_found(found)
    assert {*shown["ranks"]} == {"rank 0", "rank 1"}
    assert "all_sum 1 MB" in shown["messages"]


def test_what_follows_for_a_token_is_arithmetic():
    costs = {one.model: one for one in token_costs(TIMES)}
    assert costs["78b"].sums == 160
    assert costs["78b"].seconds == pytest.approx(160 * 2e-4 + 5e-3)  # sums of 16 KB
    assert costs["38b"].seconds == pytest.approx(128 * 1e-4 + 5e-3)  # 10 KB is nearer to 8
    assert costs["78b"].most_tps == pytest.approx(1 / 0.037)


def test_without_a_launch_it_says_how_to_start_it():
    result = CliRunner().invoke(main, ["doctor", "--distributed"])
    assert result.exit_code == 2
    assert "internvl3 launch --hosts mac1,mac2 doctor --distributed" in result.stderr
