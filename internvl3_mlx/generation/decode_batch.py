"""The answers of one model that are decoded together: a step reads one token of each.

The next step is begun before the tokens of the last one are looked at, so that the device never
waits for the host. A constraint sees a token while the model reads it, before the next is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, cast

import mlx.core as mx

from internvl3_mlx.distributed.agreement import from_rank_0
from internvl3_mlx.distributed.shard import Shard
from internvl3_mlx.generation.answer import FinishReason
from internvl3_mlx.generation.compiled_step import NOT_FINITE, StepRunner
from internvl3_mlx.generation.row_sampler import (
    RowSampler,
    SampledRows,
    TokenScores,
    sample_rows,
    score_token,
)
from internvl3_mlx.models.cache import LayerCache
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.ragged_cache import RaggedBatch
from internvl3_mlx.models.static_batch import StaticBatch


class BatchedAnswer(Protocol):
    """An answer as the batch knows it; a server's and a command's are made of it.

    row: its number in the batch. position: of the next token. ntk: whether dynamic NTK may apply
    to it. tokens_left: how many tokens may still follow. finish_reason: None while it goes on.
    """

    row: int
    sampler: RowSampler
    position: float
    ntk: bool
    tokens_left: int
    finish_reason: FinishReason | None

    def accept(self, token: int, scores: TokenScores | None) -> None:
        """Append a token. An error that is raised ends this answer alone."""
        ...


AnswerT = TypeVar("AnswerT", bound=BatchedAnswer)


@dataclass(frozen=True, eq=False)
class Ended(Generic[AnswerT]):
    """An answer that is complete, or that failed, with the caches of what was read for it."""

    answer: AnswerT
    layers: list[LayerCache]
    error: Exception | None = None


@dataclass(eq=False)
class Chosen:
    """Tokens that were chosen and not given yet, (B,) int32, of ``rows``. scores: of some rows.

    failures: what choosing a token of a row raised.
    """

    rows: list[int]
    tokens: mx.array
    scores: dict[int, TokenScores]
    failures: dict[int, Exception] = field(default_factory=dict[int, Exception])

    @property
    def arrays(self) -> list[mx.array]:
        return [self.tokens, *(a for one in self.scores.values() for a in one.arrays)]

    def joined(self, other: "Chosen") -> "Chosen":
        return Chosen(
            [*self.rows, *other.rows],
            mx.concatenate([self.tokens, other.tokens]),
            self.scores | other.scores,
            self.failures | other.failures,
        )

    def ordered(self, rows: list[int]) -> mx.array:
        """Return the tokens of ``rows`` in that order."""
        if rows == self.rows:
            return self.tokens
        return self.tokens[mx.array([self.rows.index(row) for row in rows], dtype=mx.int32)]


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a step returns for ``rows``: logits (B, vocab), or where it drew, tokens (B,) int32."""

    rows: list[int]
    array: mx.array
    is_drawn: bool = False


@dataclass(eq=False)
class DecodeBatch(Generic[AnswerT]):
    """The answers in progress by their row, and the tokens that come next."""

    model: InternVL
    batch: RaggedBatch
    answers: dict[int, AnswerT] = field(default_factory=dict[int, AnswerT])
    chosen: Chosen | None = None
    steps: int = 0
    runner: StepRunner = field(init=False, repr=False)

    @classmethod
    def for_model(cls, model: InternVL) -> "DecodeBatch[AnswerT]":
        return cls(model, RaggedBatch(len(model.language_model.model.layers)))

    def join(
        self, answers: Sequence[AnswerT], layers: Sequence[LayerCache], logits: mx.array
    ) -> None:
        """Take in answers to a prompt that has been read. logits: (1, vocab) of their first token.

        layers: the caches of the prompt, which all of the answers share.
        """
        self.runner = StepRunner(self.model)  # the model may have another adapter by now
        rows = self.batch.insert(layers, len(answers))
        for row, answer in zip(rows, answers, strict=True):
            answer.row = row
            self.answers[row] = answer
        logits = mx.repeat(logits, len(rows), axis=0)
        new = choose_tokens(rows, answers, logits, self.model.shard)
        self.chosen = new if self.chosen is None else self.chosen.joined(new)

    def remove(self, answer: AnswerT) -> list[LayerCache]:
        """Drop an answer, and return the caches of what was read for it."""
        layers = self.batch.extract(answer.row)
        self.batch.remove(answer.row)
        del self.answers[answer.row]
        if not self.answers:
            self.chosen = None
        return layers

    def reset(self) -> list[AnswerT]:
        """Drop all arrays, computed or not; return the answers that were in progress."""
        answers = [*self.answers.values()]
        self.batch, self.answers = RaggedBatch(self.batch.num_layers), {}
        self.chosen = None
        return answers

    def step(self) -> list[Ended[AnswerT]]:
        """Give one token of each answer and begin the next; return those that ended.

        Raises what the forward pass raises; then no token was given.
        """
        chosen = self.chosen
        assert chosen is not None
        if all(answer.tokens_left <= 1 for answer in self.answers.values()):
            return self.give(chosen)
        waits = any(answer.sampler.waits for answer in self.answers.values())
        result = self.advance(chosen)
        if not waits:
            self.choose(result)
            return self.give(chosen)
        mx.async_eval(result.array, chosen.arrays)
        ended = self.give(chosen)  # and the constraints are asked while the device reads
        self.choose(result)
        return ended

    def advance(self, chosen: Chosen) -> StepResult:
        """Read the chosen tokens; nothing is computed yet."""
        rows = self.batch.rows
        answers = [self.answers[row] for row in rows]
        positions = [answer.position for answer in answers]
        lengths = [self.batch.length(row) + 1 if self.answers[row].ntk else None for row in rows]
        tokens = chosen.ordered(rows)[:, None]
        result = self.compiled_step(tokens, positions, lengths)
        if result is None:
            result = StepResult(rows, self.plain_step(tokens, positions, lengths))
        for answer in answers:
            answer.position += 1
        self.steps += 1
        return result

    def plain_step(
        self, tokens: mx.array, positions: Sequence[float], lengths: Sequence[int | None]
    ) -> mx.array:
        """Read a token of each row, (B, 1) -> logits (B, vocab)."""
        language = self.model.language_model
        self.batch.begin_step()
        rotary = language.ragged_rotary(positions, lengths)
        states = language.model(self.model.embed(tokens), rotary, self.batch.layers)
        self.batch.end_step()
        return language.head(states[:, -1])

    def compiled_step(
        self, tokens: mx.array, positions: Sequence[float], lengths: Sequence[int | None]
    ) -> StepResult | None:
        """Do the same by a compiled step; None where a plain step has to, as in ``Engine``.

        The next tokens are drawn inside of it, unless an answer needs its logits.
        """
        stretched = self.model.config.text.any_stretched(lengths)
        if stretched or not self.runner.is_due(len(positions)):
            return None
        rows, caches = self.batch.rows, StaticBatch.prepare(self.batch)
        samplers = [self.answers[row].sampler for row in rows]
        drawn = None if any(s.needs_logits for s in samplers) else SampledRows.of(samplers)
        sampler = None if drawn is None else drawn.sampler
        if caches is None or not self.runner.is_steady(caches.layout, sampler):
            return None
        state = None if drawn is None else drawn.state
        first = [int(at) for at in positions]
        found, after = self.runner.run(caches, tokens, first, sampler, state)
        if drawn is None:
            return StepResult(rows, found[:, -1])
        drawn.state = after or drawn.state
        return StepResult(rows, found, is_drawn=True)

    def choose(self, result: StepResult) -> None:
        """Choose the next tokens of the answers that go on; nothing waits for the result."""
        rows, logits = result.rows, result.array
        if result.is_drawn:
            self.chosen = Chosen(rows, logits, {})
            mx.async_eval(logits)
            return
        places = [place for place, row in enumerate(rows) if row in self.answers]
        if not places:
            return
        if len(places) < len(rows):
            rows, logits = [rows[place] for place in places], logits[mx.array(places)]
        answers = [self.answers[row] for row in rows]
        self.chosen = choose_tokens(rows, answers, logits, self.model.shard)
        mx.async_eval(self.chosen.arrays)

    def give(self, chosen: Chosen) -> list[Ended[AnswerT]]:
        """Hand the chosen tokens to their answers; remove and return those that ended."""
        mx.eval(chosen.arrays)
        tokens = dict(zip(chosen.rows, cast(list[int], chosen.tokens.tolist()), strict=True))
        ended = list[Ended[AnswerT]]()
        for row, answer in [*self.answers.items()]:
            error = chosen.failures.get(row)
            error = error or attempt(answer, tokens[row], chosen.scores.get(row))
            if error is not None or answer.finish_reason is not None:
                ended.append(Ended(answer, self.remove(answer), error))
        return ended


def attempt(answer: BatchedAnswer, token: int, scores: TokenScores | None) -> Exception | None:
    """Append a token to an answer; return what that raised, which concerns this answer alone."""
    try:
        answer.accept(token, scores)
    except Exception as error:  # noqa: BLE001
        return error
    return None


def choose_tokens(
    rows: list[int], answers: Sequence[BatchedAnswer], logits: mx.array, shard: Shard
) -> Chosen:
    """Choose the next token of each answer: logits (B, vocab). A failure concerns its row alone."""
    finite = mx.all(mx.isfinite(logits), axis=-1)
    samplers = [answer.sampler for answer in answers]
    masked, failures = mask_rows(rows, samplers, logits)
    tokens = sample_rows(samplers, masked)
    scores: dict[int, TokenScores] = {}
    for place, (row, sampler) in enumerate(zip(rows, samplers, strict=True)):
        if sampler.num_top is not None and row not in failures:
            own = slice(place, place + 1)
            scores[row] = score_token(logits[own], tokens[own], sampler.num_top)
    signed = mx.where(finite, tokens.astype(mx.int32), mx.array(NOT_FINITE, mx.int32))
    return Chosen(rows, from_rank_0(shard, signed), scores, failures)


def mask_rows(
    rows: list[int], samplers: Sequence[RowSampler], logits: mx.array
) -> tuple[mx.array, dict[int, Exception]]:
    """Apply the constraints: (B, vocab) -> (B, vocab), and what a constraint raised, by row."""
    failures: dict[int, Exception] = {}
    if not any(sampler.waits for sampler in samplers):
        return logits, failures
    parts = list(mx.split(logits, len(rows)))
    for place, (row, sampler) in enumerate(zip(rows, samplers, strict=True)):
        try:
            parts[place] = sampler.mask(parts[place])
        except Exception as error:  # noqa: BLE001
            failures[row] = error
    return mx.concatenate(parts), failures
