"""``internvl3 doctor``: runs self-checks and prints a report for bug reports."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import (
    console,
    doctor_ranks,
    doctor_report,
    options,
    progress,
    system_info,
)
from internvl3_mlx.cli.doctor_report import without_private
from internvl3_mlx.cli.flags import SectionedCommand, flag
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx.metal_kernels.registry import KernelSpeedup, Speedups

FAILED = 1
SAMPLE_IMAGE, SAMPLE_QUESTION, EXPECTED_ANSWER = (
    "dog.jpg",
    "What is this?",
    "dog",
)  # which the demo model answers reliably
OK, FALLS_BACK, WRONG = "ok", "falls back", "WRONG"
NO_METAL = "not run: Metal is not available; MLX's own operations are used instead"
NOTHING_MEASURED = "nothing yet; the first long prompt of a model measures what it needs"
STDOUT = "-"


@click.command(
    cls=SectionedCommand,
    short_help="Run self-checks and print a report for bug reports.",
    examples=(
        ("internvl3 doctor --numbers", "check this machine, and measure what its arithmetic gives"),
        ("internvl3 doctor --retry", "also test kernels again that ended the process"),
        ("internvl3 doctor --report report.md", "everything, with speed, to paste into an issue"),
    ),
)
@flag(
    "Output", "--numbers", "numbers", is_flag=True,
    help="Also measure rotation, rounding and functions, and say what follows.",
)  # fmt: skip
@flag(
    "Output", "--report", "report", metavar="[FILE]", is_flag=False, flag_value=STDOUT,
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help="Write one Markdown report of all checks, numbers and a quick benchmark.",
)  # fmt: skip
@flag(
    "Output", "--retry", "retry", is_flag=True,
    help="Also test kernels again whose self-test ended the process.",
)  # fmt: skip
@flag(
    "Network", "--distributed", "distributed", is_flag=True,
    help="Under internvl3 launch: time the messages between the hosts instead.",
)  # fmt: skip
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def doctor_command(
    numbers: bool, report: Path | None, retry: bool, distributed: bool, as_json: bool, quiet: bool
) -> None:
    """Run self-checks of operations, kernels and the demo model, and print a report.

    The report lists device, system, versions and memory. It contains no paths and no names, so it
    can be pasted into an issue as it is. A kernel that fails falls back to MLX's own operations;
    the exit code is 1 only if a result is wrong. INTERNVL3_KERNELS=off, on or force selects the
    kernels to use, INTERNVL3_COMPILE=off, on or auto when a decode step is compiled. --report
    takes a minute or two and shows how fast this machine is, too.
    """
    if distributed:
        doctor_ranks.run_distributed(as_json=as_json)
        return
    if report is not None and as_json:
        raise UserError("--report writes Markdown and --json prints JSON; choose one")
    if report is not None:
        doctor_report.check_target(report)
    system_info.report_kernel_fallbacks(quiet=True)  # the report lists what falls back
    machine = describe_machine()
    if not (as_json or report):  # at once: a fault of the GPU may end the process
        console.print_table(system_info.format_sizes(machine))
    checks = collect("checks", run_checks(retry=retry), quiet=quiet)
    result: dict[str, Any] = {**machine, "checks": checks, "verdict": summarize_checks(checks)}
    if report is not None:
        for grown in doctor_report.complete(result, quiet=quiet):
            doctor_report.write(grown, report)
        doctor_report.show(result, report)
    else:
        show_checks(result, numbers=numbers, as_json=as_json, quiet=quiet)
    if any(check["result"] == WRONG for check in checks):
        raise SystemExit(FAILED)


def show_checks(result: dict[str, Any], *, numbers: bool, as_json: bool, quiet: bool) -> None:
    """Print the checks, the numbers if asked for, and the verdict."""
    verdict = result.pop("verdict")
    if numbers:
        result["numbers"] = doctor_report.measure(quiet=quiet)
    if as_json:
        console.print_json({**result, "verdict": verdict}, indent=2)
        return
    meanings = {entry["name"]: entry["meaning"] for entry in result.get("numbers", ())}
    shown: dict[str, Any] = {"checks": result["checks"]}
    if meanings:
        shown["numbers"] = meanings
    console.print_table({**shown, "verdict": verdict})


def collect(name: str, checks: Iterator[dict[str, str]], *, quiet: bool) -> list[dict[str, str]]:
    """Run all checks under a progress bar."""
    found: list[dict[str, str]] = []
    with progress.progress_bar(quiet=quiet) as advance:
        advance(name, 0, 0)
        for check in checks:
            found.append(check)
            advance(check["check"], len(found), 0)
    return found


def describe_machine() -> dict[str, Any]:
    """Return versions, device, and the state of the kernels."""
    from internvl3_mlx.device import macos_version
    from internvl3_mlx.generation import compiled_step
    from internvl3_mlx.metal_kernels import dispatch, registry

    return {
        "versions": system_info.library_versions(),
        "device": system_info.device_info(),
        "kernels": {
            "setting": dispatch.kernel_mode(),
            "macos": macos_version(),
            "architecture": dispatch.architecture(),
            "measured": describe_speedups(registry.read_speedups()) or NOTHING_MEASURED,
        },
        "compiled decode step": {
            "setting": compiled_step.compile_mode(),
            "used": compiled_step.describe_use(),
        },
    }


def describe_speedups(speedups: "Speedups") -> dict[str, str]:
    """Say for each case how many times faster than MLX our kernel is: 1.31x at 4,096 tokens.

    And by which plan of splits, where another than the usual one is faster.
    """
    return {
        key: ", ".join(describe_speedup(one) for _, one in sorted(found.items()))
        for key, found in speedups.items()
    }


def describe_speedup(found: "KernelSpeedup") -> str:
    splits = f" with {found.plan} splits" if found.plan else ""
    return f"{found.ratio:.2f}x at {console.format_count(found.tokens, 'token')}{splits}"


def run_checks(*, retry: bool = False) -> Iterator[dict[str, str]]:
    """Run all checks: MLX's operations, what we build of them, our kernels, the demo model."""
    yield from smoke_test()
    yield from check_operations()
    yield from check_kernels(retry=retry)
    yield check_demo_model()


def smoke_test() -> Iterator[dict[str, str]]:
    from internvl3_mlx.profiling.smoke_test import run_smoke_test

    for result in run_smoke_test():
        yield check_row(result.name, result.outcome.value, result.detail)


def check_kernels(*, retry: bool) -> Iterator[dict[str, str]]:
    from internvl3_mlx.metal_kernels import dispatch, self_test, variants

    if not dispatch.metal_available():
        yield check_row("Metal kernels", "skipped", NO_METAL)
        return
    for state in self_test.run_self_tests(variants.all_variants(), retry=retry):
        yield check_row(state.name, OK if state.passed else FALLS_BACK, state.detail)


def check_operations() -> Iterator[dict[str, str]]:
    from internvl3_mlx.profiling.self_check import run_operation_checks

    for check in run_operation_checks():
        yield check_row(check.name, OK if check.passed else WRONG, check.detail)


def check_demo_model() -> dict[str, str]:
    """Ask the demo model about a sample image: everything from the file to the text."""
    from internvl3_mlx import load
    from internvl3_mlx.loading.resolve import DEMO, DEMO_FOLDER

    name = "demo model, from image file to text"
    try:
        answer = load(DEMO).ask(
            SAMPLE_QUESTION, [DEMO_FOLDER / "samples" / SAMPLE_IMAGE], max_tokens=8
        )
    except Exception as fault:  # noqa: BLE001  any failure is a result
        return check_row(name, WRONG, f"{type(fault).__name__}: {fault}")
    return check_row(name, OK if answer.text == EXPECTED_ANSWER else WRONG, f"says {answer.text!r}")


def check_row(name: str, result: str, detail: str) -> dict[str, str]:
    return {"check": name, "result": result, "detail": without_private(detail)}


def summarize_checks(found: list[dict[str, str]]) -> str:
    """Summarize all checks in one sentence."""
    results = [check["result"] for check in found]
    if wrong := results.count(WRONG):
        return f"{wrong} of {len(found)} checks failed; please report this"
    if lost := results.count(FALLS_BACK):
        kernels = "a kernel falls" if lost == 1 else f"{lost} kernels fall"
        return f"all results are correct, but {kernels} back to MLX here; please report this"
    return "all checks passed"
