"""Metrics of a run: a table that is always complete, curves, other loggers."""

import csv
import re
import sys
from xml.etree import ElementTree as ET

import pytest

from internvl3_mlx.errors import MissingExtraError, TrainingError, UserError
from internvl3_mlx.training import loggers
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.events import ValidationDone
from internvl3_mlx.training.loggers import check_loggers, metrics_row, open_loggers, read_metrics
from internvl3_mlx.training.plot import axis_ticks, draw_plot, running_mean, update_ticks
from internvl3_mlx.training.trainer import UpdateDone

SVG = "{http://www.w3.org/2000/svg}"


def step(update, loss=2.5, **figures):
    return UpdateDone(update, loss, figures, 3e-5, 0.7, 1200, 300, 2.0, 5_000_000, skipped=False)


def run(folder, rows, after=0, **recipe):
    with open_loggers(TrainConfig(**recipe), folder, after) as to:
        for row in rows:
            to.log(row)


def test_every_update_is_a_row(tmp_path):
    validation = ValidationDone(2, 2.0, {"dpo": 0.25}, exact_match=0.5, is_best=True)
    run(
        tmp_path,
        [metrics_row(step(1, dpo=0.5), None), metrics_row(step(2, 2.25, dpo=0.5), validation)],
    )
    with (tmp_path / "metrics.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["update"], first["loss"], first["val_loss"]) == ("1", "2.5", "")
    assert (second["val_loss"], second["val_exact"], second["val_dpo"]) == ("2.0", "0.5", "0.25")
    assert float(first["tokens_per_second"]) == 600
    assert float(first["memory_gb"]) == 0.005
    assert (first["tokens"], first["trained_tokens"], first["skipped"]) == ("1200", "300", "0")


def test_the_table_is_complete_after_every_row(tmp_path):
    with open_loggers(TrainConfig(), tmp_path) as to:
        for n in range(1, 4):
            to.log(metrics_row(step(n), None))
            assert [row["update"] for row in read_metrics(tmp_path / "metrics.csv")] == [
                *range(1, n + 1)
            ]


def test_the_plot_is_written_during_the_run(tmp_path):
    with open_loggers(TrainConfig(), tmp_path) as to:
        for n in range(1, loggers.PLOT_EVERY + 1):
            assert not (tmp_path / "loss.svg").exists()
            to.log(metrics_row(step(n), None))
        assert (tmp_path / "loss.svg").exists()


def test_a_resumed_run_continues_its_table(tmp_path):
    run(tmp_path, [metrics_row(step(n, float(n)), None) for n in range(1, 6)])
    run(tmp_path, [metrics_row(step(n, 9.0), None) for n in (4, 5)], after=3)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["update"], row["loss"]) for row in rows] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 9),
        (5, 9),
    ]


def test_metrics_that_appear_later_get_a_column(tmp_path):
    run(tmp_path, [metrics_row(step(1), None), metrics_row(step(2, bco=1.5), None)])
    assert [row["bco"] for row in read_metrics(tmp_path / "metrics.csv")] == [None, 1.5]


def test_a_table_of_something_else_is_reported(tmp_path):
    (tmp_path / "metrics.csv").write_text("update,loss\n1,high\n")
    with pytest.raises(
        TrainingError, match=r"metrics.csv is not a metrics table written by a run; move it"
    ):
        run(tmp_path, [])


def test_no_row_no_plot(tmp_path):
    run(tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def curves(rows):
    """The points of every curve of a plot, by panel."""
    root = ET.fromstring(draw_plot(rows))
    found = []
    for path in root.iter(f"{SVG}path"):
        if path.get("class") != "grid":
            found.append([tuple(map(float, pair.split(","))) for pair in path.get("d")[1:].split()])
    titles = [text.text for text in root.iter(f"{SVG}text") if text.get("font-weight")]
    return root, titles, found


def test_curves_pass_through_the_values():
    rows = [
        {"update": n, "loss": loss, "val_loss": None} for n, loss in ((1, 4.0), (3, 2.0), (5, 3.0))
    ]
    root, titles, [points] = curves(rows)
    assert titles == ["loss"]
    (x1, y1), (x2, y2), (x3, y3) = points
    assert x2 - x1 == pytest.approx(x3 - x2)
    assert y2 > y3 > y1  # heights count from the top
    assert (y2 - y1) == pytest.approx(2 * (y3 - y1), abs=0.2)
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    assert dots == points


def test_a_panel_is_drawn_when_it_has_values():
    rows = [
        {"update": 1, "loss": 2.0, "dpo": 0.7, "chosen_reward": 0.1, "val_exact": 0.5},
        {"update": 2, "loss": float("nan"), "dpo": 0.6, "chosen_reward": 0.2, "val_exact": None},
    ]
    _, titles, _ = curves(rows)
    assert titles == ["loss", "terms", "rewards", "accuracy"]


def test_accuracy_is_drawn_between_0_and_1():
    _, _, [points] = curves([{"update": n, "val_exact": 0.75} for n in (1, 2)])
    _, _, [none, every] = curves([{"update": 1, "val_exact": 0.0, "accuracy": 1.0}])
    bottom, top = sorted((none[0][1], every[0][1]), reverse=True)
    assert points[0][1] == pytest.approx(top + (bottom - top) / 4, abs=0.1)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-7, 1e6])
def test_a_flat_curve_has_an_axis_too(value):
    _, _, [points] = curves([{"update": n, "loss": value} for n in (1, 2)])
    assert points[0][1] == points[1][1]


def test_a_long_curve_is_smoothed_and_no_point_is_drawn_to_zero():
    assert [y for _, y in running_mean([(1, 4.0), (2, 4.0), (3, 4.0)])] == pytest.approx([4, 4, 4])
    found = running_mean([(1, 1.0), (2, 2.0)])
    assert found[1][1] == pytest.approx((0.9 * 1 + 2) / 1.9)
    rows = [{"update": n, "loss": n % 2} for n in range(1, 61)]
    _, _, [faint, bold] = curves(rows)
    assert max(y for _, y in faint) - min(y for _, y in faint) > 3 * (bold[-1][1] - bold[-2][1])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.2, 0.9), (-3, 7), (1e-7, 9e-5), (12, 13), (5, 5), (0, 0)]
)
def test_ticks_are_few_round_and_enclose_all_values(low, high):
    marks = axis_ticks(low, high)
    assert marks[0] <= low <= high <= marks[-1]
    assert 2 <= len(marks) <= 7
    assert all(len(re.sub(r"e.*|[-.]", "", f"{mark:g}").strip("0")) <= 4 for mark in marks)


@pytest.mark.parametrize("last", [1, 2, 7, 240, 3301])
def test_update_ticks_are_integers_and_include_the_last(last):
    marks = update_ticks(last)
    assert marks[0] == 1
    assert marks[-1] == last
    assert len(marks) <= 11


class Recorder:
    """Replaces a logger's library and records the calls."""

    def __init__(self, name):
        self.__name__, self.calls = name, []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_wandb_and_swanlab_get_every_metric_at_its_update(tmp_path, monkeypatch, name):
    library = Recorder(name)
    monkeypatch.setitem(sys.modules, name, library)
    run(
        tmp_path,
        [metrics_row(step(3, dpo=0.5), ValidationDone(3, 2.0, {}, None, is_best=True))],
        report_to=(name,),
    )
    (init, _, begun), (log, [figures], at), (finish, _, _) = library.calls
    assert (init, log, finish) == ("init", "log", "finish")
    assert begun["config"]["learning_rate"] == 4e-5
    assert at == {"step": 3}
    assert (figures["loss"], figures["val_loss"], figures["dpo"]) == (2.5, 2.0, 0.5)
    assert "update" not in figures
    assert "val_exact" not in figures


def test_tensorboard_gets_every_figure_at_its_update(tmp_path, monkeypatch):
    library = Recorder("tensorboardX")
    monkeypatch.setitem(sys.modules, "tensorboardX", library)
    run(tmp_path, [metrics_row(step(3), None)], report_to=("tensorboard",))
    scalars = {args[0]: args[1:] for name, args, _ in library.calls if name == "add_scalar"}
    assert scalars["loss"] == (2.5, 3)
    assert library.calls[-1][0] == "close"


@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_a_logger_that_is_not_installed_is_told_before_anything_begins(monkeypatch, name):
    library = loggers.LOGGERS[name][0]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        MissingExtraError, match=rf"--report-to {name} needs {library}; run pip install"
    ):
        check_loggers(TrainConfig(report_to=(name,)))


def test_a_logger_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("import no_such_part_of_it")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"wandb is installed, but cannot be imported .*reinstall"):
        check_loggers(TrainConfig(report_to=("wandb",)))


def test_loggers_are_closed_when_a_run_breaks_off(tmp_path, monkeypatch):
    library = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", library)
    broken = open_loggers(TrainConfig(report_to=("wandb",)), tmp_path)
    broken.__enter__().log(metrics_row(step(1), None))
    broken.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert library.calls[-1][0] == "finish"
    assert (tmp_path / "loss.svg").exists()


def test_other_processes_log_nothing(tmp_path):
    with open_loggers(TrainConfig(), tmp_path, is_main=False) as to:
        to.log(metrics_row(step(1), None))
    assert [*tmp_path.iterdir()] == []
