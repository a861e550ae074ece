"""Rollouts: sample responses to questions with known answers, and judge their steps by sampling on.

A step is as good as the share of continuations from it that end in the known answer (Monte Carlo),
which labels the steps of a critic's training data without a person. The prompt of a question is
read once for all its responses and continuations.

Sources: InternVL's reasoning data pipeline; VisualPRM (arXiv 2503.10291) section 3; MPO (arXiv
2411.10442).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.parallel_samples import stream_samples
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.prompt.answer_tokens import encode_answer
from internvl3_mlx.prompt.reasoning import boxed_question, cot_question
from internvl3_mlx.test_time_scaling.correctness import is_correct
from internvl3_mlx.test_time_scaling.rollout_questions import KnownQuestion
from internvl3_mlx.test_time_scaling.steps import MAX_STEPS, SEPARATOR, split_steps

PROMPTS = MappingProxyType(
    {"boxed": boxed_question, "cot": cot_question, "plain": lambda question: question}
)
# of the published critic data
ROLLOUT_DEFAULTS: Mapping[str, float | int] = MappingProxyType(
    {"temperature": 1.0, "top_k": 50, "max_tokens": 4096}
)
SEED_BITS = 31


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How much is sampled for a question.

    samples: responses. judged: of them, how many have their steps judged; 0 for none.
    continuations: sampled from each step. early_stop: after a step from which none is correct,
    later ones get 0 without sampling. prompt: ``boxed``, ``cot`` or ``plain``.
    """

    samples: int = 8
    judged: int = 4
    continuations: int = 16
    max_steps: int = MAX_STEPS
    early_stop: bool = True
    prompt: str = "boxed"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            raise UserError(f"prompt is {self.prompt!r}; choose from {', '.join(PROMPTS)}")
        if min(self.samples, self.continuations, self.max_steps) < 1 or self.judged < 0:
            raise UserError(
                "samples, continuations and max_steps are at least 1, judged at least 0"
            )

    def ask(self, question: str) -> str:
        """Return the question with the instruction of the prompt."""
        return PROMPTS[self.prompt](question)


@dataclass(frozen=True)
class JudgedStep:
    """A step, and how many of the continuations from it were correct.

    The last step is the whole response, so its only continuation is the response itself. total is
    0 where nothing was sampled, after a step without a correct continuation.
    """

    text: str
    correct: int
    total: int

    @property
    def score(self) -> float:
        return self.correct / self.total if self.total else 0.0


@dataclass(frozen=True)
class JudgedResponse:
    """A sampled response, whether it is correct, and its steps where they were judged."""

    text: str
    correct: bool
    steps: tuple[JudgedStep, ...] = ()


@dataclass(frozen=True)
class QuestionRollouts:
    """All that was sampled for one question. prompt: the question as the model was asked it."""

    question: KnownQuestion
    prompt: str
    responses: tuple[JudgedResponse, ...]

    @property
    def num_correct(self) -> int:
        return sum(response.correct for response in self.responses)


def roll_out(
    runner: ModelRunner,
    questions: Sequence[KnownQuestion],
    config: RolloutConfig,
    generation: GenerationConfig,
) -> Iterator[QuestionRollouts]:
    """Yield the rollouts of each question; each depends on its number and the seed alone."""
    for question in questions:
        yield roll_out_question(runner, question, config, generation)


def roll_out_question(
    runner: ModelRunner,
    question: KnownQuestion,
    config: RolloutConfig,
    generation: GenerationConfig,
) -> QuestionRollouts:
    prompt, cache = config.ask(question.question), PromptCache()
    inputs = runner.build_inputs(prompt, question.images, generation)
    sampler = Sampling(runner, inputs, generation, cache)
    texts = sampler.texts(config.samples, (config.seed, question.number))
    responses = [JudgedResponse(text, is_correct(text, question.answers)) for text in texts]
    for index in choose_judged(responses, config.judged):
        seed = (config.seed, question.number, index + 1)
        steps = judge_steps(sampler, responses[index], question.answers, config, seed)
        responses[index] = replace(responses[index], steps=steps)
    return QuestionRollouts(question, prompt, tuple(responses))


def choose_judged(responses: Sequence[JudgedResponse], count: int) -> list[int]:
    """Choose responses whose steps are judged: different ones, right and wrong in turn."""
    first = {response.text: index for index, response in reversed([*enumerate(responses)])}
    different = sorted(index for text, index in first.items() if text.strip())
    right = [index for index in different if responses[index].correct]
    wrong = [index for index in different if not responses[index].correct]
    paired = [index for pair in zip(right, wrong, strict=False) for index in pair]
    rest = [index for index in different if index not in paired]
    return [*paired, *rest][:count]


@dataclass(frozen=True)
class Sampling:
    """Samples from one prompt, or from a response that has begun, with what is cached of both."""

    runner: ModelRunner
    inputs: ModelInputs
    config: GenerationConfig
    cache: PromptCache

    def texts(self, count: int, seed: tuple[int, ...], begun: str = "") -> list[str]:
        """Sample texts; where a response has ``begun``, they are whole responses."""
        ids = encode_answer(self.runner.tokenizer, begun) if begun else []
        first = derived_seed(seed)
        limit = max(self.config.max_tokens - len(ids), 1)
        configs = [
            replace(self.config, seed=first + index, max_tokens=limit) for index in range(count)
        ]
        inputs = extended_inputs(self.inputs, ids)
        self.runner.check_context_length(inputs, configs[0])
        found: dict[int, Answer] = dict(stream_samples(self.runner, inputs, configs, self.cache))
        return [begun + found[index].text for index in range(count)]


def extended_inputs(inputs: ModelInputs, ids: Sequence[int]) -> ModelInputs:
    """Return a prompt whose answer has begun with some tokens."""
    if not ids:
        return inputs
    positions = inputs.next_position + np.arange(len(ids))
    return replace(
        inputs,
        token_ids=[*inputs.token_ids, *ids],
        positions=np.concatenate([inputs.positions, positions]).astype(np.float32),
    )


def derived_seed(key: tuple[int, ...]) -> int:
    """Derive a seed, so that a run that is continued samples what it would have sampled."""
    drawn = np.random.SeedSequence(key).generate_state(1, np.uint32)[0]
    return int(drawn) >> (32 - SEED_BITS)


def judge_steps(
    sampler: Sampling,
    response: JudgedResponse,
    answers: Sequence[str],
    config: RolloutConfig,
    seed: tuple[int, ...],
) -> tuple[JudgedStep, ...]:
    """Continue a response from each of its steps and count the correct ends."""
    steps = split_steps(response.text, config.max_steps)
    judged: list[JudgedStep] = []
    for count, step in enumerate(steps, start=1):
        if config.early_stop and judged and not judged[-1].correct:
            judged.append(JudgedStep(step, 0, 0))
        elif count == len(steps):
            judged.append(JudgedStep(step, int(response.correct), 1))
        else:
            begun = SEPARATOR.join(steps[:count]) + SEPARATOR
            ends = sampler.texts(config.continuations, (*seed, count), begun)
            correct = sum(is_correct(end, answers) for end in ends)
            judged.append(JudgedStep(step, correct, len(ends)))
    return tuple(judged)
