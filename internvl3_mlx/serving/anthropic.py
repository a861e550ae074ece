"""Anthropic's messages API."""

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from internvl3_mlx.serving.answers import AnswerParts, RunningAnswer, images_of
from internvl3_mlx.serving.content import (
    MediaSource,
    ParsedChat,
    ParsedMessage,
    PartReader,
    joined_text,
    numbered_messages,
    read_parts,
    read_text,
    text_of,
)
from internvl3_mlx.serving.errors import as_api_error, invalid
from internvl3_mlx.serving.fields import (
    OwnFields,
    Whole,
    make_config,
    read_schema,
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
)
from internvl3_mlx.serving.streams import sse
from internvl3_mlx.serving.thinking import ThinkingSplitter

StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "mcp_servers": ([],),
    "container": (),
    "n": (1,),
}


class CountBody(OwnFields):
    """What a prompt is made of."""

    messages: list[Any]
    model: str | None = None
    system: str | list[Any] | None = None
    thinking: dict[str, Any] | None = None

    @property
    def wants_thinking(self) -> bool:
        kind = (self.thinking or {}).get("type")
        return bool(self.think) or kind in ("enabled", "adaptive")

    def own_options(self) -> dict[str, Any]:
        """Return them with the budget of ``thinking`` as the budget of the thought."""
        options, budget = super().own_options(), (self.thinking or {}).get("budget_tokens")
        if budget is not None and (type(budget) is not int or budget < 1):
            raise invalid(
                f"thinking.budget_tokens is {str(budget)[:40]}; give a whole number of tokens",
                "thinking.budget_tokens",
            )
        if self.wants_thinking and options["think_budget"] is None:
            options["think_budget"] = budget
        return options


class MessagesBody(CountBody):
    """A request for a message."""

    max_tokens: Whole
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    seed: Whole | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


def read_source(part: Mapping[str, Any], where: str) -> MediaSource:
    """Read an image or a PDF from its source: base64 or a URL."""
    source = part.get("source")
    if not isinstance(source, dict):
        raise invalid(f"{where}.source must be an object with a type", f"{where}.source")
    kind, at = source.get("type"), f"{where}.source"
    if kind == "base64":
        return MediaSource(text_of(source, at, "data"), where, is_base64=True)
    if kind == "url":
        return MediaSource(text_of(source, at, "url"), where)
    raise invalid(f"{at}.type is not supported; use base64 or url", f"{at}.type")


PART_READERS: Mapping[str, PartReader] = {
    "text": read_text,
    "image": read_source,
    "document": read_source,
}


def parse_messages(messages: Sequence[Any], system: Any) -> ParsedChat:
    """Read the messages. Chains of thought of earlier answers are dropped."""
    parsed: list[ParsedMessage] = []
    for where, message in numbered_messages(messages):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):
            content = [block for block in content if not is_thinking(block)]
        if role != "user" and role != "assistant":
            raise invalid(f"{where}.role must be user or assistant", f"{where}.role")
        parsed.append(ParsedMessage(role, read_parts(content, f"{where}.content", PART_READERS)))
    if not parsed:
        raise invalid("messages is empty; send at least one", "messages")
    if system is None:
        return ParsedChat(tuple(parsed))
    parts = read_parts(system, "system", {"text": read_text})
    return ParsedChat(tuple(parsed), joined_text(parts, "system"))


def is_thinking(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") in ("thinking", "redacted_thinking")


def parse_count_body(content: Mapping[str, Any]) -> tuple[CountBody, ParsedChat]:
    """Read a request for the number of tokens."""
    body = CountBody.model_validate(content)
    return body, parse_messages(body.messages, body.system)


def parse_body(content: Mapping[str, Any]) -> tuple[MessagesBody, ParsedChat]:
    """Read a request; raise APIError or pydantic's ValidationError for what cannot be served."""
    refuse_fields(content, NEUTRAL)
    body = MessagesBody.model_validate(content)
    return body, parse_messages(body.messages, body.system)


def make_count_request(
    body: CountBody, system: str | None, messages: tuple[ChatMessage, ...]
) -> AnswerRequest:
    """Make the request whose prompt is counted."""
    return AnswerRequest(
        messages=messages,
        config=make_config({**body.own_options(), "system": system}),
        continue_final_message=messages[-1].role == "assistant",
        think=body.wants_thinking,
    )


def make_request(
    body: MessagesBody,
    system: str | None,
    messages: tuple[ChatMessage, ...],
    limits: ServerLimits,
) -> AnswerRequest:
    """Make the engine's request; the answer continues a last message of the assistant."""
    wanted = body.output_format or (body.output_config or {}).get("format")
    options = {
        **body.own_options(),
        "system": system,
        "max_tokens": token_limit(limits, body.max_tokens),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "stop": read_stops(body.stop_sequences, "stop_sequences") or None,
    }
    if wanted:
        schema = wanted.get("schema") if isinstance(wanted, dict) else None
        options["json_schema"] = read_schema(schema, "output_format.schema")
    return AnswerRequest(
        messages=messages,
        config=make_config(options),
        continue_final_message=messages[-1].role == "assistant",
        **body.own_choices(),
        housekeeping=bool(body.housekeeping),
    )


@dataclass(frozen=True)
class MessageReply:
    """Formats the answer to one request."""

    model: str
    id: str = field(default_factory=lambda: "msg_" + secrets.token_hex(12))

    def message(self, content: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        return {**head, "content": content, **more}

    def whole(self, answers: Sequence[AnswerDone], running: RunningAnswer) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        blocks: list[dict[str, Any]] = []
        for kind, text in ThinkingSplitter().feed(answers[0].text, last=True):
            blocks.append(thinking_block(text) if kind == "thinking" else text_block(text))
        usage = {**input_usage(running.usage), "output_tokens": running.usage.completion_tokens}
        return self.message(
            blocks, **ending_of(answers[0]), usage={**usage, "images": images_of(running.usage)}
        )

    async def stream(self, running: RunningAnswer) -> AsyncIterator[bytes]:
        """Yield the events; what fails after the start ends them with an error event."""
        parts, blocks = AnswerParts(), Blocks()
        try:
            async for event in running.events():
                if isinstance(event, PromptRead):
                    usage = {**input_usage(event.usage), "output_tokens": 0}
                    ending = {"stop_reason": None, "stop_sequence": None}
                    message = self.message([], **ending, usage=usage)
                    yield record("message_start", message=message)
                    yield record("ping")
                    continue
                for kind, text in parts.feed(event):
                    for made in blocks.add(kind, text):
                        yield made
                if isinstance(event, AnswerDone):
                    for made in blocks.close():
                        yield made
                    tokens = running.usage.completion_tokens
                    usage = {**input_usage(running.usage), "output_tokens": tokens}
                    yield record("message_delta", delta=ending_of(event), usage=usage)
                    yield record("message_stop")
        except Exception as fault:  # noqa: BLE001  the client must learn that the answer broke off
            running.note.fault = type(fault).__name__
            yield sse(as_api_error(fault).body("anthropic"), "error")


@dataclass(eq=False)
class Blocks:
    """The content blocks of a streamed message: a chain of thought, then text."""

    index: int = -1
    kind: str = ""

    def add(self, kind: str, text: str) -> list[bytes]:
        """Append text; return the events that this makes."""
        events = [] if kind == self.kind else [*self.close(), self.open(kind)]
        name = "text" if kind == "answer" else "thinking"
        delta = {"type": f"{name}_delta", name: text}
        return [*events, record("content_block_delta", index=self.index, delta=delta)]

    def open(self, kind: str) -> bytes:
        self.kind, self.index = kind, self.index + 1
        block = text_block("") if kind == "answer" else thinking_block("")
        return record("content_block_start", index=self.index, content_block=block)

    def close(self) -> list[bytes]:
        if not self.kind:
            return []
        self.kind = ""
        return [record("content_block_stop", index=self.index)]


def record(kind: str, **content: Any) -> bytes:
    return sse({"type": kind, **content}, kind)


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def thinking_block(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def ending_of(answer: AnswerDone) -> dict[str, Any]:
    reason: StopReason = "end_turn" if answer.finish_reason == "stop" else "max_tokens"
    if answer.stop_string is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": answer.stop_string}


def input_usage(usage: RequestUsage) -> dict[str, Any]:
    """Return the prompt's tokens: those that were read, and those from the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
    }
