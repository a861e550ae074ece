"""The files of rollouts: a journal that can be continued, critic rows, and preference pairs."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from internvl3_mlx.errors import UserError, WriteError
from internvl3_mlx.metrics.answers import vote_key
from internvl3_mlx.records.json_values import write_json_lines
from internvl3_mlx.test_time_scaling.rollout_questions import KnownQuestion
from internvl3_mlx.test_time_scaling.rollouts import (
    JudgedResponse,
    JudgedStep,
    QuestionRollouts,
    RolloutConfig,
)

JOURNAL, CRITIC_ROWS, PAIRS = "rollouts.jsonl", "critic.jsonl", "pairs.jsonl"
VERSION = 1
MAX_PAIRS = 15  # of a question


@dataclass(frozen=True)
class RolloutSummary:
    """What a finished run wrote."""

    questions: int
    responses: int
    correct: int
    critic_rows: int
    mixed_rows: int
    pairs: int


class Journal:
    """Rows of finished questions, appended whole: a killed run continues after the last one."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """Open or begin the journal in ``folder``. settings: must be those it was begun with.

        Raises UserError for one of other settings, WriteError where it cannot be written.
        """
        self.path = folder / JOURNAL
        self.rows: dict[int, dict[str, Any]] = {}
        first = {"version": VERSION, "settings": dict(settings)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.whole_lines() if self.path.exists() else []
            if lines:
                check_settings(lines[0], first, folder)
                self.rows = {row["number"]: row for row in map(json.loads, lines[1:])}
            self.file = self.path.open("ab")
            if not lines:
                self.append(first)
        except OSError as error:
            raise WriteError(f"cannot write {self.path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is not a journal of rollouts; name another folder"
            ) from error

    def whole_lines(self) -> list[bytes]:
        """Return the complete lines, and cut off what a killed run left of the last one."""
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with self.path.open("r+b") as file:
                file.truncate(end)
        return data[:end].splitlines()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row and wait until it is on the disk."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        try:
            self.file.write(line)
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise WriteError(f"cannot write {self.path}: {error.strerror}") from error

    def add(self, rollouts: QuestionRollouts) -> None:
        row = rollouts_to_json(rollouts)
        self.append(row)
        self.rows[row["number"]] = row

    def rollouts(self, questions: Sequence[KnownQuestion]) -> Iterator[QuestionRollouts]:
        """Yield the finished questions, in order."""
        for question in questions:
            if question.number in self.rows:
                yield rollouts_from_json(self.rows[question.number], question)

    def close(self) -> None:
        self.file.close()


def check_settings(line: bytes, wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError where a journal was begun with other settings."""
    found = json.loads(line)
    if found["version"] != VERSION:
        raise UserError(f"{folder} holds rollouts of another version; name another folder")
    for name, value in wanted["settings"].items():
        if found["settings"].get(name) != value:
            raise UserError(
                f"{folder} holds rollouts with {name} {found['settings'].get(name)!r}, not "
                f"{value!r}; use the same settings to continue them, or name another folder"
            )


def run_settings(
    config: RolloutConfig, model: str, questions: Path, generation: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what must stay the same when rollouts are continued."""
    return {"model": model, "questions": questions.name, **asdict(config), **generation}


def rollouts_to_json(rollouts: QuestionRollouts) -> dict[str, Any]:
    question = rollouts.question
    return {
        "number": question.number,
        "question": question.question,
        "prompt": rollouts.prompt,
        "answers": [*question.answers],
        "responses": [asdict(response) for response in rollouts.responses],
    }


def rollouts_from_json(row: Mapping[str, Any], question: KnownQuestion) -> QuestionRollouts:
    """Restore a row; raises UserError where its question is another one now."""
    if row["question"] != question.question or row["answers"] != [*question.answers]:
        raise UserError(
            f"{question.location} has changed since its rollouts were made; name another folder"
        )
    responses = tuple(
        JudgedResponse(
            response["text"],
            response["correct"],
            tuple(JudgedStep(**step) for step in response["steps"]),
        )
        for response in row["responses"]
    )
    return QuestionRollouts(question, row["prompt"], responses)


def write_training_data(folder: Path, rollouts: Sequence[QuestionRollouts]) -> RolloutSummary:
    """Write critic rows and preference pairs of all finished questions."""
    rows = critic_rows(rollouts)
    pairs = [pair for one in rollouts for pair in preference_pairs(one)]
    write_json_lines(folder / CRITIC_ROWS, rows)
    write_json_lines(folder / PAIRS, pairs)
    return RolloutSummary(
        questions=len(rollouts),
        responses=sum(len(one.responses) for one in rollouts),
        correct=sum(one.num_correct for one in rollouts),
        critic_rows=len(rows),
        mixed_rows=sum(map(has_mixed_labels, rows)),
        pairs=len(pairs),
    )


def critic_rows(rollouts: Sequence[QuestionRollouts]) -> list[dict[str, Any]]:
    """Return the rows of a critic's training data, in the form of VisualPRM400K.

    Those with both labels come first, and of them those whose positive steps are the most certain:
    a tenth of the rows, chosen so, trains as good a critic (arXiv 2602.11111).
    """
    rows = [
        critic_row(one, response)
        for one in rollouts
        for response in one.responses
        if response.steps
    ]
    return sorted(rows, key=lambda row: (not has_mixed_labels(row), -positive_certainty(row)))


def critic_row(rollouts: QuestionRollouts, response: JudgedResponse) -> dict[str, Any]:
    steps = [
        {
            "step": step.text,
            "score": step.score,
            "num_mc_correct": step.correct,
            "num_mc_total": step.total,
        }
        for step in response.steps
    ]
    return {
        **image_values(rollouts.question),
        "question": rollouts.prompt,
        "question_orig": rollouts.question.question,
        "response": response.text,
        "answer_gt": rollouts.question.answers[0],
        "steps_with_score": steps,
        "num_mc_sequences": sum(step.total for step in response.steps),
    }


def has_mixed_labels(row: Mapping[str, Any]) -> bool:
    return len({step["score"] > 0 for step in row["steps_with_score"]}) > 1


def positive_certainty(row: Mapping[str, Any]) -> float:
    """Return the mean score of the positive steps, 0 without any."""
    scores = [step["score"] for step in row["steps_with_score"] if step["score"] > 0]
    return float(np.mean(scores)) if scores else 0.0


def preference_pairs(rollouts: QuestionRollouts) -> list[dict[str, Any]]:
    """Return pairs of a correct and a wrong response, in the form of MMPR.

    At most 15 of a question, all different. A pair is left out where the correct answer stands in
    what the wrong response answers: then it may not be wrong.
    """
    different = dict.fromkeys(one for one in rollouts.responses if one.text.strip())
    texts = {flag: [r.text for r in different if r.correct is flag] for flag in (True, False)}
    pairs = [
        (chosen, rejected)
        for chosen, rejected in product(dict.fromkeys(texts[True]), dict.fromkeys(texts[False]))
        if vote_key(chosen) not in vote_key(rejected)
    ]
    order = np.random.default_rng(rollouts.question.number).permutation(len(pairs))[:MAX_PAIRS]
    return [
        {
            **image_values(rollouts.question),
            "question": rollouts.prompt,
            "chosen": pairs[index][0],
            "rejected": pairs[index][1],
            "answer_gt": rollouts.question.answers[0],
        }
        for index in sorted(order)
    ]


def image_values(question: KnownQuestion) -> dict[str, Any]:
    """Return the images as a row names them: one path, a list, or nothing."""
    images = [*question.images]
    return {"image": images[0] if len(images) == 1 else images} if images else {}
