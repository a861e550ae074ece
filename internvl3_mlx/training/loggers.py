"""What a run leaves behind to look at: a CSV and a plot always, other loggers where asked for."""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from internvl3_mlx.errors import MissingExtraError, TrainingError
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.plot import draw_plot
from internvl3_mlx.training.trainer import UpdateDone

METRICS_FILE, PLOT_FILE = "metrics.csv", "loss.svg"
PROJECT = "internvl3-mlx"
GB = 1e9
PLOT_EVERY = 20  # rows: whoever looks while a run goes on sees most of it
UPDATE = "update"
MetricsRow = Mapping[str, float | int | None]


class Logger(Protocol):
    """Somewhere that figures go."""

    def log(self, row: MetricsRow) -> None: ...

    def close(self) -> None: ...


def metrics_row(
    step: UpdateDone, checked: Mapping[str, float] | None
) -> dict[str, float | int | None]:
    """Put an update's figures, and those of a validation after it, in one row."""
    checked = checked or {}
    return {
        UPDATE: step.update,
        "loss": step.loss,
        "val_loss": checked.get("val_loss"),
        "val_exact": checked.get("val_exact"),
        **step.metrics,
        **{f"val_{name}": checked.get(f"val_{name}") for name in step.metrics},
        "learning_rate": step.learning_rate,
        "grad_norm": step.grad_norm,
        "tokens": step.tokens,
        "trained_tokens": step.trained_tokens,
        "tokens_per_second": step.tokens / step.seconds,
        "memory_gb": step.peak_memory / GB,
        "seconds": step.seconds,
        "skipped": int(step.skipped),
    }


@contextmanager
def open_loggers(
    recipe: TrainConfig, run: Path, after: int = 0, *, writes: bool = True
) -> "Iterator[LoggerList]":
    """Open all that a recipe reports to; of a run that was resumed rows are kept to ``after``.

    ``writes``: only one rank of several does; the others report to nobody.
    """
    if not writes:
        yield LoggerList([])
        return
    report = LoggerList(
        [CSVLogger(run, after), *(make_logger(name, recipe, run) for name in recipe.report_to)]
    )
    try:
        yield report
    finally:
        for logger in report.loggers:
            logger.close()


@dataclass(frozen=True)
class LoggerList:
    """Passes each row to every logger."""

    loggers: list[Logger]

    def log(self, row: MetricsRow) -> None:
        for logger in self.loggers:
            logger.log(row)


@dataclass(eq=False)
class CSVLogger:
    """The CSV, one row an update, and the plot that is drawn of it."""

    run: Path
    after: int = 0
    rows: list[MetricsRow] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [
            row for row in read_metrics(self.run / METRICS_FILE) if (row[UPDATE] or 0) <= self.after
        ]
        self.rewrite()

    def log(self, row: MetricsRow) -> None:
        known = [*self.rows[0]] if self.rows else [*row]
        self.rows.append(row)
        if [*row] != known or len(self.rows) == 1:
            self.rewrite()
        else:
            with (self.run / METRICS_FILE).open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, known).writerow(row)
        if len(self.rows) % PLOT_EVERY == 0:
            self.write_plot()

    def rewrite(self) -> None:
        """Write the table anew, whole before it takes its name."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        if columns:
            writer.writeheader()
        writer.writerows(self.rows)
        replace(self.run / METRICS_FILE, text.getvalue())

    def write_plot(self) -> None:
        replace(self.run / PLOT_FILE, draw_plot(self.rows))

    def close(self) -> None:
        """Draw what there is, if there is anything."""
        if self.rows:
            self.write_plot()


def replace(path: Path, text: str) -> None:
    """Write a file beside ``path`` and let it take the name."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8", newline="")
    os.replace(aside, path)


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Read a table back; none is an empty one."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        try:
            return [
                {name: float(text) if text else None for name, text in row.items()}
                for row in csv.DictReader(file)
            ]
        except (ValueError, TypeError) as error:
            raise TrainingError(f"{path} is no table of figures; move it away") from error


def make_logger(name: str, recipe: TrainConfig, run: Path) -> Logger:
    """Open a logger whose library is installed; say how to install it where it is not."""
    library, make = LOGGERS[name]
    try:
        module = import_module(library)
    except ImportError as error:
        raise MissingExtraError(f"--report-to {name}", library, name) from error
    return make(module, recipe, run)


def check_loggers(recipe: TrainConfig) -> None:
    """Refuse a logger that is not installed, before anything is loaded."""
    for name in recipe.report_to:
        try:
            import_module(LOGGERS[name][0])
        except ImportError as error:
            raise MissingExtraError(f"--report-to {name}", LOGGERS[name][0], name) from error


def logged_values(row: MetricsRow) -> dict[str, float | int]:
    return {name: value for name, value in row.items() if value is not None and name != UPDATE}


class WandbLogger:
    """Weights & Biases or SwanLab, whose calls are alike."""

    def __init__(self, module: Any, recipe: TrainConfig, run: Path):
        self.module = module
        folders = {"wandb": {"dir": str(run)}, "swanlab": {"logdir": str(run / "swanlab")}}
        module.init(
            project=PROJECT, name=run.name, config=recipe.to_dict(), **folders[module.__name__]
        )

    def log(self, row: MetricsRow) -> None:
        self.module.log(logged_values(row), step=row[UPDATE])

    def close(self) -> None:
        self.module.finish()


class TensorBoardLogger:
    """TensorBoard, written by tensorboardX, which needs no torch."""

    def __init__(self, module: Any, recipe: TrainConfig, run: Path):
        self.writer = module.SummaryWriter(str(run / "tensorboard"))
        self.writer.add_text(
            "recipe", "\n".join(f"    {k}: {v}" for k, v in recipe.to_dict().items())
        )

    def log(self, row: MetricsRow) -> None:
        for name, value in logged_values(row).items():
            self.writer.add_scalar(name, value, row[UPDATE])

    def close(self) -> None:
        self.writer.close()


# name -> the library to import, and what is made of it
LOGGERS: Mapping[str, tuple[str, Any]] = {
    "wandb": ("wandb", WandbLogger),
    "tensorboard": ("tensorboardX", TensorBoardLogger),
    "swanlab": ("swanlab", WandbLogger),
}
