"""Score a response with a visual process reward model: any InternVL model that replies + or -.

Source: the remote code of VisualPRM (``InternVLRewardModel``) and its paper, arXiv 2503.10291.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import mlx.core as mx

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.context_budget import kv_nbytes_per_token
from internvl3_mlx.generation.engine import check_finite
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.prefill import open_prefill
from internvl3_mlx.generation.processor import (
    InputImage,
    ModelInputs,
    ProcessedImage,
    as_sequence,
)
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.gpu_errors import Task, explained_gpu_errors
from internvl3_mlx.memory import MemoryNeed, working_memory
from internvl3_mlx.prompt.answer_tokens import encode_answer
from internvl3_mlx.prompt.messages import Message
from internvl3_mlx.prompt.reasoning import CORRECT, INCORRECT, PRM_SYSTEM_PROMPT
from internvl3_mlx.test_time_scaling.critic_prompt import (
    CriticInputs,
    build_critic_inputs,
    critic_messages,
    place_images,
)
from internvl3_mlx.test_time_scaling.steps import MAX_STEPS, split_steps

CriticMode = Literal["soft", "hard", "orm"]
SOFT, HARD, ORM = "soft", "hard", "orm"
CRITIC_MODES = (SOFT, HARD, ORM)
HARD_SCORES = {CORRECT: 0.0}  # anything else counts as wrong
HARD_WRONG = -100.0
REPLY_TOKENS = 10  # of a generated reply
PRM_SYSTEM = "prm"  # names the system prompt of the published critic data


@dataclass(frozen=True)
class StepScore:
    """One step and its score: P(+), or in hard mode 0 or -100 with the critic's own ``reply``."""

    text: str
    score: float
    reply: str | None = None


@dataclass(frozen=True)
class ResponseScore:
    """A critic's view of one response. The score of an empty one is minus infinity."""

    score: float
    steps: tuple[StepScore, ...]
    mode: str


@dataclass(frozen=True, eq=False)
class Critic:
    """A model that judges. correct_id, incorrect_id: its tokens for + and -.

    system: its system prompt, None for its own: what its config says, else its template's.
    """

    runner: ModelRunner
    correct_id: int
    incorrect_id: int
    system: str | None = None

    def open(
        self,
        question: str,
        images: InputImage | Sequence[InputImage] = (),
        config: GenerationConfig | None = None,
    ) -> "CriticSession":
        """Prepare to judge responses to one question; its images are encoded once.

        question: all that the policy was asked, instructions included. config: how images are
        tiled and placed.
        """
        config = GenerationConfig() if config is None else config
        config = GenerationConfig(
            system=self.system,
            max_tokens=REPLY_TOKENS,
            max_tiles=config.max_tiles,
            min_tiles=config.min_tiles,
            thumbnail=config.thumbnail,
            upright=config.upright,
            v2pe_delta=config.v2pe_delta,
            ntk=config.ntk,
        )
        processor = self.runner.processor
        processed = tuple(processor.process_image(one, config) for one in as_sequence(images))
        return CriticSession(self, question, processed, config)

    @property
    def reply(self) -> Message:
        """The reply that the published code puts into the history of the soft modes."""
        return Message("assistant", CORRECT, token_ids=(self.correct_id,))


def open_critic(runner: ModelRunner, system: str | None = None) -> Critic:
    """Make a critic of a loaded model. system: ``prm`` for the prompt of the published data.

    Raises UserError where + or - is not a single token for its tokenizer.
    """
    ids = [reply_token(runner, reply) for reply in (CORRECT, INCORRECT)]
    text = PRM_SYSTEM_PROMPT if system == PRM_SYSTEM else system
    return Critic(runner, ids[0], ids[1], text)


def reply_token(runner: ModelRunner, reply: str) -> int:
    found = encode_answer(runner.tokenizer, reply)
    if len(found) != 1:
        raise UserError(
            f"{runner.name} cannot be a critic: its tokenizer writes {reply!r} as {len(found)} "
            "tokens, and a critic's reply is one; choose a model with InternVL's tokenizer"
        )
    return found[0]


@dataclass(eq=False)
class CriticSession:
    """Judges responses to one question; what they have in common is read once."""

    critic: Critic
    question: str
    images: tuple[ProcessedImage, ...]
    config: GenerationConfig
    prompt_cache: PromptCache = field(default_factory=PromptCache)

    def score(
        self, response: str, mode: str = SOFT, *, max_steps: int = MAX_STEPS
    ) -> ResponseScore:
        """Score a response.

        soft: the mean over the steps of P(+), all read in one forward pass. hard: the sum of the
        steps' scores, each reply generated and kept in the history. orm: P(+) of the whole response
        as one step. Raises PromptError for one that does not fit the critic's context.
        """
        if mode not in CRITIC_MODES:
            raise UserError(f"critic mode is {mode!r}; choose from {', '.join(CRITIC_MODES)}")
        if not response.strip():
            return ResponseScore(-math.inf, (), mode)
        steps = [response] if mode == ORM else split_steps(response, max_steps)
        if mode == HARD:
            scored = self.score_hard(steps)
            return ResponseScore(sum(step.score for step in scored), scored, mode)
        scored = self.score_soft(steps)
        return ResponseScore(mean_score(scored), scored, mode)

    def score_soft(self, steps: Sequence[str]) -> tuple[StepScore, ...]:
        """Score all steps in one forward pass; earlier replies are always +."""
        replies = [self.critic.reply] * (len(steps) - 1)
        scores = self.positive_shares(self.build_inputs(steps, replies))
        return tuple(map(StepScore, steps, scores))

    def score_step_by_step(self, steps: Sequence[str]) -> tuple[StepScore, ...]:
        """Score each step in a forward pass of its own, as the published ``soft`` does.

        The scores are those of ``score_soft``, up to rounding.
        """
        scored: list[StepScore] = []
        for count, step in enumerate(steps, start=1):
            built = self.build_inputs(steps[:count], [self.critic.reply] * (count - 1))
            last = CriticInputs(built.inputs, built.reply_positions[-1:])
            scored.append(StepScore(step, self.positive_shares(last)[0]))
        return tuple(scored)

    def score_hard(self, steps: Sequence[str]) -> tuple[StepScore, ...]:
        """Let the critic reply to each step; its own replies stay in the history."""
        question = place_images(self.question, len(self.images), always_prepend=True)
        replies: list[Message] = []
        scored: list[StepScore] = []
        processor = self.critic.runner.processor
        for count, step in enumerate(steps, start=1):
            messages = critic_messages(question, self.images, steps[:count], replies)
            inputs = processor.build(messages, self.images, self.config)
            self.critic.runner.check_context_length(inputs, self.config)
            answer = self.critic.runner.answer(inputs, self.config, self.prompt_cache)
            reply = answer.text.strip()
            replies.append(Message("assistant", reply))
            scored.append(StepScore(step, HARD_SCORES.get(reply, HARD_WRONG), reply))
        return tuple(scored)

    def build_inputs(self, steps: Sequence[str], replies: Sequence[Message]) -> CriticInputs:
        question = place_images(self.question, len(self.images))
        messages = critic_messages(question, self.images, steps, replies)
        processor = self.critic.runner.processor
        built = build_critic_inputs(processor, messages, self.images, self.config)
        self.critic.runner.check_context_length(built.inputs, self.config)
        return built

    def positive_shares(self, built: CriticInputs) -> list[float]:
        """Return P(+) against P(-) at each position that predicts a reply."""
        critic, runner = self.critic, self.critic.runner
        runner.check_process()
        arguments: dict[str, Any] = {
            "inputs": built.inputs, "positions": [*built.reply_positions], "config": self.config,
            "cache": self.prompt_cache, "replies": [critic.correct_id, critic.incorrect_id],
        }  # fmt: skip
        [shares] = runner.lead("score", arguments, reply_shares(runner, **arguments))
        return shares


def reply_shares(
    runner: ModelRunner,
    inputs: ModelInputs,
    positions: Sequence[int],
    config: GenerationConfig,
    cache: PromptCache,
    replies: Sequence[int],
) -> Iterator[list[float]]:
    """Yield once the share of the first of two replies at each position. replies: their ids."""
    cache_nbytes = len(inputs.token_ids) * kv_nbytes_per_token(runner.model, config)
    need = MemoryNeed(runner.weights_nbytes, cache_nbytes, owner=id(runner.model))
    with explained_gpu_errors(Task.ANSWER), working_memory(need):
        prefill = open_prefill(runner.model, inputs, config, cache)
        prefill.limit_reuse(positions[0])
        logits = prefill.run_rows(prefill.encode_images(), positions)
        check_finite(logits)
        prefill.commit([])
        pair = logits[:, mx.array([*replies])]
        yield cast(list[float], mx.softmax(pair.astype(mx.float32), axis=-1)[:, 0].tolist())


def mean_score(steps: Sequence[StepScore]) -> float:
    return sum(step.score for step in steps) / len(steps)
