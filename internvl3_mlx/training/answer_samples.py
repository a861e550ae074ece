"""Answers to validation data generated during a run: scored by a metric, shown in its report."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from internvl3_mlx.errors import InternVL3Error
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs, ProcessedImage
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.prompt.answer_tokens import encode_answer
from internvl3_mlx.records.json_values import write_json
from internvl3_mlx.training.batch import Prompt
from internvl3_mlx.training.data.collate import BatchedDataset
from internvl3_mlx.training.data.preprocess import PreferencePair, TrainingSample
from internvl3_mlx.training.data.preview import decode_with_specials
from internvl3_mlx.training.rewards import ANSWER_METRICS
from internvl3_mlx.training.rollouts import no_draft
from internvl3_mlx.training.session import TrainSession

SAMPLES_FILE = "samples.json"
MAX_TOKENS = 256
# a turn of a rendered prompt; the last one may be open
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|$)", re.DOTALL)
IMAGE_PLACE = re.compile(r"<img></img>\n?")
EXTRA_TOKENS = 32  # beyond four times the length of the expected answer


@dataclass(frozen=True)
class AnswerSample:
    """A validation record with the answers of the model.

    question: what was asked, without the system message and the marks of the chat template.
    answers, scores: by update.
    """

    location: str
    question: str
    expected: str
    answers: Mapping[str, str]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Question:
    """What the model reads before the last answer of a record, and what that answer should be."""

    location: str
    inputs: ModelInputs
    expected_ids: tuple[int, ...]


def build_question(dataset: BatchedDataset, number: int) -> Question:
    """Build the question of the ``number``-th usable record: everything before its last answer."""
    preprocessor = dataset.preprocessor
    record = dataset.dataset[int(dataset.sizes.indices[number])]
    sample = preprocessor.build(record)
    prompt: TrainingSample | Prompt
    if isinstance(sample, Prompt):
        tokenizer = preprocessor.tokenizer
        ids = [*encode_answer(tokenizer, sample.expected), tokenizer.im_end_id]
        prompt, start, expected = sample, len(sample.input_ids), np.array(ids, np.int32)
    elif not isinstance(sample, TrainingSample):
        prompt, start = sample.prompt, len(sample.prompt.input_ids)
        expected = sample.chosen if isinstance(sample, PreferencePair) else sample.answer
    else:
        prompt = sample
        targets = np.flatnonzero(sample.loss_mask)
        stop = int(targets[-1]) + 1
        start = stop - int(np.argmin(sample.loss_mask[:stop][::-1]))
        expected = prompt.input_ids[start:stop]
    inputs = ModelInputs(
        prompt.input_ids[:start].tolist(), tuple(prompt.images), prompt.positions[:start]
    )
    return Question(record.location, inputs, tuple(int(n) for n in expected))


def sample_answers(session: TrainSession) -> float | None:
    """Answer the first validation records, keep the answers, and return their mean score.

    None on ranks that do not write files, and without a metric.
    """
    config, dataset = session.config, session.setup.valid_dataset
    if config.eval_metric is None or dataset is None or not session.state.ranks.is_main:
        return None
    score, update = ANSWER_METRICS[config.eval_metric], str(session.state.update)
    session.state.model.eval()
    known = {sample.location: sample for sample in read_samples(session.folder)}
    samples = []
    for number in range(min(config.eval_samples, len(dataset.sizes))):
        question = build_question(dataset, number)
        new = new_sample(session, question)
        said = answer(session, question)
        before = known.get(question.location, new)
        samples.append(
            replace(
                new,
                answers={**before.answers, update: said},
                scores={**before.scores, update: score(said, new.expected)},
            )
        )
    write_samples(session.folder, samples)
    return fmean(sample.scores[update] for sample in samples)


def new_sample(session: TrainSession, question: Question) -> AnswerSample:
    """Describe a question in words, without any answers yet."""
    tokenizer = session.setup.preprocessor.tokenizer
    ids = np.array([n for n in question.inputs.token_ids if n != tokenizer.image_id])
    special = {token.id for token in tokenizer.added.values()}
    expected = tokenizer.decode([n for n in question.expected_ids if n not in special])
    return AnswerSample(
        question.location,
        readable_question(decode_with_specials(tokenizer, ids)),
        expected.strip(),
        {},
        {},
    )


def readable_question(prompt: str) -> str:
    """Return what a rendered prompt asks, as a person wrote it: of several turns, each by role."""
    turns = [(role, IMAGE_PLACE.sub("", text).strip()) for role, text in TURN.findall(prompt)]
    asked = [(role, text) for role, text in turns if text and role != "system"]
    if len(asked) > 1:
        return "\n".join(f"{role}: {text}" for role, text in asked)
    return asked[0][1] if asked else prompt


def answer(session: TrainSession, question: Question) -> str:
    """Answer a question greedily with the model as it is."""
    limit = min(4 * len(question.expected_ids) + EXTRA_TOKENS, MAX_TOKENS)
    runner = ModelRunner(
        session.setup.model_name,
        session.state.model,
        session.setup.preprocessor.processor,
        no_draft,
    )
    try:
        return runner.answer(question.inputs, GenerationConfig(max_tokens=limit)).text.strip()
    except InternVL3Error as error:  # such as NaN: the run goes on, the sample says why
        return f"[{error}]"


def shown_image(images: tuple[ProcessedImage, ...]) -> np.ndarray | None:
    """Return the thumbnail, or the only tile, of the first image: (S, S, 3) uint8."""
    return np.asarray(images[0].tiles[-1]) if images else None


def read_samples(folder: Path) -> list[AnswerSample]:
    """Read what earlier validations of a run have answered."""
    path = folder / SAMPLES_FILE
    try:
        content: Any = json.loads(path.read_text("utf-8"))
        return [AnswerSample(**entry) for entry in content]
    except (OSError, ValueError, TypeError):
        return []


def write_samples(folder: Path, samples: list[AnswerSample]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SAMPLES_FILE, [asdict(sample) for sample in samples])
