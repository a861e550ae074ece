"""Speculative decoding: draft several tokens cheaply, verify them at once, accept the right ones.

A round is one evaluation: the drafted tokens stay on the device, the model that verifies reads them
there, and what is accepted is computed there too. Where nothing is drafted, the loop is the plain
one, a token ahead of the caller.

Tokens that are drafted without probabilities (prompt lookup; any draft of a greedy answer) are
accepted where the answer's own sampler draws them, so the answer is the same to the token as
without drafts, at any temperature. A draft model that samples gives probabilities: then a token is
accepted with the chance that keeps the distribution (Leviathan et al., arXiv 2211.17192), which is
higher; the tokens are not those that the seed gives without drafts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import mlx.core as mx

from internvl3_mlx.distributed.agreement import from_rank_0
from internvl3_mlx.distributed.shard import Shard
from internvl3_mlx.generation.compiled_step import mark_not_finite
from internvl3_mlx.generation.draft_length import VERIFY_COST, DraftLength
from internvl3_mlx.generation.engine import Engine, check_token
from internvl3_mlx.generation.sampler import (
    REPETITION_WINDOW,
    Sampler,
    SamplerState,
    draw_tokens,
    split_keys,
    uniform,
)


@dataclass(frozen=True, eq=False)
class Draft:
    """Drafted tokens, (K,) int32, perhaps still to be computed.

    scores: what they were drawn by, (K, V), whose softmax is their distribution; None where each is
    the only one that the drafter considers.
    """

    tokens: mx.array
    scores: mx.array | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


class Drafter(Protocol):
    """Proposes how a sequence continues.

    cost: of a drafted token, in steps of the model that verifies it.
    """

    @property
    def cost(self) -> float: ...

    def can_propose(self, ids: Sequence[int]) -> bool:
        """Return, at once, whether there may be a draft for what follows ``ids``."""
        ...

    def propose(self, ids: Sequence[int], count: int) -> Draft | None:
        """Draft up to ``count`` tokens that follow ``ids``."""
        ...

    def accept(self, count: int) -> None:
        """Take in how many tokens of the last draft were accepted."""
        ...

    def close(self, ids: Sequence[int]) -> None:
        """End drafting; ``ids`` are the prompt and all accepted tokens."""
        ...


@dataclass
class AcceptanceStats:
    """Counts drafted tokens and how many of them were accepted."""

    drafted: int = 0
    accepted: int = 0


@dataclass
class SpeculativeDecoder:
    """Decodes with a drafter that proposes up to ``num_draft_tokens`` at a time."""

    drafter: Drafter
    num_draft_tokens: int
    stats: AcceptanceStats
    length: DraftLength = field(init=False)

    def __post_init__(self) -> None:
        self.length = DraftLength(self.num_draft_tokens, self.drafter.cost + VERIFY_COST)

    def decode(self, engine: Engine, ids: list[int], logits: mx.array, limit: int) -> Iterator[int]:
        """Yield up to ``limit`` tokens. ids: the prompt, all of which the engine has read."""
        known, end = list(ids), len(ids) + limit
        pending = engine.sample(logits)
        mx.async_eval(pending)
        try:
            while True:
                left = end - len(known) - 1  # tokens after the pending one
                count = min(self.draft_count(engine, known), left - 1)
                following = None
                if left and count < 1:
                    following = self.plain_step(engine, pending)
                known.append(check_token(int(pending.item())))  # type: ignore[arg-type]
                yield known[-1]
                if not left:
                    return
                draft = self.drafter.propose(known, count) if following is None else None
                if draft is not None:
                    accepted, pending = self.verify(engine, pending, draft)
                    for token in accepted:
                        known.append(token)
                        yield token
                elif following is None:
                    pending = self.plain_step(engine, pending)
                else:
                    pending = following
        finally:
            self.drafter.close(known)

    def draft_count(self, engine: Engine, known: Sequence[int]) -> int:
        """Return how many tokens to draft after the one that follows ``known``; often 0."""
        count = self.length.count
        if not count or engine.uses_dynamic_ntk(self.num_draft_tokens + 1):
            return 0
        return count if self.drafter.can_propose(known) else 0

    def plain_step(self, engine: Engine, pending: mx.array) -> mx.array:
        """Read the pending token and begin to compute the one after it, (1,)."""
        following = engine.next_token(pending)
        mx.async_eval(following)
        self.length.wait()
        return following

    def verify(self, engine: Engine, pending: mx.array, draft: Draft) -> tuple[list[int], mx.array]:
        """Read the pending token and the draft; return what is accepted, and the next token (1,).

        The only evaluation of a round.
        """
        logits = engine.read_tokens(mx.concatenate([pending, draft.tokens])[None])[0]
        states = states_along(engine.sampler_state, draft.tokens)
        judge = match_tokens if draft.scores is None else accept_by_chance
        verdict = judge(engine.sampler, logits, states, draft).agreed(engine.model.shard)
        mx.eval(verdict.count, verdict.following, draft.tokens)
        count = int(verdict.count.item())  # type: ignore[arg-type]
        engine.sampler_state = verdict.state
        engine.rewind(len(draft) - count)
        self.drafter.accept(count)
        self.length.record(len(draft), count)
        self.stats.drafted += len(draft)
        self.stats.accepted += count
        return cast(list[int], draft.tokens.tolist())[:count], verdict.following


@dataclass(frozen=True, eq=False)
class Verdict:
    """How many tokens of a draft are accepted, (), the token that follows them, (1,), the state."""

    count: mx.array
    following: mx.array
    state: SamplerState

    def agreed(self, shard: Shard) -> "Verdict":
        """Return rank 0's verdict on all ranks that hold the model."""
        if shard.size == 1:
            return self
        both = mx.concatenate([self.count[None].astype(mx.int32), self.following])
        count, following = mx.split(from_rank_0(shard, both), [1])
        return Verdict(count[0], following, self.state)


def states_along(state: SamplerState, tokens: mx.array) -> SamplerState:
    """Return the sampler's states before a draft's first token, its second ... and after its last.

    state: of one row, before. tokens: (K,) -> a state of K + 1 rows.
    """
    count, keys = tokens.shape[0] + 1, [state.keys]
    for _ in range(count - 1):
        keys.append(split_keys(keys[-1])[0])
    history = mx.broadcast_to(state.history, (count, state.history.shape[1]))
    if state.history.shape[1]:
        together = mx.concatenate([state.history[0], tokens])
        history = together[mx.arange(count)[:, None] + mx.arange(REPETITION_WINDOW)]
    return SamplerState(mx.concatenate(keys), history, mx.zeros((count, 0)))


def match_tokens(sampler: Sampler, logits: mx.array, states: SamplerState, draft: Draft) -> Verdict:
    """Accept the tokens that the sampler draws itself: logits (K + 1, V)."""
    drawn, after = sampler(logits, states)
    drawn = mark_not_finite(drawn, logits)
    count = leading_count(drawn[:-1] == draft.tokens)
    row = count[None]
    return Verdict(count, drawn[row], after.select(row))


def accept_by_chance(
    sampler: Sampler, logits: mx.array, states: SamplerState, draft: Draft
) -> Verdict:
    """Accept drawn tokens so that the answer follows the sampler's distribution, logits (K + 1, V).

    A token is accepted with the chance p / q: its probability in the answer, by that in the draft.
    After the first that is not, the next token is drawn from max(0, p - q).
    """
    assert draft.scores is not None
    scores = sampler.scores(sampler.change_logits(logits, states.history, states.counts))
    p = mx.softmax(scores, axis=-1)
    missing = p.shape[1] - draft.scores.shape[1]
    q = mx.pad(mx.softmax(draft.scores, axis=-1), [(0, 1), (0, missing)])
    keys, own = split_keys(states.keys)
    accept_keys, draw_keys = split_keys(own)
    tokens = draft.tokens[:, None]
    chosen_p, chosen_q = (mx.take_along_axis(x[:-1], tokens, axis=-1) for x in (p, q))
    count = leading_count((uniform(accept_keys[:-1]) * chosen_q < chosen_p)[:, 0])
    row = count[None]
    rest = mx.maximum(p[row] - q[row], 0.0)
    rest = mx.where(mx.any(rest > 0), rest, p[row])  # equal but for rounding
    following = mark_not_finite(draw_tokens(mx.log(rest), draw_keys[row]), logits[row])
    history = states.history[row]
    if history.shape[1]:
        history = mx.concatenate([history[:, 1:], following[:, None]], axis=1)
    return Verdict(count, following, SamplerState(keys[row], history, states.counts[row]))


def leading_count(right: mx.array) -> mx.array:
    """Count the leading trues: (K,) -> ()."""
    return mx.cumprod(right.astype(mx.int32)).sum()
