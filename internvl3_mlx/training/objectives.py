"""Training objectives: supervised fine-tuning (SFT), pre-training, distillation, and MPO.

An objective returns a numerator, which is differentiated, and a denominator. The trainer sums both
over micro-batches and ranks and divides once, so that every token has the same weight however a
batch is split.
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
from internvl3_mlx.training.distillation import SoftTargets, distillation_losses
from internvl3_mlx.training.forward import ForwardOptions, target_states
from internvl3_mlx.training.losses import MPOTerms, PreferenceConfig, preference_terms
from internvl3_mlx.training.token_log_probs import token_log_probs


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch as a fraction of scalars, and ``metrics`` to average and log."""

    numerator: mx.array
    denominator: mx.array
    metrics: dict[str, mx.array]


@dataclass(frozen=True)
class ObjectiveState:
    """State an objective carries between micro-batches, saved in every checkpoint. Scalars.

    shift: the running mean of MPO's rewards. count: the number of micro-batches in it.
    """

    shift: mx.array = field(default_factory=lambda: mx.array(0.0))
    count: mx.array = field(default_factory=lambda: mx.array(0.0))


# what a loss compares with: (N,) log-probabilities of a reference, or a teacher's soft targets
Reference = mx.array | SoftTargets | None


class Objective(Protocol):
    """Computes the loss of a batch."""

    @property
    def name(self) -> str: ...

    @property
    def needs_reference(self) -> bool: ...

    def __call__(
        self,
        model: InternVL,
        batch: Batch,
        vision_features: mx.array | None,
        reference_log_probs: Reference,
        state: ObjectiveState,
    ) -> tuple[LossOutput, ObjectiveState]: ...


@dataclass(frozen=True)
class SFT:
    """Weighted cross-entropy: sum(CE * loss_weights) / sum(loss_weights)."""

    name: str = "sft"
    forward: ForwardOptions = ForwardOptions()
    chunk: int | None = None
    needs_reference: bool = False

    def __call__(
        self,
        model: InternVL,
        batch: Batch,
        vision_features: mx.array | None,
        reference_log_probs: Reference,
        state: ObjectiveState,
    ) -> tuple[LossOutput, ObjectiveState]:
        scores = target_log_probs(model, batch, vision_features, self.forward, self.chunk)
        weights = mx.array(batch.loss_weights)
        return LossOutput(-(scores * weights).sum(), weights.sum(), {}), state


@dataclass(frozen=True)
class MPO:
    """Mixed preference optimization: weighted DPO, BCO and SFT terms; weight 0 skips a term.

    The defaults are the published ones. The two answers of a pair share one prompt, which is read
    once.
    """

    name: str = "mpo"
    dpo_weight: float = 0.8
    bco_weight: float = 0.2
    sft_weight: float = 1.0
    preference: PreferenceConfig = PreferenceConfig()
    forward: ForwardOptions = ForwardOptions()
    chunk: int | None = None

    @property
    def needs_reference(self) -> bool:
        return bool(self.dpo_weight or self.bco_weight)

    def __call__(
        self,
        model: InternVL,
        batch: Batch,
        vision_features: mx.array | None,
        reference_log_probs: Reference,
        state: ObjectiveState,
    ) -> tuple[LossOutput, ObjectiveState]:
        if not self.needs_reference:
            chosen = chosen_only(batch)
            loss = chosen_loss(chosen, self.policy_log_probs(model, chosen, vision_features))
            return LossOutput(self.sft_weight * loss, mx.array(1.0), {"sft": loss}), state
        if not isinstance(reference_log_probs, mx.array):
            raise UserError(
                "DPO and BCO compare with a reference model, but no reference log-probabilities "
                "were given; pass them, or set dpo_weight and bco_weight to 0"
            )
        policy = self.policy_log_probs(model, batch, vision_features)
        sums = sum_by_answer(batch, policy - mx.stop_gradient(reference_log_probs))
        sft = chosen_loss(batch, policy)
        running = self.preference.running_shift and model.training
        config = replace(self.preference, running_shift=running)
        terms = preference_terms(sums[0::2], sums[1::2], sft, config, state.shift, state.count)
        output = LossOutput(self.weighted_sum(terms), mx.array(1.0), mpo_metrics(terms))
        return output, ObjectiveState(terms.shift, terms.count)

    def policy_log_probs(
        self, model: InternVL, batch: Batch, vision_features: mx.array | None
    ) -> mx.array:
        return target_log_probs(model, batch, vision_features, self.forward, self.chunk)

    def weighted_sum(self, terms: MPOTerms) -> mx.array:
        """Add up the weighted terms; a term of weight 0 is never computed."""
        weighted = (
            (self.dpo_weight, terms.dpo),
            (self.bco_weight, terms.bco),
            (self.sft_weight, terms.sft),
        )
        return sum((weight * term for weight, term in weighted if weight), start=mx.array(0.0))


def mpo_metrics(terms: MPOTerms) -> dict[str, mx.array]:
    """Collect each term, the rewards, their margin and the preference accuracy. Scalars."""
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
    """Drop the rejected answer of each pair: the second of the two spans that share a prompt."""
    keep = np.ones(len(batch.input_ids), bool)
    rejected = [span for span in batch.spans if span.prefix is not None][1::2]
    for span in rejected:
        keep[span.start : span.stop] = False
    new_index, is_chosen = np.cumsum(keep) - 1, np.asarray(batch.answer_ids) % 2 == 0
    return replace(
        batch,
        input_ids=np.asarray(batch.input_ids)[keep],
        positions=np.asarray(batch.positions)[keep],
        spans=tuple(remap_span(span, new_index) for span in batch.spans if span not in rejected),
        target_positions=new_index[np.asarray(batch.target_positions)[is_chosen]],
        targets=np.asarray(batch.targets)[is_chosen],
        answer_ids=np.asarray(batch.answer_ids)[is_chosen],
        loss_weights=np.asarray(batch.loss_weights)[is_chosen],
    )


def remap_span(span: Span, new_index: np.ndarray) -> Span:
    """Move a span to where its tokens are after others were dropped. new_index: (L,)."""

    def remap(start: int, stop: int) -> tuple[int, int]:
        return int(new_index[start]), int(new_index[stop - 1]) + 1

    return Span(*remap(span.start, span.stop), span.prefix and remap(*span.prefix))


def target_log_probs(
    model: InternVL,
    batch: Batch,
    vision_features: mx.array | None,
    forward: ForwardOptions | None = None,
    chunk: int | None = None,
) -> mx.array:
    """Compute the log-probability of every target of a batch: -> (N,) float32."""
    states = target_states(model, batch, vision_features, forward)
    targets = mx.array(batch.targets)
    return token_log_probs(
        model.language_model, states, targets, chunk=chunk, needs_grad=model.training
    )


def sum_by_answer(batch: Batch, values: mx.array) -> mx.array:
    """Sum the values of each answer, in a fixed order: (N,) -> (num_answers,)."""
    mask = mx.array(batch.answer_ids) == mx.arange(batch.num_answers)[:, None]
    return mx.where(mask, values, 0).sum(axis=-1)


def chosen_loss(batch: Batch, log_probs: mx.array) -> mx.array:
    """Average the cross-entropy over all tokens of the chosen (even) answers: (N,) -> scalar."""
    chosen = mx.array(batch.answer_ids) % 2 == 0
    return -mx.where(chosen, log_probs, 0).sum() / chosen.sum()


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy on the answers and divergence from a teacher, each with its weight.

    Both are averaged over the targets by their loss weights.
    """

    name: str = "distill"
    sft_weight: float = 1.0
    distill_weight: float = 1.0
    temperature: float = 1.0
    forward: ForwardOptions = ForwardOptions()
    needs_reference: bool = False

    def __call__(
        self,
        model: InternVL,
        batch: Batch,
        vision_features: mx.array | None,
        reference_log_probs: Reference,
        state: ObjectiveState,
    ) -> tuple[LossOutput, ObjectiveState]:
        if not isinstance(reference_log_probs, SoftTargets):
            raise UserError("distillation needs a teacher's soft targets, but none were given")
        states = target_states(model, batch, vision_features, self.forward)
        total, sft, distill = distillation_losses(
            model.language_model,
            states,
            mx.array(batch.targets),
            reference_log_probs,
            (self.sft_weight, self.distill_weight),
            self.temperature,
        )
        weights = mx.array(batch.loss_weights)
        whole = weights.sum()
        metrics = {
            "sft": (sft * weights).sum() / whole,
            "distill": (distill * weights).sum() / whole,
        }
        return LossOutput((total * weights).sum(), whole, metrics), state


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sft": SFT,
    "prm": lambda **options: SFT(name="prm", **options),
    "pretrain": lambda **options: SFT(name="pretrain", **options),
    "mpo": MPO,
    "distill": Distillation,
}
