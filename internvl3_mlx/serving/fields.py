"""The fields of requests: their types, and what becomes of them in a generation config."""

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from internvl3_mlx.generation.generation_config import (
    GenerationConfig,
    GenerationOptions,
    with_overrides,
)
from internvl3_mlx.option_fields import parse_int
from internvl3_mlx.serving.errors import invalid, unsupported
from internvl3_mlx.serving.limits import ServerLimits

MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
MAX_TOP_LOGPROBS = 20
RANDOM_SEED = -1  # what llama.cpp and its relatives call no seed
MAX_BEST_OF = 64
ANY_OBJECT = {"type": "object"}
THINKING_EFFORTS = ("low", "medium", "high", "xhigh")  # of OpenAI's; none and minimal do not think
HOUSEKEEPING_START = "### Task:"  # Open WebUI's requests for titles, tags and follow-ups


def _whole(value: Any) -> Any:
    """Take 5.0 for 5, as JavaScript may write it."""
    try:
        return value if value is None else parse_int(value)
    except (OverflowError, TypeError) as error:
        raise ValueError("a whole number is expected") from error


Whole = Annotated[int, BeforeValidator(_whole)]
Names = str | list[str]


class Body(BaseModel):
    """A request's body. Unknown fields are ignored: clients send many."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class OwnFields(Body):
    """The fields that are ours, in every API."""

    v2pe_delta: float | str | list[float | str] | None = None
    max_tiles: Whole | None = None
    min_tiles: Whole | None = None
    visual_compression: bool | None = None
    flash_relative_threshold: float | None = None
    flash_absolute_threshold: float | None = None
    best_of: Annotated[Whole, Field(ge=1, le=MAX_BEST_OF)] | None = None
    critic: str | None = None
    think: bool | str | None = None
    think_budget: Whole | None = None
    reasoning_effort: str | None = None
    keep_boxes: bool | None = None
    num_frames: Whole | None = None
    housekeeping: bool | None = None

    def own_options(self) -> dict[str, Any]:
        """Return those that a generation config has."""
        return {
            "v2pe_delta": self.v2pe_delta,
            "max_tiles": self.max_tiles,
            "min_tiles": self.min_tiles,
            "visual_compression": self.visual_compression,
            "flash_relative_threshold": self.flash_relative_threshold,
            "flash_absolute_threshold": self.flash_absolute_threshold,
            "think": self.wants_thinking or None,
            "think_budget": self.think_budget,
            "keep_boxes": self.keep_boxes,
            "num_frames": self.num_frames,
        }

    def own_choices(self) -> dict[str, Any]:
        """Return those that a request has beside its config."""
        return {
            "best_of": self.best_of,
            "critic": self.critic or "",
            "think": self.wants_thinking,
        }

    @property
    def wants_thinking(self) -> bool:
        """Whether a thought is asked for: by ``think``, else by OpenAI's ``reasoning_effort``."""
        if self.think is not None:
            return bool(self.think)
        return self.effort in THINKING_EFFORTS

    @property
    def effort(self) -> str | None:
        return self.reasoning_effort


def refuse_fields(body: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise APIError for a field that would change the answer and is not supported.

    neutral: for each such field the values that change nothing.
    """
    for name, values in neutral.items():
        given = body.get(name)
        if given is not None and not any(given == value for value in values):
            raise unsupported(name)


def make_config(options: Mapping[str, Any]) -> GenerationConfig:
    """Make a config of the options that are given; raises UserError, which names the option."""
    given = {name: value for name, value in options.items() if value is not None}
    return with_overrides(GenerationConfig(), cast("GenerationOptions", given))


def token_limit(limits: ServerLimits, *given: int | None) -> int:
    """Return the least of the limits that are given and the server's."""
    return min([limits.max_tokens, *(count for count in given if count is not None)])


def read_stops(stop: Names | None, name: str = "stop") -> tuple[str, ...]:
    """Return the stop strings; empty ones would end every answer and are dropped."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS or any(len(text) > MAX_STOP_LENGTH for text in stops):
        raise invalid(
            f"{name} has more than {MAX_STOPS} strings or one of more than "
            f"{MAX_STOP_LENGTH} characters; shorten it",
            name,
        )
    return tuple(filter(None, stops))


def read_seed(seed: int | None) -> int | None:
    return None if seed == RANDOM_SEED else seed


def read_schema(schema: Any, name: str) -> Any:
    """Return a JSON schema; the engine compiles it and reports what is wrong in it."""
    if not isinstance(schema, dict):
        raise invalid(f"{name} must be a JSON schema, an object", name)
    return schema


def is_housekeeping(texts: list[str]) -> bool:
    """Recognize the requests that a chat program makes for itself after an answer."""
    return len(texts) == 1 and texts[0].lstrip().startswith(HOUSEKEEPING_START)
