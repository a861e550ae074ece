"""What is learned from a micro-batch: SFT and pre-training, or mixed preference optimisation.

A method gives a numerator, whose gradient is taken, and a denominator: the trainer sums both over
micro-batches and ranks and divides once, so that a token weighs the same however a batch is cut.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import mlx.core as mx
import numpy as np

from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.packed_sequences import Span
from internvl3_mlx.training.batch import Batch
from internvl3_mlx.training.forward import ForwardOptions, target_states
from internvl3_mlx.training.losses import MPOTerms, PreferenceConfig, preference_terms
from internvl3_mlx.training.token_log_probs import CHUNK, token_log_probs


@dataclass(frozen=True)
class LossOutput:
    """What one micro-batch gives: scalars, and ``figures`` to be averaged for the log."""

    numerator: mx.array
    denominator: mx.array
    metrics: dict[str, mx.array]


@dataclass(frozen=True)
class ObjectiveState:
    """What a method remembers between micro-batches; it belongs in every checkpoint. Scalars.

    shift: the running mean of MPO's rewards. count: of how many micro-batches.
    """

    shift: mx.array = field(default_factory=lambda: mx.array(0.0))
    count: mx.array = field(default_factory=lambda: mx.array(0.0))


class Objective(Protocol):
    """Something that can be learned from a batch."""

    @property
    def name(self) -> str: ...

    @property
    def needs_reference(self) -> bool: ...

    def __call__(
        self,
        model: InternVL,
        batch: Batch,
        vision: mx.array | None,
        reference: mx.array | None,
        state: ObjectiveState,
    ) -> tuple[LossOutput, ObjectiveState]: ...


@dataclass(frozen=True)
class SFT:
    """Cross-entropy weighted by ``batch.weights``: sum(CE * w) over sum(w)."""

    name: str = "sft"
    forward: ForwardOptions = ForwardOptions()
    chunk: int = CHUNK
    needs_reference: bool = False

    def __call__(
        self,
        model: InternVL,
        batch: Batch,
        vision: mx.array | None,
        reference: mx.array | None,
        state: ObjectiveState,
    ) -> tuple[LossOutput, ObjectiveState]:
        found = target_log_probs(model, batch, vision, self.forward, self.chunk)
        weights = mx.array(batch.loss_weights)
        return LossOutput(-(found * weights).sum(), weights.sum(), {}), state


@dataclass(frozen=True)
class MPO:
    """MPO: weighted DPO, BCO and SFT terms; a weight of 0 leaves a term out.

    The defaults are the published ones. Both answers of a pair stand behind one prompt, which is
    read once.
    """

    name: str = "mpo"
    dpo_weight: float = 0.8
    bco_weight: float = 0.2
    sft_weight: float = 1.0
    preference: PreferenceConfig = PreferenceConfig()
    forward: ForwardOptions = ForwardOptions()
    chunk: int = CHUNK

    @property
    def needs_reference(self) -> bool:
        return bool(self.dpo_weight or self.bco_weight)

    def __call__(
        self,
        model: InternVL,
        batch: Batch,
        vision: mx.array | None,
        reference: mx.array | None,
        state: ObjectiveState,
    ) -> tuple[LossOutput, ObjectiveState]:
        if not self.needs_reference:
            loss = chosen_loss(
                chosen := chosen_only(batch), self.policy_log_probs(model, chosen, vision)
            )
            return LossOutput(self.sft_weight * loss, mx.array(1.0), {"sft": loss}), state
        if reference is None:
            raise UserError("dpo and bco compare with a reference, and none was given")
        policy = self.policy_log_probs(model, batch, vision)
        sums = sum_by_answer(batch, policy - mx.stop_gradient(reference))
        sft = chosen_loss(batch, policy)
        how = replace(
            self.preference, running_shift=self.preference.running_shift and model.training
        )
        terms = preference_terms(sums[0::2], sums[1::2], sft, how, state.shift, state.count)
        micro = LossOutput(self.weighted_sum(terms), mx.array(1.0), mpo_metrics(terms))
        return micro, ObjectiveState(terms.shift, terms.count)

    def policy_log_probs(self, model: InternVL, batch: Batch, vision: mx.array | None) -> mx.array:
        return target_log_probs(model, batch, vision, self.forward, self.chunk)

    def weighted_sum(self, terms: MPOTerms) -> mx.array:
        """Add the terms up; one that weighs nothing is never computed."""
        weighed = (
            (self.dpo_weight, terms.dpo),
            (self.bco_weight, terms.bco),
            (self.sft_weight, terms.sft),
        )
        return sum((weight * term for weight, term in weighed if weight), start=mx.array(0.0))


def mpo_metrics(terms: MPOTerms) -> dict[str, mx.array]:
    """Report each term and what the answers' rewards do, apart."""
    margin = terms.chosen_reward - terms.rejected_reward
    return {
        "dpo": terms.dpo,
        "bco": terms.bco,
        "sft": terms.sft,
        "shift": terms.shift,
        "chosen_reward": terms.chosen_reward.mean(),
        "rejected_reward": terms.rejected_reward.mean(),
        "margin": margin.mean(),
        "accuracy": (margin > 0).astype(mx.float32).mean(),
    }


def chosen_only(batch: Batch) -> Batch:
    """Leave the rejected answers out: every second one behind a prompt."""
    kept = np.ones(len(batch.input_ids), bool)
    rejected = [span for span in batch.spans if span.prefix is not None][1::2]
    for span in rejected:
        kept[span.start : span.stop] = False
    place, mine = np.cumsum(kept) - 1, np.asarray(batch.answer_ids) % 2 == 0
    return replace(
        batch,
        input_ids=np.asarray(batch.input_ids)[kept],
        positions=np.asarray(batch.positions)[kept],
        spans=tuple(remap_span(span, place) for span in batch.spans if span not in rejected),
        target_positions=place[np.asarray(batch.target_positions)[mine]],
        targets=np.asarray(batch.targets)[mine],
        answer_ids=np.asarray(batch.answer_ids)[mine],
        loss_weights=np.asarray(batch.loss_weights)[mine],
    )


def remap_span(span: Span, place: np.ndarray) -> Span:
    """Say where a span lies when the row has lost some tokens before it."""

    def at(start: int, stop: int) -> tuple[int, int]:
        return int(place[start]), int(place[stop - 1]) + 1

    return Span(*at(span.start, span.stop), span.prefix and at(*span.prefix))


def target_log_probs(
    model: InternVL,
    batch: Batch,
    vision: mx.array | None,
    how: ForwardOptions | None = None,
    chunk: int = CHUNK,
) -> mx.array:
    """Score every target of a batch: -> (N,) float32."""
    states = target_states(model, batch, vision, how)
    targets, learning = mx.array(batch.targets), model.training
    return token_log_probs(model.language_model, states, targets, chunk=chunk, needs_grad=learning)


def sum_by_answer(batch: Batch, values: mx.array) -> mx.array:
    """Sum what belongs to each answer, in one fixed order: (N,) -> (answers,)."""
    mine = mx.array(batch.answer_ids) == mx.arange(batch.num_answers)[:, None]
    return mx.where(mine, values, 0).sum(axis=-1)


def chosen_loss(batch: Batch, policy: mx.array) -> mx.array:
    """Average the cross-entropy over all tokens of the chosen answers, the even ones."""
    chosen = mx.array(batch.answer_ids) % 2 == 0
    return -mx.where(chosen, policy, 0).sum() / chosen.sum()


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sft": SFT,
    "pretrain": lambda **settings: SFT(name="pretrain", **settings),
    "mpo": MPO,
}
