"""Best-of-N: write candidates, score them, and return the best, as a stream of events."""

import gc
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import InputImage, ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.prompt.reasoning import cot_question
from internvl3_mlx.test_time_scaling.candidates import write_candidates
from internvl3_mlx.test_time_scaling.critic import CRITIC_MODES, SOFT, Critic, ResponseScore
from internvl3_mlx.test_time_scaling.steps import MAX_STEPS, SEPARATOR
from internvl3_mlx.test_time_scaling.vote import first_best, vote_shares

Method = Literal["critic", "vote", "log-prob"]
CRITIC, VOTE, LOG_PROB = "critic", "vote", "log-prob"
METHODS = (CRITIC, VOTE, LOG_PROB)


@dataclass(frozen=True, kw_only=True)
class BestOfConfig:
    """How many candidates, and how the best is chosen.

    method: ``critic``, ``vote`` (the majority of final answers) or ``log-prob`` (the mean
    log-probability of the tokens). critic_mode: ``soft``, ``hard`` or ``orm``. max_steps: of a
    response; more are joined.
    """

    n: int = 8
    method: str = VOTE
    critic_mode: str = SOFT
    max_steps: int = MAX_STEPS

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method is {self.method!r}; choose from {', '.join(METHODS)}")
        if self.critic_mode not in CRITIC_MODES:
            raise UserError(
                f"critic_mode is {self.critic_mode!r}; choose from {', '.join(CRITIC_MODES)}"
            )
        if self.n < 1 or self.max_steps < 1:
            raise UserError(f"n is {self.n} and max_steps {self.max_steps}; both are at least 1")


@dataclass(frozen=True)
class CandidateWritten:
    """Candidate ``index`` is finished; ``done`` of ``total`` are."""

    index: int
    answer: Answer
    done: int
    total: int


@dataclass(frozen=True)
class CandidateScored:
    """The critic has scored candidate ``index``; ``done`` of ``total`` different texts are."""

    index: int
    review: ResponseScore
    done: int
    total: int


@dataclass(frozen=True)
class Candidate:
    """One candidate with its score. ``review``: the critic's view, step by step."""

    answer: Answer
    score: float
    review: ResponseScore | None = None


@dataclass(frozen=True)
class BestOfResult:
    """The best of some candidates: the one at ``index``; candidate 0 is the greedy answer.

    critic: its name. mode: how it scored.
    """

    candidates: tuple[Candidate, ...]
    index: int
    method: str
    critic: str | None = None
    mode: str | None = None

    @property
    def answer(self) -> Answer:
        return self.candidates[self.index].answer

    @property
    def score(self) -> float:
        return self.candidates[self.index].score

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the best answer, how it was chosen, and all candidates."""
        how = {"n": len(self.candidates), "method": self.method, "index": self.index}
        chosen = {**how, "critic": self.critic, "critic_mode": self.mode}
        chosen |= {"score": json_score(self.score)}
        listed = [candidate_values(*entry) for entry in enumerate(self.candidates)]
        named = {key: value for key, value in chosen.items() if value is not None or key == "score"}
        return {**self.answer.to_dict(), "best_of": {**named, "candidates": listed}}


BestOfEvent = CandidateWritten | CandidateScored | BestOfResult


@dataclass(frozen=True)
class BestOfQuestion:
    """What is asked: the question as the user wrote it, its images and the generation options."""

    question: str
    images: Sequence[InputImage]
    config: GenerationConfig

    @property
    def prompt(self) -> str:
        """All that the policy is asked: a critic reads the instructions too."""
        return cot_question(self.question) if self.config.cot else self.question


def default_method(has_critic: bool) -> str:
    """Return how the best is chosen where nothing else is said."""
    return CRITIC if has_critic else VOTE


def best_of_events(
    asked: BestOfQuestion,
    config: BestOfConfig,
    policy: ModelRunner,
    critic: Critic | None = None,
    *,
    inputs: ModelInputs | None = None,
    cache: PromptCache | None = None,
) -> Iterator[BestOfEvent]:
    """Write candidates with ``policy``, score them, and end with a ``BestOfResult``.

    inputs: the policy's prompt, by default that of the question alone. cache: what it holds of the
    prompt is not read again.
    """
    check_method(asked, config, has_critic=critic is not None)
    used = PromptCache() if cache is None else cache
    if inputs is None:
        inputs = policy.build_inputs(asked.question, asked.images, asked.config, used.features)
    answers = yield from write_all(asked, config, policy, inputs, used)
    del used  # the critic may need the memory
    yield from choose(asked, config, answers, critic)


def best_of_in_turns(
    asked: BestOfQuestion,
    config: BestOfConfig,
    load_policy: Callable[[], ModelRunner],
    load_critic: Callable[[], Critic],
) -> Iterator[BestOfEvent]:
    """Do the same with one model in memory at a time: the policy is freed before the critic."""
    check_method(asked, config, has_critic=True)
    policy, cache = load_policy(), PromptCache()
    inputs = policy.build_inputs(asked.question, asked.images, asked.config, cache.features)
    answers = yield from write_all(asked, config, policy, inputs, cache)
    del policy, cache
    gc.collect()  # a model and its layers refer to each other
    mx.clear_cache()
    yield from choose(asked, config, answers, load_critic())


def check_method(asked: BestOfQuestion, config: BestOfConfig, *, has_critic: bool) -> None:
    """Raise UserError where the best cannot be chosen as configured."""
    if has_critic and (asked.config.video or asked.config.history):
        raise UserError(
            "a critic judges images alone, and one question; drop video and history, or choose by "
            "vote"
        )
    if (config.method == CRITIC) != has_critic:
        raise UserError(
            "method critic needs a critic; name one, or choose by vote or log-prob"
            if not has_critic
            else f"method {config.method} needs no critic; drop one of them"
        )


def write_all(
    asked: BestOfQuestion,
    config: BestOfConfig,
    policy: ModelRunner,
    inputs: ModelInputs,
    cache: PromptCache | None,
) -> Generator[BestOfEvent, None, list[Answer]]:
    """Write the candidates and return them in order."""
    log_probs = config.method == LOG_PROB
    found: dict[int, Answer] = {}
    stream = write_candidates(policy, inputs, asked.config, config.n, cache, log_probs=log_probs)
    for index, answer in stream:
        found[index] = answer
        yield CandidateWritten(index, answer, len(found), config.n)
    return [found[index] for index in range(config.n)]


def choose(
    asked: BestOfQuestion, config: BestOfConfig, answers: Sequence[Answer], critic: Critic | None
) -> Iterator[BestOfEvent]:
    """Score the candidates and yield the result. An empty one loses; the first of equals wins."""
    if critic is None:
        scores = vote_shares([answer.text for answer in answers])
        if config.method == LOG_PROB:
            scores = [log_prob_score(answer) for answer in answers]
        candidates = tuple(map(Candidate, answers, scores))
        yield BestOfResult(candidates, first_best(scores), config.method)
        return
    reviews = yield from review_all(asked, config, answers, critic)
    own_reviews = [reviews[response_text(answer)] for answer in answers]
    candidates = tuple(
        Candidate(answer, review.score, review)
        for answer, review in zip(answers, own_reviews, strict=True)
    )
    best = first_best([candidate.score for candidate in candidates])
    yield BestOfResult(candidates, best, CRITIC, critic.runner.name, config.critic_mode)


def review_all(
    asked: BestOfQuestion, config: BestOfConfig, answers: Sequence[Answer], critic: Critic
) -> Generator[BestOfEvent, None, Mapping[str, ResponseScore]]:
    """Let the critic score every different text once."""
    session = critic.open(asked.prompt, asked.images, asked.config)
    texts = [response_text(answer) for answer in answers]
    first = {text: texts.index(text) for text in texts}
    reviews: dict[str, ResponseScore] = {}
    for text, index in first.items():
        reviews[text] = session.score(text, config.critic_mode, max_steps=config.max_steps)
        yield CandidateScored(index, reviews[text], len(reviews), len(first))
    return reviews


def response_text(answer: Answer) -> str:
    """Return what a critic judges: the answer, after its thought if there is one."""
    if not answer.text.strip():
        return ""
    return SEPARATOR.join(filter(None, (answer.reasoning, answer.text)))


def log_prob_score(answer: Answer) -> float:
    if not answer.text.strip() or answer.mean_log_prob is None:
        return -math.inf
    return answer.mean_log_prob


def json_score(score: float) -> float | None:
    """Round a score for display; JSON has no infinity."""
    return round(score, 4) if math.isfinite(score) else None


def candidate_values(index: int, candidate: Candidate) -> dict[str, Any]:
    """Return plain values of one candidate."""
    answer, review = candidate.answer, candidate.review
    values: dict[str, Any] = {"index": index, "score": json_score(candidate.score)}
    values |= {"text": answer.text, "finish_reason": answer.finish_reason}
    values |= {"completion_tokens": answer.usage.completion_tokens}
    if answer.reasoning:
        values["reasoning"] = answer.reasoning
    if review is not None:
        values["steps"] = review_values(review)
    return values


def review_values(review: ResponseScore) -> list[dict[str, Any]]:
    """Return plain values of a critic's steps."""
    return [
        {"text": step.text, "score": json_score(step.score)}
        | ({} if step.reply is None else {"reply": step.reply})
        for step in review.steps
    ]
