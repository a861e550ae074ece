"""Optimize: Muon for the matrices inside the blocks, AdamW for everything else."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

# Newton-Schulz coefficients of Muon (Jordan et al., 2024): they bring all singular values near one
# in five rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are made orthogonal."""

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        half: bool = False,
    ):
        """``half`` computes the updates in bfloat16, as the method's authors do."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.half = half

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                velocity = state.setdefault("momentum", torch.zeros_like(matrix))
                velocity.mul_(group["momentum"]).add_(matrix.grad)
                update = orthogonal(matrix.grad + group["momentum"] * velocity, self.half)
                tall = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                    update, alpha=-group["lr"] * tall
                )


def orthogonal(matrix: Tensor, half: bool = False) -> Tensor:
    """Replace a matrix by the orthogonal one nearest to its direction."""
    a, b, c = QUINTIC
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    x = x.bfloat16() if half else x
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def split(modules: dict[str, nn.Module], tower_share: float) -> tuple[list[dict], list[dict]]:
    """Split parameters into groups for Muon (the blocks' matrices) and for AdamW (the rest).

    Each group says which share of the learning rate it gets: ``tower_share`` for the tower, else 1.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {
        (matrix, tower): [] for matrix in (True, False) for tower in (True, False)
    }
    for name, parameter in named(modules):
        matrix = parameter.ndim == 2 and (".layers." in name or ".mlp1." in name)
        groups[matrix, ".vision_model." in name].append(parameter)
    shares = {True: tower_share, False: 1.0}
    made = {
        matrix: [{"params": groups[matrix, tower], "share": shares[tower]} for tower in shares]
        for matrix in (True, False)
    }
    return made[True], made[False]


def named(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of several modules with its full name."""
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            yield f"{prefix}.{name}", parameter


def rate(step: int, *, warmup: int, decay_from: int, steps: int) -> float:
    """Give the learning-rate factor: a ramp, a plateau, a straight line to zero."""
    return max(0.0, min(1.0, (step + 1) / warmup, (steps - step) / max(1, steps - decay_from)))
