"""The terms of mixed preference optimisation, from log-probabilities.

Sources: InternVL3 (arXiv 2504.10479) section 2; MPO (arXiv 2411.10442) section 3; DPO (2305.18290);
BCO (2404.04656).
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class MPOTerms:
    """MPO's terms of one micro-batch of B pairs: three means, the rewards, the running shift.

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
    """How two answers are told apart.

    running: the shift is the mean of all micro-batches' mean rewards, this one's included; without
    it the shift stays as it is given. across: averages a number over ranks.
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
    """Compute the terms of mixed preference optimisation from per-token log-probabilities (B, L).

    Masks are 1 on the answers' tokens; what stands elsewhere is never looked at. ``shift`` and
    ``count`` come from the micro-batch before, the returned ones go to the next. The shift is
    updated before it is used and has no gradient. NumPy arrays will do as well.
    """
    chosen, rejected = (
        apply_mask(policy_chosen, chosen_mask),
        apply_mask(policy_rejected, rejected_mask),
    )
    return preference_terms(
        (chosen - apply_mask(reference_chosen, chosen_mask)).sum(axis=-1),
        (rejected - apply_mask(reference_rejected, rejected_mask)).sum(axis=-1),
        -chosen.sum() / (as_array(chosen_mask) != 0).sum(),
        PreferenceConfig(beta, label_smoothing),
        as_array(shift),
        as_array(count),
    )


def apply_mask(values: mx.array, mask: mx.array) -> mx.array:
    """Put 0 where the mask is 0; padding may hold anything, even no number."""
    return mx.where(as_array(mask) != 0, as_array(values), 0)


def as_array(given: mx.array | float) -> mx.array:
    """Take what MLX can compute with as it is, and make it of anything else."""
    return given if isinstance(given, mx.array) else mx.array(given)


def preference_terms(
    chosen: mx.array,
    rejected: mx.array,
    sft: mx.array,
    how: PreferenceConfig,
    shift: mx.array,
    count: mx.array,
) -> MPOTerms:
    """Compute MPO's terms from summed log-ratios, policy over reference: chosen, rejected (B,)."""
    good, bad = how.beta * chosen, how.beta * rejected
    if how.running_shift:
        shift, count = update_shift(mx.concatenate([good, bad]).mean(), how, shift, count)
    smooth = how.label_smoothing
    dpo = -(1 - smooth) * nn.log_sigmoid(good - bad) - smooth * nn.log_sigmoid(bad - good)
    bco = -nn.log_sigmoid(good - shift) - nn.log_sigmoid(shift - bad)
    return MPOTerms(dpo.mean(), bco.mean(), sft, good, bad, shift, count)


def update_shift(
    reward: mx.array, how: PreferenceConfig, shift: mx.array, count: mx.array
) -> tuple[mx.array, mx.array]:
    """Take one more micro-batch's mean reward into the running mean."""
    reward = mx.stop_gradient(reward)
    if how.all_mean is not None:
        reward = how.all_mean(reward)
    count = count + 1
    return shift + (reward - shift) / count, count
