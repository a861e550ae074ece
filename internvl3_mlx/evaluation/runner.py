"""Run an evaluation: ask, save each batch, judge, score. ``evaluate`` yields what happens."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from internvl3_mlx.errors import DataError, UserError
from internvl3_mlx.evaluation.eval_settings import EvalSettings
from internvl3_mlx.evaluation.items import EvalItem, SelectedItems
from internvl3_mlx.evaluation.judge import Judge, judge_prompt, read_judgment
from internvl3_mlx.evaluation.predictions import RESULTS, SCORES, Prediction, RunFolder
from internvl3_mlx.evaluation.prompts import build_request, make_request
from internvl3_mlx.evaluation.results import EvalResult, RunCosts, summarize
from internvl3_mlx.evaluation.scoring import ItemScore, parse_answer, score_answer, scored_item
from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.batch_generate import batch_generate
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import InputImage, ModelInputs
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.prefetch import map_ahead

# answers one prepared batch of questions; raises for the whole batch
AnswerBatch = Callable[[Sequence["Question"]], Sequence[Answer]]


@dataclass(frozen=True, eq=False)
class Question:
    """One item ready for the model."""

    item: EvalItem
    text: str
    images: Sequence[InputImage]
    inputs: ModelInputs
    config: GenerationConfig


@dataclass(frozen=True)
class EvalStarted:
    """items: how many are evaluated. resumed: of them, how many were answered before."""

    items: int
    resumed: int


@dataclass(frozen=True)
class EvalProgress:
    """stage: answering or judging."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class ItemFailed:
    """An item that could not be asked; it scores 0."""

    id: str
    error: str


@dataclass(frozen=True, eq=False)
class EvalEnd:
    """The evaluation is complete; its results are saved."""

    result: EvalResult


EvalEvent = EvalStarted | EvalProgress | ItemFailed | EvalEnd


@dataclass(eq=False)
class Evaluation:
    """One evaluation: a model, items, settings and the folder of its files."""

    runner: ModelRunner
    items: SelectedItems
    settings: EvalSettings
    folder: Path
    batch_size: int = 8
    judge: Judge | None = None
    answer_batch: AnswerBatch | None = None
    overwrite: bool = False
    costs: RunCosts = field(default_factory=RunCosts)

    def run(self) -> Iterator[EvalEvent]:
        """Answer what is not answered yet, then judge and score; the last event has the result."""
        if not len(self.items):
            raise DataError("no items to evaluate; raise --limit or check the data")
        run = RunFolder(self.folder)
        run.prepare(self.settings.to_dict(), overwrite=self.overwrite)
        yield from self.answer_all(run)
        predictions = self.checked_predictions(run)
        yield from self.judge_all(run, predictions)
        rows, result = self.score_all(run, predictions)
        run.write_lines(SCORES, rows)
        run.write_json(RESULTS, result.to_dict())
        yield EvalEnd(result)

    def answer_all(self, run: RunFolder) -> Iterator[EvalEvent]:
        """Answer the items that have no prediction yet, a batch at a time."""
        total = len(self.items)
        kept = len(run.read_predictions())
        if kept < total:
            kept -= kept % self.batch_size
        run.truncate_predictions(kept)
        yield EvalStarted(total, kept)
        started = time.perf_counter()
        waiting = (self.items[number] for number in range(kept, total))
        # the images of the next batch are read and tiled while this one is answered
        prepared, done = map_ahead(self.prepare, waiting, self.batch_size), kept
        while batch := list(islice(prepared, self.batch_size)):
            predictions = self.predict(batch)
            run.append_predictions(predictions)
            done += len(batch)
            self.costs.seconds = time.perf_counter() - started
            for prediction in predictions:
                if prediction.error is not None:
                    yield ItemFailed(prediction.id, prediction.error)
            yield EvalProgress("answering", done, total)

    def predict(self, batch: Sequence[Question | Prediction]) -> list[Prediction]:
        """Answer the questions of a batch; those that are predictions already stay as they are."""
        questions = [question for question in batch if isinstance(question, Question)]
        answers = iter(self.answer(questions)) if questions else iter(())
        return [
            self.record(entry, next(answers)) if isinstance(entry, Question) else entry
            for entry in batch
        ]

    def prepare(self, item: EvalItem) -> Question | Prediction:
        """Read an item on a thread. One that cannot be read, or does not fit, gets an error."""
        how = self.settings.how
        try:
            request = make_request(item, how)
            config = replace(self.settings.config, max_tiles=request.max_tiles)
            text, images = build_request(request, how, self.runner.processor, config)
            inputs = self.runner.build_inputs(text, images, config)
        except UserError as error:
            return Prediction(item.id, error=str(error))
        return Question(item, text, images, inputs, config)

    def answer(self, questions: Sequence[Question]) -> Sequence[Answer]:
        if self.answer_batch is not None:
            return self.answer_batch(questions)
        inputs = [question.inputs for question in questions]
        return list(batch_generate(self.runner, inputs, self.settings.config, self.batch_size))

    def record(self, question: Question, answer: Answer) -> Prediction:
        usage = answer.usage
        self.costs.add(usage.completion_tokens, answer.peak_memory_gb)
        return Prediction(
            id=question.item.id,
            text=answer.text,
            finish_reason=answer.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            tiles=question.inputs.num_tiles,
        )

    def checked_predictions(self, run: RunFolder) -> list[Prediction]:
        """Read the predictions again and compare them with the items; raises ``DataError``."""
        predictions = run.read_predictions()
        wanted = [entry.id for entry in self.items.entries]
        if [prediction.id for prediction in predictions] != wanted:
            raise DataError(
                f"the predictions in {self.folder} are about other items than the data; "
                "pass --overwrite to start again"
            )
        return predictions

    def judge_all(self, run: RunFolder, predictions: Sequence[Prediction]) -> Iterator[EvalEvent]:
        """Ask the judge about answers that the parser could not read, once each."""
        if self.judge is None:
            return
        how, replies = self.settings.how, run.read_judgments()
        unread = [
            number
            for number, prediction in enumerate(predictions)
            if prediction.error is None and prediction.text.strip()
            and prediction.id not in replies
            and parse_answer(self.items[number], how.parser, prediction.text) is None
        ]  # fmt: skip
        for done, number in enumerate(unread, start=1):
            item, prediction = self.items[number], predictions[number]
            reply = self.judge(judge_prompt(item, how.metric, prediction.text))
            run.append_judgment(item.id, reply)
            yield EvalProgress("judging", done, len(unread))

    def score_all(
        self, run: RunFolder, predictions: Sequence[Prediction]
    ) -> tuple[list[dict[str, Any]], EvalResult]:
        """Score all predictions: a row for each item, and the result."""
        how, replies = self.settings.how, run.read_judgments()
        rows: list[dict[str, Any]] = []
        scored = []
        for item, prediction in zip(self.items, predictions, strict=True):
            found, judged = self.score(item, prediction, replies.get(item.id))
            scored.append(scored_item(item, how.metric, found))
            rows.append(score_row(item, prediction, found, judged))
        return rows, summarize(self.settings, scored, rows, self.costs)

    def score(
        self, item: EvalItem, prediction: Prediction, reply: str | None
    ) -> tuple[ItemScore, bool]:
        """Score one prediction; tell whether a judge had to read it."""
        how = self.settings.how
        if prediction.error is not None:
            return ItemScore(0.0, None), False
        extracted = parse_answer(item, how.parser, prediction.text)
        judged = extracted is None and reply is not None and self.settings.judge is not None
        if judged:
            extracted = read_judgment(item, how.metric, str(reply))
        return score_answer(item, how.metric, extracted), judged


def score_row(
    item: EvalItem, prediction: Prediction, found: ItemScore, judged: bool
) -> dict[str, Any]:
    """Return what ``scores.jsonl`` says about one item."""
    return {
        "id": item.id,
        "question": item.question,
        "options": dict(item.options),
        "answers": [*item.answers],
        "category": item.category,
        "prediction": prediction.text,
        "extracted": found.extracted,
        "judged": judged,
        "score": found.score,
        "tiles": sum(prediction.tiles),
        "completion_tokens": prediction.completion_tokens,
        "finish_reason": prediction.finish_reason,
        "error": prediction.error,
    }
