"""What is seen of a training run: its plan, a line now and then, how it ended. Or JSON lines."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import progress, console

if TYPE_CHECKING:
    from internvl3_mlx.training.run import Moment
    from internvl3_mlx.training.session import Session

INTERRUPTED = 130
SHOWN_FIGURES = ("dpo", "bco", "sft", "margin")  # all of them are in the table
SHOWN_CHECKS = ("val_loss", "val_accuracy", "val_exact")
FEW_UPDATES = 30  # fewer hardly move a model


@dataclass(eq=False)
class Show:
    """What a person, or a script with --json, sees of a run."""

    session: "Session"
    as_json: bool
    quiet: bool
    last: "Moment | None" = None

    def plan(self) -> None:
        """Say what is about to be done, in figures."""
        from internvl3_mlx.training.plan import plan_of

        plan = plan_of(self.session)
        if self.as_json:
            console.as_json({"event": "plan", **plan})
        elif not self.quiet:
            console.facts(plan)
            self.tell_odd()

    def tell_odd(self) -> None:
        """Note what a person would wonder about later."""
        updates, done = self.session.learner.updates, self.session.learner.update
        if done >= updates:
            console.note(f"all {updates} updates are made; more of them: --iters N --accept-changes")
        elif updates < FEW_UPDATES:
            made = "1 update" if updates == 1 else f"{updates} updates"
            console.note(f"only {made}; --epochs or --iters make more")

    def moment(self, moment: "Moment", advance: progress.Advance) -> None:
        """Move the bar, and write a line where it is time for one."""
        step, recipe, updates = moment.step, self.session.recipe, self.session.learner.updates
        self.last = moment
        if self.as_json:
            console.as_json({"event": "update", **as_row(moment)})
        elif not self.quiet:
            advance(" · ".join([f"loss {step.loss:.4f}", *speed(moment)]), step.update, updates)
            due = step.update % recipe.steps_per_report == 0 or moment.checked or step.skipped
            if due or step.update == updates:
                console.hint(f"{step.update:>{len(str(updates))}} · {describe(moment)}")

    def end(self) -> int:
        """Say how it ended and what to do now; return the exit code."""
        moment = self.last
        stopped = moment.stopped if moment else ""
        self.tell_end(stopped)
        if stopped == "interrupted":
            return INTERRUPTED
        return 1 if stopped.startswith("memory") else 0

    def tell_end(self, stopped: str) -> None:
        """Sum the run up, and say what to do with it."""
        report = self.report(stopped)
        if self.as_json:
            console.as_json({"event": "end", **report})
        elif not self.quiet:
            if stopped:
                console.note(f"stopped: {stopped}")
            console.facts(
                {name: in_words(value) for name, value in report.items() if value is not None}
            )
            for advice in self.advice(stopped):
                console.hint(advice)

    def report(self, stopped: str) -> dict[str, Any]:
        from internvl3_mlx.training.results import BEST, result_folder

        session, best = self.session, self.session.progress.best_update
        return {
            "updates": session.learner.update,
            "loss": self.last.step.loss if self.last else None,
            "result": str(result_folder(session)),
            "best": str(session.folder / BEST) if best else None,
            "best_update": best or None,
            "best_loss": session.progress.best_loss,
            "seconds": round(session.progress.seconds),
            "stopped": stopped or None,
        }

    def advice(self, stopped: str) -> "Iterator[str]":
        """Say what can be typed next."""
        from internvl3_mlx.loading.resolve import DEFAULT_MODEL
        from internvl3_mlx.training.results import MODEL

        recipe, folder = self.session.recipe, shlex.quote(str(self.session.folder))
        if stopped:
            yield f"go on with: internvl3 train --resume --adapter-path {folder}"
        if recipe.adapts:
            name = shlex.quote(recipe.model or DEFAULT_MODEL)
            yield f"try it with: internvl3 chat --model {name} --adapter-path {folder}"
        else:
            yield f"try it with: internvl3 chat --model {folder}/{MODEL}"


def in_words(value: Any) -> Any:
    """Give a loss of 0.0032 its digits: the screen would round it to 0."""
    return f"{value:.4f}" if isinstance(value, float) else value


def describe(moment: "Moment") -> str:
    """Put an update in one line: ``loss 1.234 · val 1.3 · 1,234 tok/s · 3.2 GB``."""
    step = moment.step
    if step.skipped:
        return f"skipped: loss {step.loss}, gradient {step.norm}"
    told: dict[str, float] = {"loss": step.loss}
    told |= {name: step.figures[name] for name in SHOWN_FIGURES if name in step.figures}
    checked = moment.checked or {}
    told |= {name.replace("_", " "): checked[name] for name in SHOWN_CHECKS if name in checked}
    parts = [f"{name} {value:.4f}" for name, value in told.items()]
    return " · ".join([*parts, *speed(moment)])


def speed(moment: "Moment") -> list[str]:
    step = moment.step
    return [f"{step.tokens / step.seconds:,.0f} tok/s", console.size(step.memory)]


def as_row(moment: "Moment") -> dict[str, Any]:
    from internvl3_mlx.training.loggers import row_of

    row = {
        name: value
        for name, value in row_of(moment.step, moment.checked).items()
        if value is not None
    }
    return row | ({"saved": str(moment.saved)} if moment.saved else {})
