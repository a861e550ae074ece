"""Compare two evaluations of the same items: the paired difference, and what changed."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import DataError, UserError
from internvl3_mlx.evaluation.predictions import SCORES, RunFolder
from internvl3_mlx.metrics.statistics import PairedDifference, paired_difference

Row = Mapping[str, Any]
# settings that a comparison names where they differ
NAMED_SETTINGS = ("model", "weights", "adapter", "preset", "judge", "best_of", "fingerprint")
TILE_BUCKETS = ((1, "1 tile"), (4, "2 – 4 tiles"), (7, "5 – 7 tiles"), (13, "8 – 13 tiles"))
MANY_TILES = "14 tiles or more"
LENGTH_BUCKETS = ((1, "1 word"), (3, "2 – 3 words"), (9, "4 – 9 words"))
LONG_ANSWER = "10 words or more"
PERCENT = 100.0


@dataclass(frozen=True)
class ChangedItem:
    """An item whose score differs. a, b: its rows in the two runs."""

    id: str
    a: Row
    b: Row

    @property
    def change(self) -> float:
        return float(self.b["score"]) - float(self.a["score"])


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two runs over their common items. a, b: mean scores in percent.

    scores: what each run's own metric gave for all its items. only_a, only_b: items of one run.
    buckets: the difference by category, tiles and length of the true answer.
    """

    names: tuple[str, str]
    settings: tuple[Mapping[str, Any], Mapping[str, Any]]
    results: tuple[Mapping[str, Any], Mapping[str, Any]]
    a: float
    b: float
    difference: PairedDifference
    changed: Sequence[ChangedItem]
    buckets: Mapping[str, Mapping[str, PairedDifference]]
    different_text: int
    only_a: int
    only_b: int

    @property
    def differing_settings(self) -> dict[str, tuple[Any, Any]]:
        """Return the settings in which the runs differ, with both values."""
        first, second = self.settings
        found = {
            key: (first.get(key), second.get(key))
            for key in NAMED_SETTINGS
            if first.get(key) != second.get(key)
        }
        how = {*first["how"], *second["how"]}
        found |= {
            key: (first["how"].get(key), second["how"].get(key))
            for key in sorted(how)
            if first["how"].get(key) != second["how"].get(key)
        }
        if len(found) > 1:
            found.pop("fingerprint", None)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; scores and differences in percent."""
        return {
            "a": {"folder": self.names[0], "mean": self.a, **_outline(self.results[0])},
            "b": {"folder": self.names[1], "mean": self.b, **_outline(self.results[1])},
            "differing_settings": self.differing_settings,
            "difference": difference_dict(self.difference),
            "different_text": self.different_text,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "buckets": {
                kind: {name: difference_dict(part) for name, part in parts.items()}
                for kind, parts in self.buckets.items()
            },
            "changed": [
                {
                    "id": item.id,
                    "question": item.a["question"],
                    "answers": item.a["answers"],
                    "a": {key: item.a[key] for key in ("prediction", "extracted", "score")},
                    "b": {key: item.b[key] for key in ("prediction", "extracted", "score")},
                }
                for item in self.changed
            ],
        }


def _outline(result: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("title", "model", "weights", "preset", "metric", "score", "interval_95", "n")
    return {key: result.get(key) for key in keys}


def difference_dict(found: PairedDifference) -> dict[str, Any]:
    return {
        "n": found.n,
        "mean": PERCENT * found.mean,
        "interval_95": [PERCENT * found.interval.low, PERCENT * found.interval.high],
        "better": found.better,
        "worse": found.worse,
        "p_value": found.p_value,
    }


def compare_runs(first: Path, second: Path) -> Comparison:
    """Compare two folders of evaluations item by item.

    Raises ``DataError`` for a folder without a complete run, and ``UserError`` for runs of other
    data or other metrics.
    """
    folders = (RunFolder(first), RunFolder(second))
    settings = (folders[0].settings(), folders[1].settings())
    results = (folders[0].results(), folders[1].results())
    check_comparable(settings)
    rows = [{row["id"]: row for row in folder.read_lines(SCORES)} for folder in folders]
    common = [key for key in rows[0] if key in rows[1]]
    if not common:
        raise UserError(f"{first} and {second} have no item in common; evaluate the same items")
    pairs = [(rows[0][key], rows[1][key]) for key in common]
    return Comparison(
        names=(str(first), str(second)),
        settings=settings,
        results=results,
        a=PERCENT * _mean([row["score"] for row, _ in pairs]),
        b=PERCENT * _mean([row["score"] for _, row in pairs]),
        difference=_difference(pairs),
        changed=[ChangedItem(a["id"], a, b) for a, b in pairs if a["score"] != b["score"]],
        buckets=bucket_differences(pairs),
        different_text=sum(a["prediction"] != b["prediction"] for a, b in pairs),
        only_a=len(rows[0]) - len(common),
        only_b=len(rows[1]) - len(common),
    )


def check_comparable(settings: tuple[Mapping[str, Any], Mapping[str, Any]]) -> None:
    """Raise ``UserError`` for runs whose scores do not mean the same."""
    first, second = settings
    if first["task"] != second["task"]:
        raise UserError(
            f"the runs have different tasks, {first['task']} and {second['task']}; compare runs of "
            "the same data"
        )
    digests = [entry["data"].get("digest") for entry in settings]
    if digests[0] != digests[1]:
        raise UserError(
            "the runs read different data (their digests differ); evaluate both on the same file"
        )
    metrics = [entry["how"]["metric"] for entry in settings]
    if metrics[0] != metrics[1]:
        raise UserError(
            f"the runs have different metrics, {metrics[0]} and {metrics[1]}; evaluate both with "
            "the same preset or --metric"
        )


def bucket_differences(
    pairs: Sequence[tuple[Row, Row]],
) -> dict[str, dict[str, PairedDifference]]:
    """Compare by category, by tiles and by the length of the answer, where these vary."""
    kinds: dict[str, Callable[[Row], str]] = {
        "category": lambda row: str(row["category"] or "–"),
        "tiles": lambda row: bucket(int(row["tiles"]), TILE_BUCKETS, MANY_TILES),
        "answer length": lambda row: bucket(_words(row), LENGTH_BUCKETS, LONG_ANSWER),
    }
    found: dict[str, dict[str, PairedDifference]] = {}
    for kind, key in kinds.items():
        groups: dict[str, list[tuple[Row, Row]]] = defaultdict(list)
        for pair in pairs:
            groups[key(pair[0])].append(pair)
        if len(groups) > 1:
            found[kind] = {name: _difference(groups[name]) for name in _in_order(kind, groups)}
    return found


def bucket(value: int, limits: Sequence[tuple[int, str]], rest: str) -> str:
    """Return the name of the first bucket whose upper limit is not exceeded."""
    return next((name for limit, name in limits if value <= limit), rest)


def _in_order(kind: str, names: Mapping[str, object]) -> list[str]:
    order = {
        "tiles": [*(name for _, name in TILE_BUCKETS), MANY_TILES],
        "answer length": [*(name for _, name in LENGTH_BUCKETS), LONG_ANSWER],
    }
    return [name for name in order[kind] if name in names] if kind in order else sorted(names)


def _words(row: Row) -> int:
    return max((len(str(answer).split()) for answer in row["answers"]), default=1)


def _difference(pairs: Sequence[tuple[Row, Row]]) -> PairedDifference:
    return paired_difference(
        [float(a["score"]) for a, _ in pairs], [float(b["score"]) for _, b in pairs]
    )


def _mean(scores: Sequence[float]) -> float:
    if not scores:
        raise DataError("no scores to compare")
    return sum(scores) / len(scores)
