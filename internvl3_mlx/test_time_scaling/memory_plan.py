"""Whether a policy and its critic fit in memory together, estimated before anything loads."""

from dataclasses import dataclass

from internvl3_mlx.config import read_config
from internvl3_mlx.device import gpu_memory_limit
from internvl3_mlx.loading.estimate import estimate_weights_nbytes
from internvl3_mlx.loading.fetch_model import Notify, fetch_model
from internvl3_mlx.memory import GB, HEADROOM, TIGHT_SHARE
from internvl3_mlx.test_time_scaling.critic_source import find_critic

VALUE_BYTES = 2  # of a key or value


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


@dataclass(frozen=True)
class ModelChoice:
    """A model by name, and the bits of its language model."""

    name: str | None
    quantize: int | None = None
    revision: str | None = None


def plan_memory(
    policy: ModelChoice, critic: ModelChoice, tokens: int, notify: Notify
) -> MemoryPlan:
    """Compare what is needed with what a GPU may hold, or all memory without one.

    tokens: of all candidates together. Downloads what is missing, and loads nothing.
    """
    local = fetch_model(policy.name, policy.quantize, revision=policy.revision, notify=notify)
    assert critic.name is not None
    source = find_critic(critic.name)
    judge = fetch_model(source.model, critic.quantize, notify=notify)
    text = read_config(local.folder).text
    values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return MemoryPlan(
        policy=estimate_weights_nbytes(local, policy.quantize),
        critic=estimate_weights_nbytes(judge, critic.quantize),
        cache=tokens * values * VALUE_BYTES,
        limit=gpu_memory_limit(),
    )
