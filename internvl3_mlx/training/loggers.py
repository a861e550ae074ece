"""Where a run's metrics go: always a CSV and a plot, and other loggers on request."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from internvl3_mlx.errors import MissingExtraError, TrainingError, UserError
from internvl3_mlx.files import atomic_write
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.events import UpdateDone, ValidationDone
from internvl3_mlx.training.plot import MetricsRow, draw_plot

METRICS_FILE, PLOT_FILE = "metrics.csv", "loss.svg"
PROJECT = "internvl3-mlx"
GB = 1e9
PLOT_EVERY = 20  # rows, so that a plot opened during a run shows most of it
UPDATE = "update"


class Logger(Protocol):
    """A destination for metrics."""

    def log(self, row: MetricsRow) -> None: ...

    def close(self) -> None: ...


def metrics_row(
    done: UpdateDone, validation: ValidationDone | None
) -> dict[str, float | int | None]:
    """Combine the metrics of an update and of the validation after it in one row."""
    val_metrics = validation.metrics if validation else {}
    return {
        UPDATE: done.update,
        "loss": done.loss,
        "val_loss": validation.loss if validation else None,
        "val_exact": validation.exact_match if validation else None,
        **done.metrics,
        **{f"val_{name}": val_metrics.get(name) for name in {**done.metrics, **val_metrics}},
        "learning_rate": done.learning_rate,
        "grad_norm": done.grad_norm,
        "tokens": done.tokens,
        "trained_tokens": done.trained_tokens,
        "tokens_per_second": done.tokens / done.seconds,
        "memory_gb": done.peak_memory / GB,
        "seconds": done.seconds,
        "skipped": int(done.skipped),
    }


@contextmanager
def open_loggers(
    config: TrainConfig, run: Path, after: int = 0, *, is_main: bool = True
) -> "Iterator[LoggerList]":
    """Open all configured loggers, and close them at the end.

    after: the update a resumed run continues from; later rows of the CSV are dropped. Only the main
    process logs; the list of the others is empty.
    """
    if not is_main:
        yield LoggerList([])
        return
    loggers = LoggerList(
        [CSVLogger(run, after), *(make_logger(name, config, run) for name in config.report_to)]
    )
    try:
        yield loggers
    finally:
        for logger in loggers.loggers:
            logger.close()


@dataclass(frozen=True)
class LoggerList:
    """Passes each row to every logger."""

    loggers: Sequence[Logger]

    def log(self, row: MetricsRow) -> None:
        for logger in self.loggers:
            logger.log(row)

    def rewind(self, update: int) -> None:
        """Drop the rows after an update, where that is possible: they are made again."""
        for logger in self.loggers:
            if isinstance(logger, CSVLogger):
                logger.rewind(update)


@dataclass(eq=False)
class CSVLogger:
    """Writes ``metrics.csv``, one row per update, and the plot of it."""

    run: Path
    after: int = 0
    rows: list[MetricsRow] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [*read_metrics(self.run / METRICS_FILE)]
        self.rewind(self.after)

    def rewind(self, update: int) -> None:
        """Keep the rows up to an update."""
        self.rows = [row for row in self.rows if (row[UPDATE] or 0) <= update]
        self.rewrite()

    def log(self, row: MetricsRow) -> None:
        columns = [*self.rows[0]] if self.rows else [*row]
        self.rows.append(row)
        if [*row] != columns or len(self.rows) == 1:
            self.rewrite()
        else:
            with (self.run / METRICS_FILE).open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, columns).writerow(row)
        if len(self.rows) % PLOT_EVERY == 0:
            self.write_plot()

    def rewrite(self) -> None:
        """Write the whole table, atomically."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        if columns:
            writer.writeheader()
        writer.writerows(self.rows)
        with atomic_write(self.run / METRICS_FILE) as path:
            path.write_text(text.getvalue(), encoding="utf-8", newline="")

    def write_plot(self) -> None:
        with atomic_write(self.run / PLOT_FILE) as path:
            path.write_text(draw_plot(self.rows), encoding="utf-8")

    def close(self) -> None:
        """Draw the final plot, if there are any rows."""
        if self.rows:
            self.write_plot()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Read ``metrics.csv``; a missing file has no rows."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        try:
            return [
                {name: parse_number(text) if text else None for name, text in row.items()}
                for row in csv.DictReader(file)
            ]
        except (ValueError, TypeError) as error:
            raise TrainingError(
                f"{path} is not a metrics table written by a run; move it to another folder"
            ) from error


def parse_number(text: str) -> float | int:
    """Read a number as it was written, so that a resumed run's table does not change."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


def make_logger(name: str, config: TrainConfig, run: Path) -> Logger:
    """Create a logger; raises MissingExtraError when its library is not installed."""
    _, make = LOGGERS[name]
    return make(import_library(name), config, run)


def check_loggers(config: TrainConfig) -> None:
    """Raise MissingExtraError for a logger that is not installed, before anything is loaded."""
    for name in config.report_to:
        import_library(name)


def import_library(name: str) -> Any:
    """Import the library of a logger."""
    library, _ = LOGGERS[name]
    try:
        return import_module(library)
    except Exception as error:
        root = library.partition(".")[0]
        missing = getattr(error, "name", None) or root
        if isinstance(error, ModuleNotFoundError) and missing.partition(".")[0] == root:
            raise MissingExtraError(f"--report-to {name}", library, name) from error
        raise UserError(
            f"--report-to {name}: {root} is installed, but cannot be imported "
            f"({type(error).__name__}: {error}); reinstall it, or drop {name}"
        ) from error


def logged_values(row: MetricsRow) -> dict[str, float | int]:
    """Return the metrics of a row that have a value."""
    return {name: value for name, value in row.items() if value is not None and name != UPDATE}


class WandbLogger:
    """Logs to Weights & Biases, or to SwanLab, which has the same interface."""

    def __init__(self, module: Any, config: TrainConfig, run: Path):
        self.module = module
        folders = {"wandb": {"dir": str(run)}, "swanlab": {"logdir": str(run / "swanlab")}}
        module.init(
            project=PROJECT, name=run.name, config=config.to_dict(), **folders[module.__name__]
        )

    def log(self, row: MetricsRow) -> None:
        self.module.log(logged_values(row), step=row[UPDATE])

    def close(self) -> None:
        self.module.finish()


class TensorBoardLogger:
    """Logs to TensorBoard through tensorboardX, which does not need PyTorch."""

    def __init__(self, module: Any, config: TrainConfig, run: Path):
        self.writer = module.SummaryWriter(str(run / "tensorboard"))
        lines = (f"    {name}: {value}" for name, value in config.to_dict().items())
        self.writer.add_text("config", "\n".join(lines))

    def log(self, row: MetricsRow) -> None:
        for name, value in logged_values(row).items():
            self.writer.add_scalar(name, value, row[UPDATE])

    def close(self) -> None:
        self.writer.close()


# name -> the library to import, and the logger that uses it
LOGGERS: Mapping[str, tuple[str, Any]] = {
    "wandb": ("wandb", WandbLogger),
    "tensorboard": ("tensorboardX", TensorBoardLogger),
    "swanlab": ("swanlab", WandbLogger),
}
