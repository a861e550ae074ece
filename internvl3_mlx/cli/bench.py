"""``internvl3 bench``: how fast this machine is and how near to its limit we come."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, options, progress, system_info
from internvl3_mlx.cli.options import SectionedCommand
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx.profiling.limits import MachineLimits
    from internvl3_mlx.profiling.results import Measurement
    from internvl3_mlx.profiling.suite import BenchmarkSuite

GROUPS = ("tower", "prefill", "decode", "kernels")  # in the order of the report
NOT_SAVED_NOTE = "where kernels pay; only a run without --quick and --contexts keeps it"
KILO = 1024
MAX_CONTEXT = 2**20


def parse_contexts(
    _ctx: click.Context, _param: click.Parameter, text: str | None
) -> tuple[int, ...]:
    """Read ``1k,4096,128k``: tokens, k for 1024 of them."""
    words = [] if text is None else [word.strip().lower() for word in text.split(",")]
    found = [
        int(word.removesuffix("k")) * (KILO if word.endswith("k") else 1)
        for word in words
        if word.removesuffix("k").isdecimal()
    ]
    if len(found) < len(words) or not all(0 < count <= MAX_CONTEXT for count in found):
        raise UserError(f"--contexts {text}: give tokens with commas between, such as 1k,4k,16k")
    return tuple(found)


@click.command(
    cls=SectionedCommand, short_help="Measure this machine, our kernels, and a model's stages."
)
@options.LOAD_FLAGS["model"]
@options.LOAD_FLAGS["quantize"]
@options.flag(
    "Speed", "--contexts", "contexts", metavar="N,N,…", callback=parse_contexts,
    show_default="1k to 128k on a GPU", help="Tokens already read; k is 1024.",
)  # fmt: skip
@options.flag("Speed", "--quick", "quick", is_flag=True, help="Small arrays, few shapes.")
@options.flag(
    "Output", "--svg", "svg", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Draw what was reached under the machine's limits.",
)  # fmt: skip
@options.flag("Output", "--json", "as_json", is_flag=True, help="One JSON object.")
@options.OUTPUT_FLAGS["quiet"]
@options.debug_flag
def bench_command(contexts: tuple[int, ...], quick: bool, svg: Path | None, **flags: Any) -> None:
    """Measure decoding, reading, the vision tower and our kernels, beside the machine's own limits.

    Bytes a second and operations a second are measured here too, so each line says how near it
    comes to them. Without --model the demo model is measured. A whole run (no --quick, no
    --contexts) keeps where our kernels beat MLX's own operations, and they are used there from then
    on. Interrupt at any time: what was measured is shown.
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
    """Measure everything, saying how far it is."""
    with progress.progress_bar(quiet=quiet) as advance:
        for done, name in enumerate(run.run()):
            advance(name, done, len(run))
    if run.thresholds_saved is False and not quiet:
        console.note("where kernels pay could not be kept: the cache folder takes no files")


def show_bench(
    run: "BenchmarkSuite", limits: "MachineLimits", model: str, svg: Path | None, *, as_json: bool
) -> None:
    """Show the figures, and draw them last: a full disk must not cost the measurement."""
    device = system_info.device_info()
    if as_json:
        console.print_json(bench_json(run, limits, device, model), indent=2)
    else:
        console.print_table(bench_table(run, limits, device, model))
    if svg is not None:
        from internvl3_mlx.profiling.roofline import draw_roofline

        write_svg(svg, draw_roofline(run.measurements, limits, f"{device['computes_on']}, {model}"))


def bench_json(
    run: "BenchmarkSuite", limits: "MachineLimits", device: dict[str, Any], model: str
) -> dict[str, Any]:
    return {
        "machine": {**system_info.library_versions(), **device},
        "model": model,
        "limits": limits.to_dict(),
        "figures": [figure.to_dict(limits) for figure in run.measurements],
        "kernels_pay": {entry.key: entry.min_tokens for entry in run.thresholds},
    }


def bench_table(
    run: "BenchmarkSuite", limits: "MachineLimits", device: dict[str, Any], model: str
) -> dict[str, Any]:
    """Put all figures in columns, a table for each group, and say why some are missing."""
    groups = {
        group: [bench_row(figure, limits) for figure in run.measurements if figure.group == group]
        for group in GROUPS
    }
    pays = {
        e.key: f"from {e.min_tokens:,} tokens" for e in run.thresholds if e.min_tokens is not None
    }
    missing = sorted({figure.why for figure in run.measurements if figure.why})
    return {
        "machine": system_info.format_sizes(
            {"system": system_info.system_name(), **device, "model": model}
        ),
        "limits": limits.describe(),
        **{group: rows for group, rows in groups.items() if rows},
        "kernels pay": pays or "nowhere yet",
        **({} if run.is_full_run or not pays else {"not kept": NOT_SAVED_NOTE}),
        **({"not measured": "; ".join(missing)} if missing else {}),
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
        "of_the_limit": None if share is None else f"{share:.0%}",
    }


def format_ms(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1e3:,.3g}"


def write_svg(path: Path, text: str) -> None:
    """Write a file aside and rename it when whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another place") from error
