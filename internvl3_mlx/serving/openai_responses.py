"""OpenAI's Responses API: its input, and its events in the order its clients expect."""

import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl3_mlx.serving.answers import AnswerParts, RunningAnswer, boxes_of, images_of
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
    Names,
    OwnFields,
    Whole,
    make_config,
    read_schema,
    read_seed,
    read_stops,
    refuse_fields,
    token_limit,
)
from internvl3_mlx.serving.limits import ServerLimits
from internvl3_mlx.serving.openai_chat import (
    SYSTEM_JOINT,
    SYSTEM_ROLES,
    is_housekeeping_chat,
    read_file_part,
)
from internvl3_mlx.serving.requests import (
    AnswerDone,
    AnswerRequest,
    ChatMessage,
    PromptRead,
    RequestUsage,
    TextPart,
)
from internvl3_mlx.serving.streams import sse
from internvl3_mlx.serving.thinking import ThinkingSplitter, split_thinking

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "n": (1,),
    "top_logprobs": (0,),
}


class ResponsesBody(OwnFields):
    """A request for a response."""

    input: str | list[Any]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Whole | None = None
    stop: Names | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None

    @property
    def effort(self) -> str | None:
        return (self.reasoning or {}).get("effort") or self.reasoning_effort


def read_input_image(part: Mapping[str, Any], where: str) -> MediaSource:
    """Read ``input_image``, whose ``image_url`` is a string with the detail beside it."""
    if part.get("image_url") is None and part.get("file_id") is not None:
        raise unsupported(f"{where}.file_id", "send the image as a data URI in image_url")
    url = read_url(part.get("image_url"), where, "image_url")
    return MediaSource(url, where, max_tiles=tiles_for(part.get("detail"), f"{where}.detail"))


PART_READERS: Mapping[str, PartReader] = {
    "input_text": read_text,
    "output_text": read_text,
    "text": read_text,
    "input_image": read_input_image,
    "input_file": read_file_part,
}


def parse_body(content: Mapping[str, Any]) -> tuple[ResponsesBody, ParsedChat]:
    """Read a request; raise APIError or pydantic's ValidationError for what cannot be served."""
    refuse_fields(content, NEUTRAL)
    body = ResponsesBody.model_validate(content)
    return body, parse_input(body.input, body.instructions)


def parse_input(given: str | Sequence[Any], instructions: str | None) -> ParsedChat:
    """Read the input: a question, or messages. Chains of thought of earlier answers are dropped."""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    system = [] if instructions is None else [instructions]
    messages: list[ParsedMessage] = []
    for where, item in numbered_messages(items, "input"):
        kind, role = item.get("type", "message"), item.get("role")
        if kind == "reasoning":
            continue
        if kind != "message":
            given_kind = kind[:40] if isinstance(kind, str) else "not text"
            raise invalid(f"{where}.type is {given_kind}; only messages are supported", where)
        parts = read_parts(item.get("content"), f"{where}.content", PART_READERS)
        if role == "user" or role == "assistant":
            messages.append(ParsedMessage(role, parts))
        elif role in SYSTEM_ROLES:
            system.append(joined_text(parts, f"{where}.content"))
        else:
            raise invalid(
                f"{where}.role is not known; use system, developer, user or assistant",
                f"{where}.role",
            )
    if not messages:
        raise invalid("input has no user's message; send at least one", "input")
    return ParsedChat(tuple(messages), SYSTEM_JOINT.join(system) if system else None)


def make_request(
    body: ResponsesBody,
    system: str | None,
    messages: tuple[ChatMessage, ...],
    limits: ServerLimits,
) -> AnswerRequest:
    """Make the engine's request."""
    options = {
        **body.own_options(),
        "json_schema": read_format(body.text),
        "system": system,
        "max_tokens": token_limit(limits, body.max_output_tokens),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": read_seed(body.seed),
        "stop": read_stops(body.stop) or None,
    }
    return AnswerRequest(
        messages=messages,
        config=make_config(options),
        **body.own_choices(),
        housekeeping=bool(body.housekeeping) or is_housekeeping_chat(messages),
    )


def read_format(text: Mapping[str, Any] | None) -> Any:
    """Return the JSON schema that ``text.format`` asks for, if any."""
    wanted = (text or {}).get("format") or {}
    kind = wanted.get("type", "text") if isinstance(wanted, dict) else None
    if kind == "json_object":
        return ANY_OBJECT
    if kind == "json_schema":
        return read_schema(wanted.get("schema"), "text.format.schema")
    if kind != "text":
        raise invalid(
            "text.format.type is not known; use text, json_object or json_schema", "text.format"
        )
    return None


@dataclass(eq=False)
class ResponseReply:
    """Formats the answer to one request.

    sequence: the number of the next event. on_end: takes the finished response and its text.
    """

    model: str
    body: ResponsesBody
    on_end: Callable[[Mapping[str, Any], str], None] | None = None
    id: str = field(default_factory=lambda: "resp_" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    sequence: int = 0

    def whole(self, answers: Sequence[AnswerDone], running: RunningAnswer) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        items = Items(self)
        for kind, text in ThinkingSplitter().feed(answers[0].text, last=True):
            items.add(kind, text)
        items.close_all(answers[0])
        return self.finish(answers[0], items, running)

    def finish(self, answer: AnswerDone, items: "Items", running: RunningAnswer) -> dict[str, Any]:
        """Return the finished response, and give it to whoever keeps it."""
        content = self.response(ending_of(answer), items.finished, running)
        if self.on_end is not None:
            self.on_end(content, split_thinking(answer.text)[1])
        return content

    def response(
        self,
        ending: Mapping[str, Any],
        output: Sequence[Mapping[str, Any]] = (),
        running: RunningAnswer | None = None,
    ) -> dict[str, Any]:
        """Return the response object. ending: its status and what belongs to it."""
        body = self.body
        content: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": body.temperature or 0.0,
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        if running is not None:
            content["usage"] = usage_of(running.usage)
            content["timings"] = running.timings() if running.done else None
        return {**content, **ending}

    def event(self, kind: str, **content: Any) -> bytes:
        number, self.sequence = self.sequence, self.sequence + 1
        return sse({"type": kind, "sequence_number": number, **content}, kind)

    async def stream(self, running: RunningAnswer) -> AsyncIterator[bytes]:
        """Yield the events; what fails after the start ends them with ``response.failed``."""
        beginning = self.response({"status": "in_progress"})
        yield self.event("response.created", response=beginning)
        yield self.event("response.in_progress", response=beginning)
        parts, items = AnswerParts(), Items(self)
        try:
            async for event in running.events():
                if isinstance(event, PromptRead):
                    continue
                for kind, text in parts.feed(event):
                    for record in items.add(kind, text):
                        yield record
                if isinstance(event, AnswerDone):
                    for record in items.close_all(event):
                        yield record
                    whole = self.finish(event, items, running)
                    yield self.event(f"response.{whole['status']}", response=whole)
        except Exception as fault:  # noqa: BLE001  the client must learn that the answer broke off
            running.note.fault = type(fault).__name__
            error = {"code": "server_error", "message": as_api_error(fault).message}
            failed = self.response({"status": "failed", "error": error}, items.finished)
            yield self.event("response.failed", response=failed)


@dataclass(eq=False)
class Items:
    """The output items of a response as they grow: a chain of thought, then a message."""

    reply: ResponseReply
    finished: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    kind: str = ""
    id: str = ""
    text: str = ""

    def add(self, kind: str, text: str) -> list[bytes]:
        """Append text; return the events that this makes."""
        events = [] if kind == self.kind else [*self.close(), *self.open(kind)]
        self.text += text
        name = "output_text" if kind == "answer" else "reasoning_text"
        extra: dict[str, Any] = {"logprobs": []} if kind == "answer" else {}
        delta = self.reply.event(f"response.{name}.delta", **self.place(), delta=text, **extra)
        return [*events, delta]

    def open(self, kind: str) -> list[bytes]:
        self.kind, self.text = kind, ""
        self.id = ("msg_" if kind == "answer" else "rs_") + secrets.token_hex(12)
        item = self.item("in_progress", [])
        at = {"output_index": len(self.finished)}
        added = self.reply.event("response.output_item.added", **at, item=item)
        part = self.reply.event("response.content_part.added", **self.place(), part=self.part())
        return [added, part]

    def close(self) -> list[bytes]:
        """End the item that is open, if one is."""
        if not self.kind:
            return []
        event, place, at = self.reply.event, self.place(), {"output_index": len(self.finished)}
        name = "output_text" if self.kind == "answer" else "reasoning_text"
        extra: dict[str, Any] = {"logprobs": []} if self.kind == "answer" else {}
        item = self.item("completed", [self.part()])
        events = [
            event(f"response.{name}.done", **place, text=self.text, **extra),
            event("response.content_part.done", **place, part=self.part()),
            event("response.output_item.done", **at, item=item),
        ]
        self.finished.append(item)
        self.kind = ""
        return events

    def close_all(self, answer: AnswerDone) -> list[bytes]:
        """End the message, and begin one first where the answer is empty."""
        events = [] if self.kind == "answer" else [*self.close(), *self.open("answer")]
        events += self.close()
        if boxes := boxes_of(answer):
            self.finished[-1]["boxes"] = boxes
        return events

    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": len(self.finished), "content_index": 0}

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        if self.kind == "answer":
            message = {"type": "message", "role": "assistant"}
            return {"id": self.id, **message, "status": status, "content": content}
        return {"id": self.id, "type": "reasoning", "summary": [], "content": content}

    def part(self) -> dict[str, Any]:
        if self.kind == "answer":
            return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": self.text}


def ending_of(answer: AnswerDone) -> dict[str, Any]:
    if answer.finish_reason == "stop":
        return {"status": "completed"}
    return {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}


def usage_of(usage: RequestUsage) -> dict[str, Any]:
    """Return the API's usage, with tiles and tokens of every image."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
        "images": images_of(usage),
    }


def answer_message(text: str) -> ChatMessage:
    """Return an answer as a message of the conversation that goes on."""
    return ChatMessage("assistant", (TextPart(text),))
