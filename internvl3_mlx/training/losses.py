"""The losses of preference optimization, computed from log-probabilities.

Sources: InternVL3 (arXiv 2504.10479) section 2; MPO (arXiv 2411.10442) section 3; DPO (2305.18290);
BCO (2404.04656); length-normalized DPO (2411.15124); ORPO (2403.07691); SimPO (2405.14734); KTO
(2402.01306).
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class MPOTerms:
    """MPO's terms for one micro-batch of B pairs: three mean losses, rewards, the reward shift.

    dpo, bco, sft, shift, count: scalars; chosen_reward, rejected_reward: (B,).
    """

    dpo: mx.array
    bco: mx.array
    sft: mx.array
    chosen_reward: mx.array
    rejected_reward: mx.array
    shift: mx.array
    count: mx.array


@dataclass(frozen=True)
class PreferenceConfig:
    """Hyperparameters of the preference terms.

    running_shift: update the reward shift to the mean over all micro-batches so far, including the
    current one; otherwise the given shift is used unchanged. all_mean: averages a scalar over all
    processes.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    running_shift: bool = True
    all_mean: Callable[[mx.array], mx.array] | None = None


def mpo_terms(
    policy_chosen: mx.array,
    policy_rejected: mx.array,
    reference_chosen: mx.array,
    reference_rejected: mx.array,
    chosen_mask: mx.array,
    rejected_mask: mx.array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    shift: mx.array | float = 0.0,
    count: mx.array | float = 0,
) -> MPOTerms:
    """Compute the terms of mixed preference optimization from token log-probabilities (B, L).

    Masks are 1 on answer tokens; values elsewhere are ignored. Pass the returned ``shift`` and
    ``count`` to the next micro-batch. The shift is updated before it is used and carries no
    gradient. NumPy arrays are accepted as well.
    """
    chosen = apply_mask(policy_chosen, chosen_mask)
    rejected = apply_mask(policy_rejected, rejected_mask)
    return preference_terms(
        (chosen - apply_mask(reference_chosen, chosen_mask)).sum(axis=-1),
        (rejected - apply_mask(reference_rejected, rejected_mask)).sum(axis=-1),
        -chosen.sum() / (as_array(chosen_mask) != 0).sum(),
        PreferenceConfig(beta, label_smoothing),
        as_array(shift),
        as_array(count),
    )


def apply_mask(values: mx.array, mask: mx.array) -> mx.array:
    """Set values to 0 where the mask is 0; padding may hold anything, even NaN."""
    return mx.where(as_array(mask) != 0, as_array(values), 0)


def as_array(value: mx.array | float) -> mx.array:
    """Convert to mx.array if needed."""
    return value if isinstance(value, mx.array) else mx.array(value)


def preference_terms(
    chosen: mx.array,
    rejected: mx.array,
    sft: mx.array,
    config: PreferenceConfig,
    shift: mx.array,
    count: mx.array,
) -> MPOTerms:
    """Compute MPO's terms from summed log-ratios of policy to reference: chosen, rejected (B,)."""
    chosen_reward, rejected_reward = config.beta * chosen, config.beta * rejected
    if config.running_shift:
        mean_reward = mx.concatenate([chosen_reward, rejected_reward]).mean()
        shift, count = update_shift(mean_reward, config, shift, count)
    dpo = smoothed_loss(chosen_reward - rejected_reward, config.label_smoothing)
    bco = -nn.log_sigmoid(chosen_reward - shift) - nn.log_sigmoid(shift - rejected_reward)
    return MPOTerms(dpo.mean(), bco.mean(), sft, chosen_reward, rejected_reward, shift, count)


def update_shift(
    reward: mx.array, config: PreferenceConfig, shift: mx.array, count: mx.array
) -> tuple[mx.array, mx.array]:
    """Add a micro-batch's mean reward to the running mean; return the mean and its count."""
    reward = mx.stop_gradient(reward)
    if config.all_mean is not None:
        reward = config.all_mean(reward)
    count = count + 1
    return shift + (reward - shift) / count, count


def smoothed_loss(margin: mx.array, smoothing: float) -> mx.array:
    """Compute the loss of preferences by their margin, if a fraction of them is flipped: (B,)."""
    return -(1 - smoothing) * nn.log_sigmoid(margin) - smoothing * nn.log_sigmoid(-margin)


def orpo_losses(chosen: mx.array, rejected: mx.array) -> mx.array:
    """Compute ORPO's odds ratio loss from mean token log-probabilities: (B,), (B,) -> (B,)."""
    return -nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


LEAST_SURPRISE = 1e-7  # of an answer; without any its odds would be infinite


def log_odds(mean_log_probs: mx.array) -> mx.array:
    """Compute log(P / (1 - P)) from log P: (B,) -> (B,)."""
    values = mx.minimum(mean_log_probs, -LEAST_SURPRISE)
    return values - mx.log(-mx.expm1(values))


def simpo_losses(
    chosen: mx.array, rejected: mx.array, beta: float, gamma: float, smoothing: float = 0.0
) -> mx.array:
    """Compute SimPO's losses from mean token log-probabilities: (B,), (B,) -> (B,)."""
    return smoothed_loss(beta * (chosen - rejected) - gamma, smoothing)


def estimate_kl(
    ratios: mx.array, all_mean: Callable[[mx.array], mx.array] | None = None
) -> mx.array:
    """Estimate the KL divergence from the reference, at least 0 and without a gradient.

    ratios: (B,) log-ratios of answers to other prompts; may be empty. -> scalar.
    """
    mean = mx.stop_gradient(ratios).mean() if ratios.size else mx.array(0.0)
    return mx.maximum(all_mean(mean) if all_mean else mean, 0)


def kto_losses(
    ratios: mx.array,
    desirable: mx.array,
    kl: mx.array,
    beta: float,
    weights: tuple[float, float] = (1.0, 1.0),
) -> mx.array:
    """Compute KTO's losses from summed log-ratios of policy to reference: (B,) -> (B,).

    desirable: (B,) bool. weights: of desirable and of undesirable answers.
    """
    gain = mx.where(desirable, ratios - kl, kl - ratios)
    return mx.where(desirable, *weights) * (1 - mx.sigmoid(beta * gain))
