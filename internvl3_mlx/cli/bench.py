"""``internvl3 bench``: measures this machine and how close we get to its limits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, options, progress, system_info
from internvl3_mlx.cli.flags import SectionedCommand, flag
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import atomic_write
from internvl3_mlx.write_guards import check_replaceable_file, starts_with

if TYPE_CHECKING:
    from internvl3_mlx.profiling.limits import MachineLimits
    from internvl3_mlx.profiling.results import Measurement
    from internvl3_mlx.profiling.suite import BenchmarkSuite

GROUPS = ("tower", "prefill", "decode", "kernels")  # in the order of the report
KILO = 1024
MAX_CONTEXT = 2**20


def parse_contexts(
    _ctx: click.Context, _param: click.Parameter, text: str | None
) -> tuple[int, ...]:
    """Parse ``1k,4096,128k`` into token counts."""
    words = [] if text is None else [word.strip().lower() for word in text.split(",")]
    found = [
        int(word.removesuffix("k")) * (KILO if word.endswith("k") else 1)
        for word in words
        if word.removesuffix("k").isdecimal()
    ]
    if len(found) < len(words) or not all(0 < count <= MAX_CONTEXT for count in found):
        raise UserError(
            f"--contexts {text}: give token counts separated by commas, such as 1k,4k,16k"
        )
    return tuple(found)


MAX_SHARE = 1.02  # of a limit; what is above is not rounding
LIMIT_IS_WRONG = "limit too low"


@click.command(
    cls=SectionedCommand,
    short_help="Measure this machine, the kernels and a model.",
    examples=(
        ("internvl3 bench --model 2b", "measure a model, and save where our kernels are faster"),
        ("internvl3 bench --quick", "a short run with the demo model"),
        ("internvl3 bench --model 8b --contexts 1k,16k --svg roofline.svg", "draw a roofline plot"),
    ),
    suggestions={"-q": "--quiet", "--quantize": "--q-bits"},
)
@options.LOAD_FLAGS["model"]
@options.LOAD_FLAGS["quantize"]
@flag(
    "Speed", "--contexts", "contexts", metavar="N,N,…", callback=parse_contexts,
    show_default="1k to 128k on a GPU", help="Lengths of the KV cache in tokens; k is 1024.",
)  # fmt: skip
@flag("Speed", "--quick", "quick", is_flag=True, help="Small arrays and few shapes.")
@flag(
    "Output", "--svg", "svg", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Draw a roofline plot of the measurements.",
)  # fmt: skip
@options.JSON_FLAG
@options.QUIET_FLAG
@options.debug_flag
def bench_command(contexts: tuple[int, ...], quick: bool, svg: Path | None, **flags: Any) -> None:
    """Measure vision encoder, prefill, decoding and our kernels next to the machine's limits.

    Memory bandwidth and arithmetic rate are measured here, too, so every line shows how close it
    gets to them. Without --model the demo model is measured. Where our kernels are faster than
    MLX's own operations is saved; from then on they are used there. (The case that a model needs is
    also measured by itself, before its first long prompt.) Interrupt it at any time: what was
    measured is shown.
    """
    from internvl3_mlx import load
    from internvl3_mlx.profiling.suite import BenchmarkSuite

    if svg is not None and not svg.parent.is_dir():
        raise UserError(f"cannot write {svg}: no folder {svg.parent}; make it first")
    system_info.report_kernel_fallbacks(quiet=flags["quiet"])
    with console.spinner("loading the model", quiet=flags["quiet"]) as notify:
        vlm = load(flags["model"] or "demo", quantize=flags["quantize"], notify=notify)
    run = BenchmarkSuite(vlm.model, contexts, quick)
    try:
        run_bench(run, quiet=flags["quiet"])
    finally:  # an interrupt shows what was measured until then
        if run.limits is not None:
            show_bench(run, run.limits, vlm.name, svg, as_json=flags["as_json"])


def run_bench(run: "BenchmarkSuite", *, quiet: bool) -> None:
    """Run all measurements under a progress bar."""
    with progress.progress_bar(quiet=quiet) as advance:
        for done, name in enumerate(run.run()):
            advance(name, done, len(run))
    if run.speedups_saved is False and not quiet:
        console.note("the kernel selection was not saved: the cache folder is not writable")


def show_bench(
    run: "BenchmarkSuite", limits: "MachineLimits", model: str, svg: Path | None, *, as_json: bool
) -> None:
    """Print the measurements, then draw them: a full disk must not cost the results."""
    device = system_info.device_info()
    if as_json:
        console.print_json(bench_json(run, limits, device, model), indent=2)
    else:
        console.print_table(bench_table(run, limits, device, model))
    if svg is not None:
        from internvl3_mlx.profiling.roofline import draw_roofline

        write_svg(svg, draw_roofline(run.measurements, limits, f"{device['device_name']}, {model}"))


def bench_json(
    run: "BenchmarkSuite", limits: "MachineLimits", device: dict[str, Any], model: str
) -> dict[str, Any]:
    return {
        "machine": {**system_info.library_versions(), **device},
        "model": model,
        "limits": limits.to_dict(),
        "measurements": [figure.to_dict(limits) for figure in run.measurements],
        "kernel_speedups": [vars(speedup) for speedup in run.speedups],
    }


def bench_table(
    run: "BenchmarkSuite", limits: "MachineLimits", device: dict[str, Any], model: str
) -> dict[str, Any]:
    """Return a table for each group of measurements, and why some are missing."""
    groups = {
        group: [bench_row(figure, limits) for figure in run.measurements if figure.group == group]
        for group in GROUPS
    }
    missing = sorted({figure.why for figure in run.measurements if figure.why})
    return {
        "verdict": bench_verdict(run, limits),
        "machine": system_info.format_sizes(
            {"system": system_info.system_name(), **device, "model": model}
        ),
        "limits": limits.describe(),
        **{group: rows for group, rows in groups.items() if rows},
        "kernels used": kernels_used() or "nowhere yet",
        **({"not measured": "; ".join(missing)} if missing else {}),
    }


def kernels_used() -> dict[str, str]:
    """Return from how many tokens on each kernel is used here, for those that are."""
    from internvl3_mlx.metal_kernels import registry

    starts = {key: registry.faster_from(found) for key, found in registry.faster_cases().items()}
    return {
        key: f"from {console.format_count(start, 'token')} on"
        for key, start in starts.items()
        if start is not None
    }


def bench_row(figure: "Measurement", limits: "MachineLimits") -> dict[str, Any]:
    share = figure.share_of_limit(limits)
    ratio = figure.peer / figure.seconds if figure.peer and figure.seconds else None
    built_in = {"built_in_ms": format_ms(figure.peer), "times_faster": ratio} if figure.peer else {}
    return {
        "what": figure.name,
        **({"context": figure.context} if figure.context else {}),
        "ms": format_ms(figure.seconds),
        **built_in,
        "limit_ms": format_ms(limits.min_seconds(figure.nbytes, figure.flops)),
        "of_limit": None if share is None else format_share(share),
    }


def format_share(share: float) -> str:
    """Format the share of a limit; more than all of it means that the limit is wrong."""
    return f"{share:.0%}" if share <= MAX_SHARE else f"{share:.0%} ({LIMIT_IS_WRONG})"


def bench_verdict(run: "BenchmarkSuite", limits: "MachineLimits") -> str:
    """Say in one line what the figures below mean."""
    shares = {
        figure.name: share
        for figure in run.measurements
        if (share := figure.share_of_limit(limits)) is not None
    }
    if not shares:
        return "nothing was measured"
    beaten = sum(share > MAX_SHARE for share in shares.values())
    if beaten:
        return (
            f"{beaten} of {len(shares)} figures are above the measured limits, which are therefore "
            "too low; measure again while nothing else runs, without --quick"
        )
    name = max(shares, key=shares.__getitem__)
    return f"{name} reaches {shares[name]:.0%} of this machine's limit, more than anything else"


def format_ms(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1e3:,.3g}"


def write_svg(path: Path, text: str) -> None:
    from internvl3_mlx.profiling.roofline import SVG_START

    check_replaceable_file(path, lambda file: starts_with(file, SVG_START), "a plot of bench")
    with atomic_write(path) as part:
        part.write_text(text, "utf-8")
