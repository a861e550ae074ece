"""Numbers for charts: from vega-datasets where it is installed, else a few tables of our own."""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
OWN, VEGA = "own numbers", "vega-datasets"


@dataclass(frozen=True)
class Series:
    """One series of a chart: a title, and a value for each label."""

    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]


# counted and invented by us; they only have to be plausible
OWN_SERIES = (
    Series("Visitors of the library", MONTHS,
           (412, 388, 455, 430, 397, 342, 268, 251, 436, 489, 512, 374)),
    Series("Rain in mm", MONTHS, (61, 48, 55, 42, 58, 73, 80, 77, 59, 52, 66, 70)),
    Series("Loaves sold", ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat"), (86, 92, 97, 88, 134, 171)),
    Series("Books by subject", ("Art", "History", "Math", "Music", "Travel"),
           (143, 265, 98, 77, 189)),
    Series("Minutes on the road", ("Bus", "Bike", "Car", "Train", "Walk"), (38, 27, 22, 31, 64)),
    Series("Bees counted", ("Aster", "Clover", "Lavender", "Sage", "Thyme"), (19, 46, 71, 33, 25)),
    Series("Power in kWh", MONTHS, (318, 290, 276, 231, 205, 188, 179, 182, 203, 244, 281, 326)),
    Series("Height in cm", ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn"),
           (151, 163, 147, 172, 158, 168)),
)  # fmt: skip


@cache
def load_series() -> tuple[str, tuple[Series, ...]]:
    """Return where the numbers come from, and the series."""
    folder = vega_folder()
    if folder is None:
        return OWN, OWN_SERIES
    return VEGA, tuple(series for read in VEGA_READERS for series in read(folder))


def vega_folder() -> Path | None:
    """Return the data folder of vega-datasets, without importing it (it would import pandas)."""
    found = find_spec("vega_datasets")
    folders = list(found.submodule_search_locations or ()) if found else []
    folder = Path(folders[0], "_data") if folders else None
    return folder if folder is not None and folder.is_dir() else None


def _weather(folder: Path) -> Iterator[Series]:
    columns = {
        "temp_max": "Mean high in °C",
        "precipitation": "Mean rain in mm",
        "wind": "Wind in m/s",
    }
    with (folder / "seattle-weather.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for column, title in columns.items():
        for year in sorted({row["date"][:4] for row in rows}):
            months = _means(
                (row["date"][5:7], float(row[column])) for row in rows if row["date"][:4] == year
            )
            values = tuple(round(months[month], 1) for month in sorted(months))
            if len(values) == len(MONTHS):
                yield Series(f"{title}, Seattle {year}", MONTHS, values)


def _barley(folder: Path) -> Iterator[Series]:
    rows = json.loads((folder / "barley.json").read_text("utf-8"))
    for year in (1931, 1932):
        sites = _means((row["site"], float(row["yield"])) for row in rows if row["year"] == year)
        yield _of(f"Barley yield {year}", sites)


def _cars(folder: Path) -> Iterator[Series]:
    rows = json.loads((folder / "cars.json").read_text("utf-8"))
    for origin in ("USA", "Europe", "Japan"):
        years = _means(
            (row["Year"][:4], float(row["Horsepower"]))
            for row in rows
            if row["Origin"] == origin and row["Horsepower"] is not None
        )
        yield _of(f"Mean horsepower, {origin}", dict(list(years.items())[:8]))


def _electricity(folder: Path) -> Iterator[Series]:
    with (folder / "iowa-electricity.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for source in sorted({row["source"] for row in rows}):
        years = {
            row["year"][:4]: float(row["net_generation"]) for row in rows if row["source"] == source
        }
        yield _of(f"Electricity in Iowa, {source}", dict(list(years.items())[-8:]))


VEGA_READERS: Sequence[Callable[[Path], Iterator[Series]]] = (
    _weather,
    _barley,
    _cars,
    _electricity,
)


def _means(pairs: Iterator[tuple[str, float]]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return {key: fmean(values) for key, values in groups.items()}


def _of(title: str, values: Mapping[str, float]) -> Series:
    return Series(title, tuple(values), tuple(round(value, 1) for value in values.values()))
