"""What a running engine says of itself: its models, its load, and its counters."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelStatus:
    """A model that can be asked for, and what is known of it once it has been loaded.

    name: as requests give it. nbytes: of its weights. created: seconds since the epoch.
    expires_at: when it is put away if nobody asks, in seconds since the epoch. bits: of the
    language model's weights, None where they are not quantized. tile_size: pixels of a side.
    """

    name: str
    loaded: bool = False
    created: int = 0
    nbytes: int = 0
    context_length: int = 0
    max_tiles: int = 0
    tile_size: int = 0
    parameters: int = 0
    bits: int | None = None
    expires_at: float | None = None


@dataclass(frozen=True)
class EngineStatus:
    """The load now. running: answers being decoded. prefilling: requests being read."""

    models: tuple[ModelStatus, ...] = ()
    waiting: int = 0
    prefilling: int = 0
    running: int = 0
    max_waiting: int = 0
    stopping: bool = False
    alive: bool = True


@dataclass(frozen=True)
class EngineMetrics:
    """Counters since the start. Seconds are the worker's, bytes those held now.

    finished: answers by how they ended: stop, length, cancelled, failed. rejected: requests by the
    name of the refusal.
    """

    requests: int = 0
    finished: Mapping[str, int] = field(default_factory=dict[str, int])
    rejected: Mapping[str, int] = field(default_factory=dict[str, int])
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    vision_seconds: float = 0.0
    image_features_computed: int = 0
    image_features_reused: int = 0
    prefix_cache_nbytes: int = 0
    feature_cache_nbytes: int = 0
    kv_nbytes: int = 0
    peak_memory_nbytes: int = 0
    model_loads: int = 0
