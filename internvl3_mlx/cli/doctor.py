"""``internvl3 doctor``: runs self-checks and prints a report for bug reports."""

import re
from collections.abc import Iterator
from typing import Any

import click

from internvl3_mlx.cli import console, options, progress, system_info
from internvl3_mlx.cli.flags import SectionedCommand

FAILED = 1
SAMPLE_IMAGE, SAMPLE_QUESTION, EXPECTED_ANSWER = (
    "dog.jpg",
    "What is this?",
    "dog",
)  # what the demo model tells for sure
PATH = re.compile(
    r"(?<![\w.])(?:~|/[\w.+-]+)(?:/[\w.+-]+)+/?"
)  # private, and of no use in a report
OK, FALLS_BACK, WRONG = "ok", "falls back", "WRONG"
NO_METAL = "not run: Metal is not available; MLX's own operations are used instead"


@click.command(
    cls=SectionedCommand,
    short_help="Run self-checks and print a report for bug reports.",
    examples=(
        ("internvl3 doctor", "check this machine"),
        ("internvl3 doctor --json > doctor.json", "a report to attach to an issue"),
    ),
)
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def doctor_command(as_json: bool, quiet: bool) -> None:
    """Run self-checks of kernels, operations and the demo model, and print a report.

    The report lists device, system, versions and memory. It contains no paths and no names, so it
    can be pasted into an issue as it is. A kernel that fails falls back to MLX's own operations;
    the exit code is 1 only if a result is wrong. INTERNVL3_KERNELS=off, on or force selects the
    kernels to use.
    """
    system_info.report_kernel_fallbacks(quiet=True)  # the report lists what falls back
    found: list[dict[str, str]] = []
    with progress.progress_bar(quiet=quiet) as advance:
        for check in run_checks():
            advance(check["check"], len(found), 0)
            found.append(check)
    report = {**describe_machine(), "checks": found, "verdict": summarize_checks(found)}
    if as_json:
        console.print_json(report, indent=2)
    else:
        console.print_table(system_info.format_sizes(report))
    if any(check["result"] == WRONG for check in found):
        raise SystemExit(FAILED)


def describe_machine() -> dict[str, Any]:
    """Return versions, device, and the state of the kernels."""
    from internvl3_mlx.metal_kernels import dispatch, registry

    thresholds = {
        case: f"from {start:,} tokens" for case, start in registry.read_thresholds().items()
    }
    return {
        "versions": system_info.library_versions(),
        "device": system_info.device_info(),
        "kernels": {
            "setting": dispatch.kernel_mode(),
            "used": thresholds or "nowhere yet; internvl3 bench measures where they are faster",
        },
    }


def run_checks() -> Iterator[dict[str, str]]:
    """Run all checks, the kernels first."""
    yield from check_kernels()
    yield from check_operations()
    yield check_demo_model()


def check_kernels() -> Iterator[dict[str, str]]:
    from internvl3_mlx.metal_kernels import dispatch, self_test, variants

    if not dispatch.metal_available():
        yield check_row("Metal kernels", "skipped", NO_METAL)
        return
    for state in self_test.run_self_tests(variants.all_variants()):
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
    return {"check": name, "result": result, "detail": PATH.sub("…", detail)}


def summarize_checks(found: list[dict[str, str]]) -> str:
    """Summarize all checks in one sentence."""
    results = [check["result"] for check in found]
    if wrong := results.count(WRONG):
        return f"{wrong} of {len(found)} checks failed; please report this"
    if lost := results.count(FALLS_BACK):
        kernels = "a kernel falls" if lost == 1 else f"{lost} kernels fall"
        return f"all results are correct, but {kernels} back to MLX here; please report this"
    return "all checks passed"
