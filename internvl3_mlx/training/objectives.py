"""Training objectives: fine-tuning (SFT), pre-training, distillation, and preferences.

An objective returns a numerator, which is differentiated, and a denominator. The trainer sums both
over micro-batches and ranks and divides once, so that every token has the same weight however a
batch is split.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import mlx.core as mx

from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.batch import Batch, chosen_only
from internvl3_mlx.training.distillation import SoftTargets, distillation_losses
from internvl3_mlx.training.forward import ForwardOptions, target_states
from internvl3_mlx.training.losses import (
    MPOTerms,
    PreferenceConfig,
    estimate_kl,
    kto_losses,
    orpo_losses,
    preference_terms,
    simpo_losses,
)
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
    """Preference optimization on pairs: a weighted sum of losses; weight 0 skips one.

    The defaults are those of mixed preference optimization (MPO); with other weights it is DPO,
    ORPO or SimPO. The two answers of a pair share one prompt, which is read once.
    length_normalize: divide the rewards of DPO and BCO by the number of tokens.
    """

    name: str = "mpo"
    dpo_weight: float = 0.8
    bco_weight: float = 0.2
    sft_weight: float = 1.0
    orpo_weight: float = 0.0
    simpo_weight: float = 0.0
    preference: PreferenceConfig = PreferenceConfig()
    length_normalize: bool = False
    simpo_gamma: float = 0.5
    forward: ForwardOptions = ForwardOptions()
    chunk: int | None = None

    @property
    def needs_reference(self) -> bool:
        return bool(self.dpo_weight or self.bco_weight)

    @property
    def needs_rejected(self) -> bool:
        return bool(self.needs_reference or self.orpo_weight or self.simpo_weight)

    def __call__(
        self,
        model: InternVL,
        batch: Batch,
        vision_features: mx.array | None,
        reference_log_probs: Reference,
        state: ObjectiveState,
    ) -> tuple[LossOutput, ObjectiveState]:
        if not self.needs_rejected:
            chosen = chosen_only(batch)
            loss = chosen_loss(chosen, self.policy_log_probs(model, chosen, vision_features))
            return LossOutput(self.sft_weight * loss, mx.array(1.0), {"sft": loss}), state
        reference = self.check_reference(reference_log_probs)
        policy = self.policy_log_probs(model, batch, vision_features)
        sft, lengths = chosen_loss(batch, policy), answer_lengths(batch)
        likelihoods = sum_by_answer(batch, policy) / lengths
        extra = self.likelihood_losses(likelihoods[0::2], likelihoods[1::2])
        if reference is None:
            metrics = likelihood_metrics(sft, self.preference.beta * likelihoods)
        else:
            sums = sum_by_answer(batch, policy - mx.stop_gradient(reference))
            sums = sums / lengths if self.length_normalize else sums
            running = self.preference.running_shift and model.training
            config = replace(self.preference, running_shift=running)
            terms = preference_terms(sums[0::2], sums[1::2], sft, config, state.shift, state.count)
            metrics, state = mpo_metrics(terms), ObjectiveState(terms.shift, terms.count)
        metrics = metrics | extra
        return LossOutput(self.weighted_sum(metrics), mx.array(1.0), metrics), state

    def check_reference(self, given: Reference) -> mx.array | None:
        """Return the reference log-probabilities if the loss has a use for them."""
        if not self.needs_reference:
            return None
        return require_log_probs(given, "DPO and BCO", "set dpo_weight and bco_weight to 0")

    def policy_log_probs(
        self, model: InternVL, batch: Batch, vision_features: mx.array | None
    ) -> mx.array:
        return target_log_probs(model, batch, vision_features, self.forward, self.chunk)

    def likelihood_losses(self, chosen: mx.array, rejected: mx.array) -> dict[str, mx.array]:
        """Compute the losses without a reference from mean log-probabilities: (B,), (B,)."""
        losses, config = {}, self.preference
        if self.orpo_weight:
            losses["orpo"] = orpo_losses(chosen, rejected).mean()
        if self.simpo_weight:
            losses["simpo"] = simpo_losses(
                chosen, rejected, config.beta, self.simpo_gamma, config.label_smoothing
            ).mean()
        return losses

    def weighted_sum(self, losses: Mapping[str, mx.array]) -> mx.array:
        """Add up the weighted losses; one of weight 0 is never computed."""
        weights = (
            ("dpo", self.dpo_weight),
            ("bco", self.bco_weight),
            ("sft", self.sft_weight),
            ("orpo", self.orpo_weight),
            ("simpo", self.simpo_weight),
        )
        return sum(
            (weight * losses[name] for name, weight in weights if weight), start=mx.array(0.0)
        )


def require_log_probs(given: Reference, losses: str, otherwise: str) -> mx.array:
    """Return the reference log-probabilities; raises ``UserError`` if none were given."""
    if not isinstance(given, mx.array):
        raise UserError(
            f"{losses} compare with a reference model, but no reference log-probabilities were "
            f"given; pass them, or {otherwise}"
        )
    return given


def mpo_metrics(terms: MPOTerms) -> dict[str, mx.array]:
    """Collect each term, the rewards, their margin and the preference accuracy. Scalars."""
    return {
        "dpo": terms.dpo,
        "bco": terms.bco,
        "sft": terms.sft,
        "shift": terms.shift,
        **reward_metrics(terms.chosen_reward, terms.rejected_reward),
    }


def likelihood_metrics(sft: mx.array, rewards: mx.array) -> dict[str, mx.array]:
    """Collect what there is without a reference. rewards: (2B,), of chosen and rejected answers."""
    return {"sft": sft, **reward_metrics(rewards[0::2], rewards[1::2])}


def reward_metrics(chosen: mx.array, rejected: mx.array) -> dict[str, mx.array]:
    """Average rewards, their margin, and how often the chosen one is higher: (B,), (B,)."""
    margin = chosen - rejected
    return {
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
        "margin": margin.mean(),
        "accuracy": (margin > 0).astype(mx.float32).mean(),
    }


@dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky optimization on unpaired preferences, and SFT on the desirable answers.

    The KL divergence that rewards are compared with is estimated in each micro-batch, from the
    answer of every sample after the prompt of another. A micro-batch of one sample has no such
    answer; its estimate is 0, which is also the least that an estimate may be.
    desirable_weight, undesirable_weight: of answers of each label. all_mean: averages a scalar
    over all processes.
    """

    name: str = "kto"
    kto_weight: float = 1.0
    sft_weight: float = 0.0
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    all_mean: Callable[[mx.array], mx.array] | None = None
    forward: ForwardOptions = ForwardOptions()
    chunk: int | None = None
    needs_reference: bool = True

    def __call__(
        self,
        model: InternVL,
        batch: Batch,
        vision_features: mx.array | None,
        reference_log_probs: Reference,
        state: ObjectiveState,
    ) -> tuple[LossOutput, ObjectiveState]:
        reference = require_log_probs(reference_log_probs, "KTO's rewards", "use another method")
        policy = target_log_probs(model, batch, vision_features, self.forward, self.chunk)
        ratios = sum_by_answer(batch, policy - mx.stop_gradient(reference))
        stride, desirable = batch.num_answers // len(batch.labels), mx.array(batch.labels)
        all_mean = self.all_mean if model.training else None  # ranks validate unequal numbers
        own, kl = ratios[::stride], estimate_kl(ratios[1::2], all_mean)
        weights = self.desirable_weight, self.undesirable_weight
        loss = kto_losses(own, desirable, kl, self.beta, weights).mean()
        gain = mx.where(desirable, own - kl, kl - own)
        metrics = {
            "kto": loss,
            "sft": weighted_loss(batch, policy),
            "kl": kl,
            "margin": self.beta * gain.mean(),
            "label_accuracy": (gain > 0).astype(mx.float32).mean(),
        }
        total = self.kto_weight * loss
        if self.sft_weight:
            total = total + self.sft_weight * metrics["sft"]
        return LossOutput(total, mx.array(1.0), metrics), state


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


def answer_lengths(batch: Batch) -> mx.array:
    """Count the tokens of each answer: -> (num_answers,)."""
    return (mx.array(batch.answer_ids) == mx.arange(batch.num_answers)[:, None]).sum(axis=-1)


def weighted_loss(batch: Batch, log_probs: mx.array) -> mx.array:
    """Average the cross-entropy by the loss weights: (N,) -> scalar, 0 without any."""
    weights = mx.array(batch.loss_weights)
    return -(log_probs * weights).sum() / mx.maximum(weights.sum(), 1)


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
