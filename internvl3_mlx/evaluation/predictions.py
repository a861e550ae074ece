"""The files of one evaluation: its settings, the predictions so far, judgments and results.

Predictions are appended a batch at a time. What an interrupted batch left is cut off when the run
is resumed, so a resumed file equals an uninterrupted one to the byte.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import CheckpointError, DataError, UserError, WriteError
from internvl3_mlx.json_files import read_json
from internvl3_mlx.records.json_values import write_json, write_json_lines

SETTINGS, PREDICTIONS, JUDGMENTS = "settings.json", "predictions.jsonl", "judgments.jsonl"
RESULTS, SCORES = "results.json", "scores.jsonl"
RUN_FILES = (SETTINGS, PREDICTIONS, JUDGMENTS, RESULTS, SCORES)
NEWLINE = b"\n"


@dataclass(frozen=True)
class DerivedSetting:
    """A setting that only follows from others. causes: how the names of those begin."""

    words: str
    causes: tuple[str, ...]


DERIVED = {
    "data digest": DerivedSetting("the data were changed", ("data ",)),
    "data fonts_digest": DerivedSetting("the fonts of this machine were changed", ("data ",)),
    "fingerprint": DerivedSetting("the weights were changed", ("model", "weights", "adapter")),
    "open_prompt": DerivedSetting("the prompt of open questions was changed", ("prompt",)),
    "changed": DerivedSetting("other flags were given", ("",)),
}


@dataclass(frozen=True)
class Prediction:
    """What the model wrote about one item. error: why it wrote nothing, if it could not."""

    id: str
    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tiles: Sequence[int] = field(default_factory=tuple)
    error: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the settings that differ, each with both values.

    A setting that follows from others is described in words, and only if none of those differs.
    """
    old, new = flatten_settings(before), flatten_settings(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    own = [name for name in names if name not in DERIVED]
    return [
        *(f"{name} was {show(old.get(name))} and is {show(new.get(name))}" for name in own),
        *(
            DERIVED[name].words
            for name in names
            if name in DERIVED and not any(one.startswith(DERIVED[name].causes) for one in own)
        ),
    ]


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings by name, those inside of another as ``data path``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            group = "" if name == "how" else f"{name} "
            flat.update({f"{group}{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else repr(value)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one evaluation."""

    path: Path

    def prepare(self, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Make the folder, or continue in one with equal settings.

        Raises ``UserError`` naming the settings that differ, and ``WriteError`` for a folder that
        holds other files.
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            self._check_ours()
            if overwrite:
                self.clear()
            else:
                self._check_settings(settings)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot make {self.path}: {error.strerror}") from error
        if not (self.path / SETTINGS).exists():
            self.write_json(SETTINGS, settings)

    def _check_ours(self) -> None:
        others = sorted(e.name for e in self.path.iterdir() if not _is_ours(e.name))
        if others:
            raise WriteError(
                f"{self.path} holds files that are not part of an evaluation: "
                f"{', '.join(others[:3])}; name another folder"
            )

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        if not (self.path / SETTINGS).exists():
            return
        if changed := describe_changes(self.settings(), settings):
            raise UserError(
                f"{self.path} holds an evaluation with other settings: {'; '.join(changed)}. "
                "Name another folder with -o, or pass --overwrite"
            )

    def clear(self) -> None:
        """Remove the files of a run and nothing else."""
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the run; raises ``DataError`` for a folder without one."""
        if not (self.path / SETTINGS).is_file():
            if not self.path.is_dir():
                raise DataError(f"no folder {self.path}; name one that internvl3 eval wrote")
            raise DataError(f"{self.path} holds no evaluation: there is no {SETTINGS}")
        return self._read_object(SETTINGS, ("task", "title", "how", "data"))

    def results(self) -> dict[str, Any]:
        """Return the results; raises ``DataError`` where the run has not ended."""
        if not (self.path / RESULTS).is_file():
            raise DataError(f"{self.path} has no {RESULTS}; run the evaluation to its end first")
        return self._read_object(RESULTS, ("title",))

    def _read_object(self, name: str, keys: Sequence[str]) -> dict[str, Any]:
        """Read a JSON file of the run; raises ``DataError`` for a damaged one."""
        again = "evaluate again with --overwrite"
        try:
            content = read_json(self.path / name)
        except CheckpointError as error:
            raise DataError(f"{self.path / name} is damaged; {again}") from error
        if missing := [key for key in keys if key not in content]:
            raise DataError(f"{self.path / name} has no {missing[0]!r}; {again}")
        return content

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_json(self.path / name, content)

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write JSON Lines, replacing the file at once."""
        write_json_lines(self.path / name, rows)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Read the complete lines of a file; raises ``DataError`` for a damaged one."""
        path = self.path / name
        if not path.is_file():
            return []
        complete = path.read_bytes().rpartition(NEWLINE)[0]
        try:
            return [json.loads(line) for line in complete.split(NEWLINE) if line.strip()]
        except ValueError as error:
            raise DataError(
                f"{path} is damaged ({error}); pass --overwrite to start again"
            ) from error

    def read_predictions(self) -> list[Prediction]:
        try:
            return [Prediction(**row) for row in self.read_lines(PREDICTIONS)]
        except TypeError as error:
            raise DataError(
                f"{self.path / PREDICTIONS} is damaged ({error}); pass --overwrite to start again"
            ) from error

    def truncate_predictions(self, count: int) -> None:
        """Keep the first ``count`` predictions and cut off what follows them."""
        path = self.path / PREDICTIONS
        if not path.exists():
            return
        lines = path.read_bytes().split(NEWLINE)[:count]
        size = sum(len(line) + 1 for line in lines)
        with path.open("r+b") as file:
            file.truncate(size)

    def append_predictions(self, predictions: Sequence[Prediction]) -> None:
        """Append a batch and wait until it is on the disk; raises ``WriteError``."""
        self._append(PREDICTIONS, [prediction.to_json() for prediction in predictions])

    def append_judgment(self, item_id: str, reply: str) -> None:
        row = json.dumps({"id": item_id, "reply": reply}, ensure_ascii=False)
        self._append(JUDGMENTS, [row])

    def read_judgments(self) -> dict[str, str]:
        """Return the judge's replies by item."""
        return {row["id"]: row["reply"] for row in self.read_lines(JUDGMENTS)}

    def _append(self, name: str, rows: Sequence[str]) -> None:
        path = self.path / name
        try:
            with path.open("ab") as file:
                file.write("".join(row + "\n" for row in rows).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"cannot write {path}: {error.strerror}") from error


def _is_ours(name: str) -> bool:
    return name in RUN_FILES or name.startswith(".")
