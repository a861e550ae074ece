"""Group relative policy optimization (GRPO), and its sequence-level form (GSPO).

Sources: GRPO (arXiv 2402.03300) with outcome rewards; GSPO (arXiv 2507.18071); the estimator of the
KL divergence is that of GRPO, formula 4.
"""

from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.errors import UserError
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.training.batch import Batch, Rollouts
from internvl3_mlx.training.forward import ForwardOptions
from internvl3_mlx.training.objectives import (
    LossOutput,
    ObjectiveState,
    Reference,
    answer_lengths,
    require_log_probs,
    sum_by_answer,
    target_log_probs,
)

SEQUENCE = "sequence"
MAX_LOG_RATIO = 10.0  # of a sequence, against overflow
LEAST_ANSWERS = 1e-9  # an update none of whose groups differ has a loss of 0, not of 0 / 0


@dataclass(frozen=True)
class GRPO:
    """The clipped policy objective on groups of sampled answers, averaged over answers.

    Each answer is averaged over its tokens. beta: weight of the KL divergence from the reference.
    """

    name: str = "grpo"
    importance_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    forward: ForwardOptions = ForwardOptions()
    chunk: int | None = None

    @property
    def needs_reference(self) -> bool:
        return bool(self.beta)

    def __call__(
        self,
        model: InternVL,
        batch: Batch,
        vision_features: mx.array | None,
        reference_log_probs: Reference,
        state: ObjectiveState,
    ) -> tuple[LossOutput, ObjectiveState]:
        rollouts = batch.rollouts
        if rollouts is None:
            raise UserError("GRPO learns from sampled answers, but the batch has none")
        figures = rollout_figures(rollouts)
        if not model.training:  # validation: the greedy answers, and no loss
            count = mx.array(float(len(rollouts.rewards)))
            return LossOutput(count * (1 - figures["reward"]), count, figures), state
        policy = target_log_probs(model, batch, vision_features, self.forward, self.chunk)
        old = policy if rollouts.old_log_probs is None else mx.array(rollouts.old_log_probs)
        advantages = mx.array(rollouts.advantages)
        lengths = answer_lengths(batch)
        losses, clipped = self.policy_losses(batch, policy, mx.stop_gradient(old), advantages)
        if self.beta:
            reference = require_log_probs(reference_log_probs, "KL terms", "set beta to 0")
            kl = sum_by_answer(batch, kl_estimates(policy, reference)) / lengths
            losses = losses + self.beta * kl
            figures["kl"] = mx.stop_gradient(kl).mean()
        weights = mx.array(rollouts.weights)
        count = weights.sum()
        figures["clip_fraction"] = mx.stop_gradient(clipped).mean()
        total = (losses * weights).sum()
        return LossOutput(total, mx.maximum(count, LEAST_ANSWERS), figures), state

    def policy_losses(
        self, batch: Batch, policy: mx.array, old: mx.array, advantages: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return the loss and the clipped share of each answer: (N,) -> (num_answers,)."""
        lengths, log_ratios = answer_lengths(batch), policy - old
        if self.importance_level == SEQUENCE:
            means = mx.minimum(sum_by_answer(batch, log_ratios) / lengths, MAX_LOG_RATIO)
            return self.clipped_losses(mx.exp(means), advantages)
        own = advantages[mx.array(batch.answer_ids)]
        losses, clipped = self.clipped_losses(mx.exp(log_ratios), own)
        return sum_by_answer(batch, losses) / lengths, sum_by_answer(batch, clipped) / lengths

    def clipped_losses(self, ratios: mx.array, advantages: mx.array) -> tuple[mx.array, mx.array]:
        """Return PPO's clipped losses, and where clipping was in force."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        bounded = mx.clip(ratios, 1 - self.epsilon, 1 + high)
        losses = -mx.minimum(ratios * advantages, bounded * advantages)
        below = (ratios < 1 - self.epsilon) & (advantages < 0)
        above = (ratios > 1 + high) & (advantages > 0)
        return losses, (below | above).astype(mx.float32)


def kl_estimates(policy: mx.array, reference: mx.array) -> mx.array:
    """Estimate the KL divergence from the reference at each token, 0 or more: (N,) -> (N,)."""
    ahead = mx.stop_gradient(reference) - policy
    return mx.exp(ahead) - ahead - 1


def rollout_figures(rollouts: Rollouts) -> dict[str, mx.array]:
    """Return the figures of sampling, over all groups. Scalars."""
    return {
        "reward": mx.array(rollouts.rewards).mean(),
        "zero_variance": mx.array(float(rollouts.zero_variance)),
        "completion_length": mx.array(float(rollouts.mean_length)),
    }
