"""``internvl3 doctor``: is everything well on this machine? A report to paste into an issue."""

import re
from collections.abc import Iterator
from typing import Any

import click

from internvl3_mlx.cli import console, options, progress, system_info
from internvl3_mlx.cli.options import SectionedCommand

FAILED = 1
SAMPLE_IMAGE, SAMPLE_QUESTION, EXPECTED_ANSWER = (
    "dog.jpg",
    "What is this?",
    "dog",
)  # what the demo model tells for sure
PATH = re.compile(r"(?<![\w.])(?:~|/[\w.+-]+)(?:/[\w.+-]+)+/?")  # a name that only its owner needs
OK, FALLS_BACK, WRONG = "ok", "falls back", "WRONG"
NO_METAL = "not tried: Metal is not here; MLX's own operations do the same work"


@click.command(
    cls=SectionedCommand, short_help="Check that all is well here; a report for an issue."
)
@options.flag("Output", "--json", "as_json", is_flag=True, help="One JSON object.")
@options.OUTPUT_FLAGS["quiet"]
@options.debug_flag
def doctor_command(as_json: bool, quiet: bool) -> None:
    """Try our kernels and the plain operations against exact numbers, and report.

    The report names device, system, versions and memory, holds no paths or names of yours, and is
    made to be pasted into an issue as it is. A kernel that does not work here falls back to MLX's
    own operations; only a wrong result makes the exit code 1. INTERNVL3_KERNELS=off, on or force
    says which kernels are used.
    """
    system_info.report_kernel_fallbacks(quiet=True)  # what falls back stands in the report
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
    """Describe the machine and what was asked of the kernels."""
    from internvl3_mlx.metal_kernels import dispatch, registry

    pays = {case: f"from {start:,} tokens" for case, start in registry.read_thresholds().items()}
    return {
        "versions": system_info.library_versions(),
        "device": system_info.device_info(),
        "kernels": {
            "setting": dispatch.kernel_mode(),
            "used": pays or "nowhere yet: internvl3 bench measures where they pay",
        },
    }


def run_checks() -> Iterator[dict[str, str]]:
    """Try everything, the kernels first."""
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
    """Ask the demo model what it knows: everything from the picture file to the text."""
    from internvl3_mlx import load
    from internvl3_mlx.loading.resolve import DEMO, DEMO_FOLDER

    name = "a picture to its name, demo model"
    try:
        answer = load(DEMO).ask(
            SAMPLE_QUESTION, [DEMO_FOLDER / "samples" / SAMPLE_IMAGE], max_tokens=8
        )
    except Exception as fault:  # noqa: BLE001  whatever goes wrong is what is asked for
        return check_row(name, WRONG, f"{type(fault).__name__}: {fault}")
    return check_row(name, OK if answer.text == EXPECTED_ANSWER else WRONG, f"says {answer.text!r}")


def check_row(name: str, result: str, detail: str) -> dict[str, str]:
    return {"check": name, "result": result, "detail": PATH.sub("…", detail)}


def summarize_checks(found: list[dict[str, str]]) -> str:
    """Sum up in one sentence."""
    results = [check["result"] for check in found]
    if wrong := results.count(WRONG):
        return f"{wrong} of {len(found)} checks are wrong; please report this"
    if lost := results.count(FALLS_BACK):
        kernels = "a kernel does" if lost == 1 else f"{lost} kernels do"
        return f"results are right, but {kernels} not work here; please report this"
    return "all is well"
