"""OpenAI's chat completions: what its clients send, and what they accept back."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from internvl3_mlx.serving.answers import (
    AnswerParts,
    RunningAnswer,
    boxes_of,
    images_of,
)
from internvl3_mlx.serving.content import (
    MediaSource,
    ParsedChat,
    ParsedMessage,
    PartReader,
    joined_text,
    numbered_messages,
    read_parts,
    read_text,
    read_url,
    tiles_for,
)
from internvl3_mlx.serving.errors import as_api_error, invalid, unsupported
from internvl3_mlx.serving.fields import (
    ANY_OBJECT,
    MAX_TOP_LOGPROBS,
    Body,
    Names,
    OwnFields,
    Whole,
    is_housekeeping,
    make_config,
    read_schema,
    read_seed,
    read_stops,
    refuse_fields,
    token_limit,
)
from internvl3_mlx.serving.limits import ServerLimits
from internvl3_mlx.serving.requests import (
    AnswerDone,
    AnswerRequest,
    ChatMessage,
    PromptRead,
    RequestUsage,
    TextDelta,
    TextPart,
    TokenLogprob,
)
from internvl3_mlx.serving.streams import DONE, sse
from internvl3_mlx.serving.thinking import split_thinking

SYSTEM_ROLES = ("system", "developer")
SYSTEM_JOINT = "\n\n"
LEAST_LOGPROB = -9999.0  # OpenAI's number for a token that is out of the question: JSON has no -inf
# Fields that would change the answer, with the values that do not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "audio": (),
    "web_search_options": (),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "typical_p": (1,),
    "mirostat": (0,),
    "echo": (False,),
    "suffix": ("",),
    "chat_template": (),
    "grammar": ("",),
    "guided_grammar": (),
}


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatBody(OwnFields):
    """A request for chat completions, with the extras that vLLM and llama.cpp take."""

    messages: list[Any]
    model: str | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Whole | None = None
    stop: Names | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    continue_final_message: bool | None = None
    user: str | None = None

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def read_image_part(part: Mapping[str, Any], where: str) -> MediaSource:
    """Read ``image_url``, an object with a URL and a detail, or a URL alone."""
    value = part.get("image_url")
    detail = value.get("detail") if isinstance(value, dict) else part.get("detail")
    url = read_url(value, where, "image_url")
    return MediaSource(url, where, max_tiles=tiles_for(detail, f"{where}.detail"))


def read_video_part(part: Mapping[str, Any], where: str) -> MediaSource:
    return MediaSource(read_url(part.get("video_url"), where, "video_url"), where, "video")


def read_file_part(part: Mapping[str, Any], where: str) -> MediaSource:
    """Read a PDF that is sent along as ``file_data``; files stored elsewhere are unknown here."""
    value = part.get("file", part)
    data = value.get("file_data") if isinstance(value, dict) else None
    if not isinstance(data, str) or not data:
        raise invalid(f"{where} has no file_data; send the PDF as a data URI in it", where)
    return MediaSource(data, where, is_base64=not data.startswith("data:"))


PART_READERS: Mapping[str, PartReader] = {
    "text": read_text,
    "image_url": read_image_part,
    "video_url": read_video_part,
    "file": read_file_part,
}


def parse_messages(messages: Sequence[Any], readers: Mapping[str, PartReader]) -> ParsedChat:
    """Read the messages. Those of the system are joined, wherever they are."""
    parsed: list[ParsedMessage] = []
    system: list[str] = []
    for where, message in numbered_messages(messages):
        role = message.get("role")
        if message.get("tool_calls"):
            raise unsupported(f"{where}.tool_calls")
        parts = read_parts(message.get("content"), f"{where}.content", readers)
        if role == "user" or role == "assistant":
            parsed.append(ParsedMessage(role, parts))
        elif role in SYSTEM_ROLES:
            system.append(joined_text(parts, f"{where}.content"))
        else:
            given = role if isinstance(role, str) else "missing"
            raise invalid(
                f"{where}.role is {given[:40]}; use system, developer, user or assistant",
                f"{where}.role",
            )
    if not parsed:
        raise invalid("messages has no user's message; send at least one", "messages")
    return ParsedChat(tuple(parsed), SYSTEM_JOINT.join(system) if system else None)


def parse_body(content: Mapping[str, Any]) -> tuple[ChatBody, ParsedChat]:
    """Read a request; raise APIError or pydantic's ValidationError for what cannot be served."""
    refuse_fields(content, NEUTRAL)
    body = ChatBody.model_validate(content)
    return body, parse_messages(body.messages, PART_READERS)


def make_request(
    body: ChatBody,
    system: str | None,
    messages: tuple[ChatMessage, ...],
    limits: ServerLimits,
) -> AnswerRequest:
    """Make the engine's request."""
    options = {
        **body.own_options(),
        **read_constraint(body),
        "system": system,
        "max_tokens": token_limit(limits, body.max_tokens, body.max_completion_tokens),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "seed": read_seed(body.seed),
        "stop": read_stops(body.stop) or None,
    }
    return AnswerRequest(
        messages=messages,
        config=make_config(options),
        n=body.n or 1,
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
        continue_final_message=bool(body.continue_final_message),
        **body.own_choices(),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=read_logit_bias(body.logit_bias),
        housekeeping=bool(body.housekeeping) or is_housekeeping_chat(messages),
    )


def is_housekeeping_chat(messages: Sequence[ChatMessage]) -> bool:
    only_text = all(isinstance(part, TextPart) for m in messages for part in m.parts)
    return only_text and is_housekeeping([message.text for message in messages])


def read_constraint(body: ChatBody) -> dict[str, Any]:
    """Return the constraint of ``response_format`` or of vLLM's fields."""
    given = {
        "json_schema": body.guided_json,
        "regex": body.guided_regex,
        "choice": tuple(body.guided_choice) if body.guided_choice else None,
    }
    wanted = body.response_format or {}
    kind = wanted.get("type", "text")
    if kind == "json_object":
        given["json_schema"] = ANY_OBJECT
    elif kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        given["json_schema"] = read_schema(schema, "response_format.json_schema.schema")
    elif kind != "text":
        raise invalid(
            "response_format.type is not known; use text, json_object or json_schema",
            "response_format",
        )
    return given


def read_logit_bias(bias: Mapping[str, float] | None) -> dict[int, float]:
    """Return the biases by token id."""
    try:
        return {int(token): value for token, value in (bias or {}).items()}
    except ValueError:
        raise invalid("logit_bias must have token ids as its keys", "logit_bias") from None


@dataclass(frozen=True)
class ChatReply:
    """Formats the answer to one request."""

    model: str
    fingerprint: str
    body: ChatBody
    id: str = field(default_factory=lambda: "chatcmpl-" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[AnswerDone], running: RunningAnswer) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        return {
            **self.head("chat.completion"),
            "choices": [self.choice(number, one) for number, one in enumerate(answers)],
            "usage": usage_of(running.usage),
            "timings": running.timings(),
        }

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def choice(self, number: int, answer: AnswerDone) -> dict[str, Any]:
        thinking, text = split_thinking(answer.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thinking:
            message["reasoning_content"] = thinking
        return {
            "index": number,
            "message": message,
            "logprobs": logprobs_of(answer.logprobs) if self.body.logprobs else None,
            **ending_of(answer),
        }

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        content = {**self.head("chat.completion.chunk"), "choices": choices}
        if self.body.includes_usage:
            content["usage"] = None
        return sse({**content, **more})

    async def stream(self, running: RunningAnswer) -> AsyncIterator[bytes]:
        """Yield the chunks; a failure after the start becomes an error event."""
        parts = AnswerParts()
        for index in range(self.body.n or 1):
            yield self.chunk([delta_choice(index, {"role": "assistant", "content": ""})])
        try:
            async for event in running.events():
                if not isinstance(event, PromptRead):
                    for choice in self.event_choices(event, parts):
                        yield self.chunk([choice])
        except Exception as fault:  # noqa: BLE001  the client must learn that the answer broke off
            error = as_api_error(fault)
            running.note.fault = type(fault).__name__
            yield sse(error.body("openai"))
            return
        if self.body.includes_usage:
            usage = usage_of(running.usage)
            yield self.chunk([], usage=usage, timings=running.timings())
        yield DONE

    def event_choices(
        self, event: TextDelta | AnswerDone, parts: AnswerParts
    ) -> list[dict[str, Any]]:
        """Return the choices that an event makes, one for each chunk."""
        names = {"thinking": "reasoning_content", "answer": "content"}
        found = [delta_choice(event.index, {names[kind]: t}) for kind, t in parts.feed(event)]
        if isinstance(event, AnswerDone):
            return [*found, {**delta_choice(event.index, {}), **ending_of(event)}]
        if self.body.logprobs and event.logprobs:
            found = found or [delta_choice(event.index, {"content": ""})]
            found[-1]["logprobs"] = logprobs_of(event.logprobs)
        return found


def delta_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def ending_of(answer: AnswerDone) -> dict[str, Any]:
    """Return what the end of an answer says: why, and in our extra fields its boxes and score."""
    ending: dict[str, Any] = {"finish_reason": answer.finish_reason}
    if boxes := boxes_of(answer):
        ending["boxes"] = boxes
    if answer.score is not None:
        ending["score"] = max(answer.score, LEAST_LOGPROB)
    return ending


def usage_of(usage: RequestUsage) -> dict[str, Any]:
    """Return OpenAI's usage, with tiles and tokens of every image."""
    image_tokens = sum(image.tokens for image in usage.images)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": image_tokens,
        },
        "images": images_of(usage),
    }


def logprobs_of(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": [_logprob(token, True) for token in tokens], "refusal": None}


def _logprob(token: TokenLogprob, with_top: bool) -> dict[str, Any]:
    content: dict[str, Any] = {
        "token": token.text,
        "logprob": max(token.logprob, LEAST_LOGPROB),
        "bytes": list(token.token),
    }
    if with_top:
        content["top_logprobs"] = [_logprob(one, False) for one in token.top]
    return content
