"""``internvl3 doctor``: is everything well on this machine? A report to paste into an issue."""

import re
from collections.abc import Iterator
from typing import Any

import click

from internvl3_mlx.cli import console, options, progress, system_info
from internvl3_mlx.cli.options import SectionedCommand

FAILED = 1
SAMPLE, QUESTION, KNOWN = "dog.jpg", "What is this?", "dog"  # what the demo model tells for sure
PATH = re.compile(r"(?<![\w.])(?:~|/[\w.+-]+)(?:/[\w.+-]+)+/?")  # a name that only its owner needs
WELL, FALLS_BACK, WRONG = "ok", "falls back", "WRONG"
NO_METAL = "not tried: Metal is not here; MLX's own operations do the same work"


@click.command(
    cls=SectionedCommand, short_help="Check that all is well here; a report for an issue."
)
@options.flag("Output", "--json", "as_json", is_flag=True, help="One JSON object.")
@options.OUTPUT["quiet"]
@options.debug
def doctor(as_json: bool, quiet: bool) -> None:
    """Try our kernels and the plain operations against exact numbers, and report.

    The report names device, system, versions and memory, holds no paths or names of yours, and is
    made to be pasted into an issue as it is. A kernel that does not work here falls back to MLX's
    own operations; only a wrong result makes the exit code 1. INTERNVL3_KERNELS=off, on or force
    says which kernels are used.
    """
    system_info.hear_kernels(quiet=True)  # what falls back stands in the report
    found: list[dict[str, str]] = []
    with progress.bar(quiet=quiet) as advance:
        for check in checks():
            advance(check["check"], len(found), 0)
            found.append(check)
    report = {**about(), "checks": found, "verdict": verdict(found)}
    if as_json:
        console.as_json(report, indent=2)
    else:
        console.facts(system_info.with_units(report))
    if any(check["result"] == WRONG for check in found):
        raise SystemExit(FAILED)


def about() -> dict[str, Any]:
    """Describe the machine and what was asked of the kernels."""
    from internvl3_mlx.metal_kernels import dispatch, registry

    pays = {case: f"from {start:,} tokens" for case, start in registry.measured().items()}
    return {
        "versions": system_info.versions(),
        "device": system_info.device(),
        "kernels": {
            "setting": dispatch.setting(),
            "used": pays or "nowhere yet: internvl3 bench measures where they pay",
        },
    }


def checks() -> Iterator[dict[str, str]]:
    """Try everything, the kernels first."""
    yield from of_kernels()
    yield from of_operations()
    yield of_model()


def of_kernels() -> Iterator[dict[str, str]]:
    from internvl3_mlx.metal_kernels import dispatch, self_test, variants

    if not dispatch.metal_available():
        yield line("Metal kernels", "skipped", NO_METAL)
        return
    for state in self_test.self_check(variants.variants()):
        yield line(state.name, WELL if state.works else FALLS_BACK, state.detail)


def of_operations() -> Iterator[dict[str, str]]:
    from internvl3_mlx.profiling.self_check import plain_checks

    for check in plain_checks():
        yield line(check.name, WELL if check.passed else WRONG, check.detail)


def of_model() -> dict[str, str]:
    """Ask the demo model what it knows: everything from the picture file to the text."""
    from internvl3_mlx import load
    from internvl3_mlx.loading.resolve import DEMO, DEMO_FOLDER

    name = "a picture to its name, demo model"
    try:
        answer = load(DEMO).ask(QUESTION, [DEMO_FOLDER / "samples" / SAMPLE], max_tokens=8)
    except Exception as fault:  # noqa: BLE001  whatever goes wrong is what is asked for
        return line(name, WRONG, f"{type(fault).__name__}: {fault}")
    return line(name, WELL if answer.text == KNOWN else WRONG, f"says {answer.text!r}")


def line(name: str, result: str, detail: str) -> dict[str, str]:
    return {"check": name, "result": result, "detail": PATH.sub("…", detail)}


def verdict(found: list[dict[str, str]]) -> str:
    """Sum up in one sentence."""
    results = [check["result"] for check in found]
    if wrong := results.count(WRONG):
        return f"{wrong} of {len(found)} checks are wrong; please report this"
    if lost := results.count(FALLS_BACK):
        kernels = "a kernel does" if lost == 1 else f"{lost} kernels do"
        return f"results are right, but {kernels} not work here; please report this"
    return "all is well"
