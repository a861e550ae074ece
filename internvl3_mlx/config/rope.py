"""The ``rope_scaling`` of a language model's config, in any spelling, as transformers reads it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from internvl3_mlx.config.keys import Number, Rule, Switch, Whole, check_values
from internvl3_mlx.errors import ConfigError

POSITIVE = Number(0, exclusive=True)
REQUIRED: dict[str, tuple[str, ...]] = {  # rope type -> the numbers that it cannot do without
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
NUMBERS: dict[str, Rule] = {
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "original_max_position_embeddings": Whole(1),
    "attention_factor": POSITIVE,
    "beta_fast": POSITIVE,
    "beta_slow": POSITIVE,
    "mscale": Number(0),
    "mscale_all_dim": Number(0),
    "truncate": Switch(),
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
}
NAMES = ("rope_type", "type", "partial_rotary_factor")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies are scaled. ``rope_type`` is transformers' name of the method.

    None where the file says nothing and the method has a default of its own.
    """

    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def to_dict(self) -> dict[str, Any] | None:
        """Return the ``rope_scaling`` of a config file, None for the default."""
        if self.rope_type == "default":
            return None
        given = {key: value for key, value in asdict(self).items() if value is not None}
        if self.truncate:
            del given["truncate"]
        return {**given, "type": self.rope_type}


def read_rope(text: Mapping[str, Any], where: str) -> tuple[float | None, RopeScaling]:
    """Read rope_theta, None where none is given, and the scaling of a language model's config.

    transformers' own reading decides between two spellings: ``rope_scaling`` over
    ``rope_parameters``, their ``rope_type`` over ``type``, and a value inside of them over the one
    beside them, except for original_max_position_embeddings. Raises ConfigError.
    """
    where = f"{where}.rope_scaling" if text.get("rope_scaling") else f"{where}.rope_parameters"
    table = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is {table!r}; expected an object")
    check_values(table, NUMBERS, where)
    unknown = [key for key in table if key not in NUMBERS and key not in NAMES]
    if unknown:
        raise ConfigError(
            f"{where} has the key {str(unknown[0])[:60]!r}, which this package cannot follow; "
            "use a model whose positions it can compute"
        )
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise ConfigError(
            f"{where} is of the type {str(kind)[:60]!r}; this package computes "
            f"{', '.join(REQUIRED)}"
        )
    for holder in (table, text):
        if holder.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError(f"{where}: partial_rotary_factor is not supported; expected 1")
    numbers = {key: table[key] for key in NUMBERS if table.get(key) is not None}
    if text.get("original_max_position_embeddings") is not None:
        numbers["original_max_position_embeddings"] = text["original_max_position_embeddings"]
    theta = numbers.pop("rope_theta", text.get("rope_theta"))
    return theta, complete_scaling(kind, numbers, text, where)


def complete_scaling(
    kind: str, numbers: dict[str, Any], text: Mapping[str, Any], where: str
) -> RopeScaling:
    """Fill in what a method takes from the rest of the config. Raises ConfigError."""
    if kind == "default":
        return RopeScaling()
    window = text.get("max_position_embeddings", 32768)
    if kind in ("yarn", "llama3"):
        numbers.setdefault("original_max_position_embeddings", window)
    else:
        numbers.pop("original_max_position_embeddings", None)
    if (
        kind == "yarn"
        and "factor" not in numbers
        and "factor" in (text.get("rope_scaling") or text.get("rope_parameters") or {})
    ):
        numbers["factor"] = window / numbers["original_max_position_embeddings"]
    if missing := [key for key in REQUIRED[kind] if key not in numbers]:
        raise ConfigError(f"{where} is of the type {kind} but has no {missing[0]!r}")
    low, high = numbers.get("low_freq_factor", 1.0), numbers.get("high_freq_factor", 4.0)
    if kind == "llama3" and low >= high:
        raise ConfigError(f"{where}: low_freq_factor {low} is not below high_freq_factor {high}")
    if numbers.get("beta_fast", 32) < numbers.get("beta_slow", 1):
        raise ConfigError(f"{where}: beta_fast is below beta_slow")
    return RopeScaling(rope_type=kind, **numbers)
