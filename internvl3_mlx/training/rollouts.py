"""Sampled answers for GRPO: groups of answers to a prompt, their rewards and advantages.

An update samples with the weights before it. With several iterations the same answers serve several
updates; ``TrainState.rollouts`` then holds them, so that a resumed run goes on with them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NoReturn

import mlx.core as mx
import numpy as np

from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.parallel_samples import generate_samples
from internvl3_mlx.generation.processor import ModelInputs, Processor
from internvl3_mlx.generation.runner import ModelRunner
from internvl3_mlx.generation.sampler import SEED_RANGE
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.batch import Batch, Prompt, Rollouts
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.collate import collate_answers
from internvl3_mlx.training.dataloader import DataLoader
from internvl3_mlx.training.objectives import target_log_probs
from internvl3_mlx.training.rewards import Reward, score_answer
from internvl3_mlx.training.trainable import set_train_mode
from internvl3_mlx.training.trainer import MicroBatch, TrainState

LEAST_DEVIATION = 1e-4  # added to a group's standard deviation, as in TRL


@dataclass(frozen=True, eq=False)
class Sampled:
    """The answers to the prompts of one micro-batch, group after group.

    answers: (A,) int32 each, with <|im_end|> unless it was cut off. rewards: (P, G) float32.
    old_log_probs: (N,) of the tokens that are trained on; None if one update alone uses them.
    """

    answers: tuple[np.ndarray, ...]
    rewards: np.ndarray
    old_log_probs: np.ndarray | None = None

    def to_arrays(self, number: int) -> dict[str, mx.array]:
        """Name the arrays that make it up, for a checkpoint."""
        assert self.old_log_probs is not None
        parts = {
            "ids": np.concatenate(self.answers),
            "lengths": np.array([len(answer) for answer in self.answers], np.int32),
            "rewards": self.rewards,
            "old": self.old_log_probs,
        }
        return {f"{number}.{name}": mx.array(part) for name, part in parts.items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, mx.array], number: int) -> "Sampled":
        """Undo ``to_arrays``."""
        ids, lengths, rewards, old = (
            np.array(arrays[f"{number}.{name}"]) for name in ("ids", "lengths", "rewards", "old")
        )
        return cls(tuple(np.split(ids, np.cumsum(lengths)[:-1])), rewards, old)


@dataclass(frozen=True, eq=False)
class RolloutSampler:
    """Samples and rewards answers of the model as it is."""

    model: InternVL
    name: str
    processor: Processor
    reward: Reward
    config: TrainConfig

    def sample(self, prompts: Sequence[Prompt], number: int) -> Sampled:
        """Sample a group for each prompt. number: of the micro-batch, which decides the draws."""
        size = self.config.num_generations
        groups: list[list[Answer]] = []
        for position, prompt in enumerate(prompts):
            key = (self.config.seed, number, position)
            seed = int(np.random.SeedSequence(key).generate_state(1)[0]) % (SEED_RANGE - size)
            groups.append(self.generate(prompt, size, temperature=1.0, seed=seed))
        return self.rewarded(prompts, groups)

    def answer_greedily(self, prompts: Sequence[Prompt]) -> Sampled:
        """Give the most likely answer to each prompt, as a group of one."""
        groups = [self.generate(prompt, 1, temperature=0.0, seed=0) for prompt in prompts]
        return self.rewarded(prompts, groups)

    def generate(self, prompt: Prompt, size: int, *, temperature: float, seed: int) -> list[Answer]:
        runner = ModelRunner(self.name, self.model, self.processor, no_draft)
        inputs = ModelInputs(prompt.input_ids.tolist(), prompt.images, prompt.positions)
        limit = min(self.config.max_completion_length, prompt.answer_limit)
        config = GenerationConfig(max_tokens=limit, temperature=temperature, seed=seed)
        self.model.eval()
        return generate_samples(runner, inputs, config, size)

    def rewarded(self, prompts: Sequence[Prompt], groups: list[list[Answer]]) -> Sampled:
        rewards = [
            [
                score_answer(self.reward, one.text.strip(), prompt.expected, prompt.location)
                for one in group
            ]
            for prompt, group in zip(prompts, groups, strict=True)
        ]
        answers = tuple(self.token_ids(one) for group in groups for one in group)
        return Sampled(answers, np.array(rewards, np.float32))

    def token_ids(self, answer: Answer) -> np.ndarray:
        """Return what the model said, with the <|im_end|> that ended it."""
        end = self.processor.tokenizer.im_end_id
        ended = answer.finish_reason == "stop" and answer.token_ids[-1:] != [end]
        return np.array([*answer.token_ids, *([end] if ended else [])], np.int32)


def no_draft(name: str) -> NoReturn:
    """Refuse a draft model: nothing names one here."""
    raise AssertionError(name)


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """Compare each reward with its group: (P, G) -> (P, G), 0 in groups without any difference."""
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    if rewards.shape[1] == 1:
        return np.zeros_like(rewards)
    deviation = rewards.std(axis=1, ddof=1, keepdims=True)
    found: np.ndarray = np.where(
        differs(rewards)[:, None], centered / (deviation + LEAST_DEVIATION), 0
    ).astype(np.float32)
    return found


def differs(rewards: np.ndarray) -> np.ndarray:
    """Whether the rewards of each group differ: (P, G) -> (P,) bool."""
    found: np.ndarray = rewards.max(axis=1) != rewards.min(axis=1)
    return found


def build_batch(batch: Batch, sampled: Sampled) -> Batch:
    """Build the batch to train on: the groups whose rewards differ.

    If none do, it is one answer of weight 0, so that every micro-batch has something to compute.
    """
    used = differs(sampled.rewards)
    groups = sampled.rewards.shape[1]
    kept = np.flatnonzero(used) if used.any() else np.array([0])
    per_group = groups if used.any() else 1
    prompts = [batch.prompts[int(index)] for index in kept]
    answers = [
        sampled.answers[int(index) * groups : int(index) * groups + per_group] for index in kept
    ]
    built = collate_answers(prompts, answers)
    advantages = group_advantages(sampled.rewards)[kept, :per_group].reshape(-1)
    rollouts = Rollouts(
        advantages=advantages,
        weights=np.full(len(advantages), float(used.any()), np.float32),
        rewards=sampled.rewards.reshape(-1),
        zero_variance=float(1 - used.mean()),
        mean_length=float(np.mean([len(answer) for answer in sampled.answers])),
        old_log_probs=sampled.old_log_probs,
    )
    return replace(built, rollouts=rollouts, left_out=batch.left_out)


def iter_rollouts(
    state: TrainState, loader: DataLoader, sampler: RolloutSampler
) -> Iterator[MicroBatch]:
    """Yield micro-batches without end, sampled by the weights before the first update of each.

    Every ``num_iterations`` updates read the same answers.
    """
    size, iterations = state.config.grad_accumulation_steps, state.config.num_iterations
    first, iteration = divmod(state.update, iterations)
    batches = loader.iter_train_batches(first * size)
    for block in count(first):
        held: list[tuple[Batch, Sampled]] = []
        for number in range(size):
            batch = next(batches)
            if iteration:
                held.append((batch, Sampled.from_arrays(state.rollouts, number)))
                continue
            sampled = sampler.sample(batch.prompts, block * size + number)
            if iterations > 1:
                sampled = with_log_probs(state.model, loader, batch, sampled)
                kept = {} if number == 0 else state.rollouts
                state.rollouts = kept | sampled.to_arrays(number)
                held.append((batch, sampled))
            yield trained_batch(state, loader, batch, sampled)
        for _ in range(max(iteration, 1), iterations):
            for batch, sampled in held:
                yield trained_batch(state, loader, batch, sampled)
        iteration = 0


def trained_batch(
    state: TrainState, loader: DataLoader, batch: Batch, sampled: Sampled
) -> MicroBatch:
    """Add features and reference to what was sampled, with the model back in training."""
    micro_batch = loader.build_micro_batch(build_batch(batch, sampled))
    set_train_mode(state.model)
    return micro_batch


def with_log_probs(model: InternVL, loader: DataLoader, batch: Batch, sampled: Sampled) -> Sampled:
    """Add the log-probabilities under the weights that sampled, without dropout."""
    built = build_batch(batch, sampled)
    features = loader.feature_cache.get(built.images) if loader.feature_cache else None
    model.eval()
    scores = mx.stop_gradient(target_log_probs(model, built, features))
    mx.eval(scores)
    return replace(sampled, old_log_probs=np.array(scores))


def greedy_batch(sampler: RolloutSampler, batch: Batch) -> MicroBatch:
    """Answer the prompts of a validation batch, for their rewards."""
    return MicroBatch(build_batch(batch, sampler.answer_greedily(batch.prompts)))
