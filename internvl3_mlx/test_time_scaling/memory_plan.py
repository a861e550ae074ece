"""Whether a policy and its critic fit in memory together, estimated before anything loads."""

from dataclasses import dataclass

from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.memory import GB, HEADROOM, TIGHT_SHARE


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of both models and of the candidates' KV caches, and what a GPU may hold."""

    policy: int
    critic: int
    cache: int
    limit: int

    @property
    def in_turns(self) -> bool:
        """Whether the models must take turns."""
        together = self.policy + self.critic + self.cache + HEADROOM
        return together > TIGHT_SHARE * self.limit

    @property
    def note(self) -> str:
        """One line that says why they take turns."""
        return (
            f"the model ({self.policy / GB:.1f} GB) and the critic ({self.critic / GB:.1f} GB) do "
            f"not fit into {self.limit / GB:.1f} GB together: the model writes all candidates "
            "first and is freed before the critic loads"
        )


def plan_memory(policy: int, critic: int, cache: int = 0) -> MemoryPlan:
    """Compare what is needed with what a GPU may hold, or all memory without one. In bytes."""
    return MemoryPlan(policy, critic, cache, gpu_memory_limit())
