"""How the engine is set up. Importing this is cheap: the command line makes flags of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from internvl3_mlx.option_fields import check_bounds, config_field

GB = 1_000_000_000
LOAD, CACHES = "Serving", "Memory"


@dataclass(frozen=True)
class EngineSettings:
    """How much an engine serves at once, and what it keeps.

    models: folder, repository or size by the name that requests give; the first is the default.
    adapters: folder or repository of an adapter by its name in ``base:adapter``.
    quantize, dtype: as ``load`` takes them.
    max_models: in memory at the same time.
    max_batch: answers decoded together. max_prefills: requests read in turns.
    max_waiting: requests beyond those; further ones are refused.
    idle_timeout_s: after which an unused model is put away; None for never.
    memory_nbytes: what weights and caches may take together; None for the device's limit.
    kv_bits: of the keys and values of requests that do not say so themselves; None for 16.
    max_answers: the largest ``n`` or ``best_of`` of a request.
    feature_folder: where image features stay between runs; None for memory only.
    """

    models: Mapping[str, str]
    adapters: Mapping[str, str] = field(default_factory=dict[str, str])
    quantize: int | None = None
    dtype: str | None = None
    max_models: int = 2
    max_batch: int = config_field(8, LOAD, "Answers generated at once.", low=1, high=256)
    max_prefills: int = 4
    max_waiting: int = config_field(
        256, LOAD, "Requests that may wait; further ones get 503.", low=0, high=100_000
    )
    max_answers: int = 8
    idle_timeout_s: float | None = config_field(
        1800.0, LOAD, "Seconds after which a model that nobody asks is put away; 0 for never.",
        low=0, high=10**9, flags=("--idle-timeout",),
    )  # fmt: skip
    memory_nbytes: int | None = None
    kv_bits: int | None = config_field(
        None, CACHES, "Quantize the KV cache to this many bits.", choices=("4", "8"),
    )  # fmt: skip
    prefix_cache_nbytes: int = config_field(
        2 * GB, CACHES, "Bytes of the prompt cache that conversations share.",
        low=0, high=10**15, flags=("--prompt-cache-bytes",),
    )  # fmt: skip
    feature_cache_nbytes: int = GB // 2
    feature_disk_nbytes: int = config_field(
        5 * GB, CACHES, "Bytes of image features kept on disk; 0 for none.",
        low=0, high=10**15, flags=("--feature-cache-bytes",),
    )  # fmt: skip
    feature_folder: Path | None = None
    decode_threads: int = 2

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.metadata:
                check_bounds(entry, getattr(self, entry.name))
