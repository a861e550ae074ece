"""What ``internvl3 train`` shows of a run, to a person or to a script."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from internvl3_mlx.cli import console, progress
from internvl3_mlx.cli.train_json import EVENTS_AS_JSON, end_values, without_none
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.user_paths import expand_user

if TYPE_CHECKING:
    from internvl3_mlx.training.cost_estimate import CostEstimate
    from internvl3_mlx.training.events import (
        DataChecked,
        RecordLeftOut,
        SteppedBack,
        TaskProgress,
        TestEvaluated,
        TrainEnd,
        TrainEvent,
        TrainPlan,
        UpdateDone,
        ValidationDone,
    )

INTERRUPTED = 130
EXIT_CODES: "Mapping[str | None, int]" = {
    "interrupted": INTERRUPTED,
    "memory": 1,
}  # by why a run stopped early
FIGURES = ("accuracy", "step_accuracy", "step_macro_f1")  # of a validation or test
SHOWN_METRICS = (
    "dpo",
    "bco",
    "orpo",
    "simpo",
    "kto",
    "sft",
    "distill",
    "kl",
    "margin",
    "reward",
)  # metrics.csv has all of them
FEW_UPDATES = 30  # fewer hardly change a model


@dataclass(frozen=True)
class TrainRequest:
    """The command line as one value."""

    config: TrainConfig
    check: bool
    dry_run: bool
    resume: bool
    resume_from: int | None
    accept_changes: bool
    overwrite: bool
    as_json: bool
    quiet: bool
    upload_repo: str | None = None
    private: bool = False
    yes: bool = False


def no_progress(_text: str, _done: int, _total: int) -> None:
    """Show no progress."""


@dataclass(eq=False)
class TrainDisplay:
    """Shows the events of a run: to a person, or to a script with --json."""

    request: TrainRequest
    advance: progress.ProgressCallback = no_progress
    updates: int = 0
    exit_code: int = 0
    end: "TrainEnd | None" = None

    def show(self, event: "TrainEvent") -> None:
        """Show one event, in the form that was asked for."""
        name = type(event).__name__
        if name == "TrainEnd":
            self.end = cast("TrainEnd", event)
            self.exit_code = EXIT_CODES.get(getattr(event, "stop_cause", None), 0)
        if self.request.as_json and name in EVENTS_AS_JSON:
            kind, content = EVENTS_AS_JSON[name]
            console.print_json({"event": kind, **content(event)})
        elif not self.request.as_json and not self.request.quiet and name in self.handlers:
            self.handlers[name](event)

    @property
    def handlers(self) -> "dict[str, Callable[[Any], None]]":
        return {
            "TaskProgress": self.show_progress,
            "DataChecked": self.show_data,
            "TrainPlan": self.show_plan,
            "UpdateDone": self.show_update,
            "RecordLeftOut": self.show_left_out,
            "SteppedBack": self.show_step_back,
            "ValidationDone": self.show_validation,
            "TestEvaluated": self.show_test,
            "TrainEnd": self.show_end,
        }

    def show_progress(self, event: "TaskProgress") -> None:
        self.advance(event.task, event.done, event.total)

    def show_data(self, event: "DataChecked") -> None:
        """Say which records are not used in full."""
        if event.train.skipped or event.train.truncated:
            console.note(
                f"{event.train.skipped:,} records are skipped and {event.train.truncated:,} "
                f"truncated to {self.request.config.max_seq_length:,} tokens; --check lists them"
            )
        for note in event.train.notes:
            console.note(note)

    def show_plan(self, plan: "TrainPlan") -> None:
        """Print what is about to be trained, and note what may surprise."""
        self.updates = plan.updates
        console.print_table(plan_table(plan))
        if plan.cost:
            note_tight_memory(plan.cost)
        if plan.completed_updates >= plan.updates:
            console.note(
                f"all {plan.updates} updates are done already; to make more, pass "
                "--iters N --accept-changes"
            )
        elif plan.updates < FEW_UPDATES:
            count = "1 update" if plan.updates == 1 else f"{plan.updates} updates"
            console.note(f"the run makes only {count}; raise --epochs or --iters for more")

    def show_update(self, done: "UpdateDone") -> None:
        """Advance the bar, and print a line every --steps-per-report updates."""
        text = " · ".join([f"loss {done.loss:.4f}", *format_speed(done)])
        self.advance(text, done.update, self.updates)
        due = done.update % self.request.config.steps_per_report == 0 or done.skipped
        if due or done.update == self.updates:
            self.show_line(done.update, describe_update(done))

    def show_validation(self, done: "ValidationDone") -> None:
        self.show_line(done.update, describe_validation(done))

    def show_left_out(self, event: "RecordLeftOut") -> None:
        """Name a record that could not be read."""
        console.note(f"left out {event.location}: {event.error}")

    def show_step_back(self, event: "SteppedBack") -> None:
        """Say that the loss exploded, and where the run goes on."""
        rate = self.request.config.learning_rate * event.rate_factor
        console.note(
            f"the loss exploded ({event.loss:.4g} at update {event.update}); going back to update "
            f"{event.to_update} with a peak learning rate of {rate:g}"
        )

    def show_test(self, done: "TestEvaluated") -> None:
        self.show_line(self.updates, describe_test(done))

    def show_line(self, update: int, text: str) -> None:
        console.hint(f"{update:>{len(str(self.updates))}} · {text}")

    def show_end(self, end: "TrainEnd") -> None:
        """Sum the run up, and say what to do with its result."""
        if end.stop_reason:
            console.note(f"stopped: {end.stop_reason}")
        table = end_values(end).items()
        console.print_table({name: format_loss(x) for name, x in table if x is not None})
        for line in next_steps(self.request.config, end):
            console.hint(line)


def plan_table(plan: "TrainPlan") -> dict[str, Any]:
    """Select what a person wants to know of a plan."""
    share = plan.trainable_parameters / plan.total_parameters
    values = {
        "method": plan.method,
        "model": plan.model,
        "trained": f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters "
        f"({share:.2%})",
        "adapted_layers": plan.adapted_layers or None,
        "records": plan.records,
        "tokens": plan.tokens,
        "tiles": plan.tiles,
        "validation_records": plan.valid_records or None,
        "updates": plan.updates,
        "warmup_updates": plan.warmup_updates,
        "samples_per_update": plan.samples_per_update,
        "processes": plan.processes if plan.processes > 1 else None,
        "resuming_after_update": plan.completed_updates or None,
        **(cost_table(plan.cost) if plan.cost else {}),
        "disk": f"{console.format_size(plan.disk_bytes)} of "
        f"{console.format_size(plan.free_bytes)} free",
    }
    return without_none(values)


def cost_table(cost: "CostEstimate") -> dict[str, str]:
    """Format predicted memory and time."""
    size = console.format_size
    parts = f"weights {size(cost.weights)}, optimizer {size(cost.training)}, "
    parts += f"activations {size(cost.activations)}, images {size(cost.features)}"
    return {
        "memory": f"about {size(cost.memory)} of {size(cost.limit)} ({parts})",
        "seconds_per_update": f"about {cost.seconds:.2g}",
    }


def note_tight_memory(cost: "CostEstimate") -> None:
    """Say which flags would make a run fit that does not."""
    if cost.fits:
        return
    console.note(
        f"the run needs about {console.format_size(cost.memory)} of memory, and this machine may "
        f"use {console.format_size(cost.limit)}; what would make it fit, in the order of its cost:"
    )
    for flags, memory in cost.remedies:
        console.hint(f"  {flags}: about {console.format_size(memory)}")
    if not cost.remedies or cost.remedies[-1][1] > cost.limit:
        console.hint("  a smaller model, or a shorter --max-seq-length")


def describe_update(done: "UpdateDone") -> str:
    """Describe an update in one line: ``loss 1.2340 · 1,234 tok/s · 3.2 GB``."""
    if done.skipped:
        return f"skipped: loss {done.loss}, gradient norm {done.grad_norm}"
    shown = {name: done.metrics[name] for name in SHOWN_METRICS if name in done.metrics}
    parts = [f"{name} {value:.4f}" for name, value in ({"loss": done.loss} | shown).items()]
    return " · ".join([*parts, *format_speed(done)])


def describe_validation(done: "ValidationDone") -> str:
    """Describe a validation in one line: ``val loss 1.2340 · exact match 0.5000``."""
    parts = [f"val loss {done.loss:.4f}"]
    parts += describe_figures("val", done.metrics)
    if done.exact_match is not None:
        parts.append(f"val exact match {done.exact_match:.4f}")
    return " · ".join([*parts, *(["best so far"] if done.is_best else [])])


def describe_figures(split: str, metrics: Mapping[str, float]) -> list[str]:
    """Describe the figures of merit: ``val step accuracy 0.9200``."""
    names = [*FIGURES, *(name for name in metrics if name.startswith("answer_"))]
    shown = {name: metrics[name] for name in names if name in metrics}
    return [f"{split} {name.replace('_', ' ')} {value:.4f}" for name, value in shown.items()]


def describe_test(done: "TestEvaluated") -> str:
    """Describe the evaluation on the test data in one line."""
    parts = [f"test loss {done.loss:.4f}"]
    parts += describe_figures("test", done.metrics)
    if done.exact_match is not None:
        parts.append(f"test exact match {done.exact_match:.4f}")
    return " · ".join(parts)


def format_speed(done: "UpdateDone") -> list[str]:
    """Format tokens per second and peak memory."""
    return [f"{done.tokens / done.seconds:,.0f} tok/s", console.format_size(done.peak_memory)]


def format_loss(value: Any) -> Any:
    """Keep four digits of a loss; the table would round 0.0032 to 0."""
    return f"{value:.4f}" if isinstance(value, float) else value


def next_steps(config: TrainConfig, end: "TrainEnd") -> Iterator[str]:
    """Suggest the commands to run next."""
    from internvl3_mlx.loading.resolve import DEFAULT_MODEL

    folder = shlex.quote(str(expand_user(config.adapter_path)))
    if end.stop_reason:
        yield f"resume with: internvl3 train --resume --adapter-path {folder}"
    if config.uses_adapters:
        name = shlex.quote(config.model or DEFAULT_MODEL)
        yield f"try it with: internvl3 chat --model {name} --adapter-path {folder}"
    else:
        yield f"try it with: internvl3 chat --model {shlex.quote(str(end.result))}"
