"""Errors as HTTP answers: the status, and the body in the shape of the API that was called."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

from pydantic import ValidationError

from internvl3_mlx.errors import InternVL3Error, UserError
from internvl3_mlx.serving.requests import (
    ContextTooLong,
    InvalidRequest,
    QueueFull,
    Rejected,
    UnknownModel,
)

SHOULD_BE = "Input should be "  # how pydantic begins most of its reasons
SCALARS = ("str", "int", "float", "bool")
Dialect = Literal["openai", "anthropic", "ollama"]

BAD_REQUEST, UNAUTHORIZED, FORBIDDEN, NOT_FOUND = 400, 401, 403, 404
TIMED_OUT, TOO_LARGE, FAILED, UNAVAILABLE = 408, 413, 500, 503

OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(eq=False)
class APIError(Exception):
    """An error that is sent to a client.

    parameter: the field that is to blame, if one is. unread: the request's body was not read to
    its end, so the connection cannot be used again.
    """

    status: int
    message: str
    parameter: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    unread: bool = False

    def __str__(self) -> str:
        return self.message

    def body(self, dialect: Dialect) -> dict[str, Any]:
        """Return the JSON body in the shape of an API."""
        if dialect == "ollama":
            return {"error": self.message}
        if dialect == "anthropic":
            default = "api_error" if self.status >= FAILED else "invalid_request_error"
            kind = ANTHROPIC_TYPES.get(self.status, default)
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        default = "server_error" if self.status >= FAILED else "invalid_request_error"
        kind = OPENAI_TYPES.get(self.status, default)
        about = {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}
        return {"error": about}


def invalid(message: str, parameter: str | None = None) -> APIError:
    """Make the error for a request that cannot be served as it is."""
    return APIError(BAD_REQUEST, message, parameter)


def unsupported(name: str, advice: str = "leave it out") -> APIError:
    """Make the error for a field that would change the answer and is not supported."""
    return APIError(
        BAD_REQUEST, f"{name} is not supported; {advice}", name, "unsupported_parameter"
    )


def dialect_of(path: str) -> Dialect:
    """Tell which API a path belongs to."""
    if path.startswith("/api/"):
        return "ollama"
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def as_api_error(error: BaseException) -> APIError:
    """Say any exception as an ``APIError``; what nobody foresaw gets no details."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, Rejected):
        return _rejected(error)
    if isinstance(error, ValidationError):
        return _invalid_field(error)
    if isinstance(error, UserError):  # an image, an option, or a missing extra
        return APIError(BAD_REQUEST, str(error))
    if isinstance(error, InternVL3Error):
        return APIError(FAILED, str(error))
    return APIError(FAILED, "an internal error; the server's log names it")


def _rejected(error: Rejected) -> APIError:
    made = APIError(error.status, str(error))
    if isinstance(error, InvalidRequest):
        made.parameter = error.parameter
    if isinstance(error, ContextTooLong):
        made.code = "context_length_exceeded"
    if isinstance(error, UnknownModel):
        made.parameter, made.code = error.parameter, "model_not_found"
    if isinstance(error, QueueFull):
        made.headers = {"Retry-After": str(error.retry_after_s)}
    return made


def _invalid_field(error: ValidationError) -> APIError:
    """Describe the first field that does not have its type."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    path = _field_path(found[0]["loc"])
    where = ""
    for step in path:
        where += f"[{step}]" if isinstance(step, int) else f".{step}" if where else str(step)
    if found[0]["type"] == "missing":
        return invalid(f"{where} is missing", where)
    reasons = dict.fromkeys(each["msg"] for each in found if _field_path(each["loc"]) == path)
    first, *others = reasons
    others = [text.removeprefix(SHOULD_BE) for text in others if text.startswith(SHOULD_BE)]
    reason = " or ".join((first[:1].lower() + first[1:], *others))
    return invalid(f"{where or 'the body'} is not valid: {reason}", where or None)


def _field_path(steps: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Leave out what tells the types of a union apart, such as ``stop.str``, ``stop.list[str]``."""
    return tuple(takewhile(lambda step: not (step in SCALARS or "[" in str(step)), steps))
