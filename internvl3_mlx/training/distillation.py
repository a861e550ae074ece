"""The loss of distillation: divergence from a teacher's most likely tokens.

Only the K highest log-probabilities of the teacher are known; the mass of all other tokens is one
further class, the ghost token, for teacher and student alike. The loss is the KL divergence of
these K + 1 classes:

    sum_i p_i (log p_i - log q_i) + p_t (log p_t - log q_t),  p_t = 1 - sum_i p_i, q_t likewise

Source: the ghost token of Sparse Logit Sampling (arXiv 2503.16870). With a temperature T, logits
are divided by T and the loss is multiplied by T^2 (Hinton et al., arXiv 1503.02531).
"""

from dataclasses import dataclass

import mlx.core as mx

from internvl3_mlx.models.decoder import LanguageModel
from internvl3_mlx.models.layers import after
from internvl3_mlx.training.grad_checkpoint import is_trainable
from internvl3_mlx.training.token_log_probs import states_per_chunk

LEAST_TAIL = 1e-7  # of the teacher's mass; below it the ghost token has no weight


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """The teacher's most likely tokens. ids: (N, K) int32. log_probs: (N, K) float32."""

    ids: mx.array
    log_probs: mx.array


def distillation_terms(
    logits: mx.array, targets: mx.array, soft: SoftTargets, temperature: float
) -> tuple[mx.array, mx.array]:
    """Return cross-entropy and KL divergence to the soft targets: (C, V) float32 -> (C,), (C,)."""
    lse = mx.logsumexp(logits, axis=-1)
    cross_entropy = lse - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    scores = logits / temperature
    total = mx.logsumexp(scores, axis=-1)
    own = mx.take_along_axis(scores, soft.ids, axis=-1) - total[:, None]
    teacher = mx.exp(soft.log_probs)
    kept = (teacher * (soft.log_probs - own)).sum(axis=-1)
    tail = 1 - teacher.sum(axis=-1)
    others = mx.put_along_axis(scores, soft.ids, mx.array(-mx.inf), axis=-1)
    has_tail = (tail > LEAST_TAIL) & (soft.ids.shape[-1] < logits.shape[-1])
    rest = mx.where(has_tail[:, None], others, scores)  # without a tail, anything finite
    own_tail = mx.logsumexp(rest, axis=-1) - total
    mass = mx.where(has_tail, tail, 1.0)
    ghost = mx.where(has_tail, mass * (mx.log(mass) - own_tail), 0.0)
    return cross_entropy, temperature**2 * (kept + ghost)


def distillation_losses(
    model: LanguageModel,
    states: mx.array,
    targets: mx.array,
    soft: SoftTargets,
    weights: tuple[float, float],
    temperature: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the weighted loss of every target, and its two terms without gradients: (N,) each.

    weights: of cross-entropy and of the divergence. With a frozen head, the gradients of a chunk
    are computed with its values, so that one chunk's logits exist at a time.
    """
    head = model.lm_head if "lm_head" in model else model.model.embed_tokens
    frozen = not is_trainable(head)
    fixed = mx.stop_gradient(states) if frozen else states
    outputs: list[list[mx.array]] = []
    grads: list[mx.array] = []
    step = states_per_chunk()
    for start in range(0, states.shape[0], step):
        rows = slice(start, start + step)
        part_soft = SoftTargets(soft.ids[rows], soft.log_probs[rows])

        def score(x: mx.array, rows: slice = rows, soft: SoftTargets = part_soft) -> list[mx.array]:
            logits = model.head(x).astype(mx.float32)
            sft, kd = distillation_terms(logits, targets[rows], soft, temperature)
            return [weights[0] * sft + weights[1] * kd, sft, kd]

        part = after(fixed[rows], grads[-1:])
        if frozen:
            zeros = mx.zeros(part.shape[0])
            values, found = mx.vjp(score, [part], [mx.ones(part.shape[0]), zeros, zeros])
            outputs.append(values)
            grads += found
        else:
            outputs.append(score(part))
    total, sft, kd = (mx.concatenate(list(column)) for column in zip(*outputs, strict=True))
    sft, kd = mx.stop_gradient(sft), mx.stop_gradient(kd)
    if not frozen:
        return total, sft, kd
    all_grads = mx.stop_gradient(mx.concatenate(grads))
    # (states - fixed) is zero and its gradient is one: the sum has the right value and gradient
    follow = ((states - fixed) * all_grads).astype(mx.float32).sum(axis=-1)
    return mx.stop_gradient(total) + follow, sft, kd
