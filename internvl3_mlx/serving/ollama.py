"""Ollama's API: what VS Code, Open WebUI and small programs ask of a local server."""

import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from internvl3_mlx.serving.answers import AnswerParts, RunningAnswer
from internvl3_mlx.serving.content import (
    MediaSource,
    ParsedChat,
    ParsedMessage,
    Part,
    TextPart,
    joined_text,
    numbered_messages,
)
from internvl3_mlx.serving.errors import as_api_error, invalid, unsupported
from internvl3_mlx.serving.fields import (
    ANY_OBJECT,
    Body,
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
from internvl3_mlx.serving.openai_chat import SYSTEM_JOINT, is_housekeeping_chat
from internvl3_mlx.serving.requests import AnswerDone, AnswerRequest, ChatMessage, PromptRead
from internvl3_mlx.serving.status import ModelStatus
from internvl3_mlx.serving.streams import ndjson
from internvl3_mlx.serving.thinking import split_thinking

API_VERSION = "0.12.0"  # VS Code refuses servers older than 0.6.4
NS = 1_000_000_000
LATEST = ":latest"
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "template": ("",),
    "suffix": ("",),
    "raw": (False,),
    "context": ([],),
    "logprobs": (False,),
}
NEUTRAL_OPTIONS: Mapping[str, tuple[Any, ...]] = {"mirostat": (0,), "typical_p": (1,)}


class Options(Body):
    """The options of a model; those of the machine, such as num_ctx and num_gpu, are ignored."""

    num_predict: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    seed: Whole | None = None
    stop: Names | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class OllamaBody(OwnFields):
    """A request for a chat's next message, or for the continuation of a prompt."""

    model: str = ""
    messages: list[Any] | None = None
    prompt: str | None = None
    system: str | None = None
    images: list[Any] | None = None
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: str | float | None = None

    @property
    def streams(self) -> bool:
        return self.stream is not False


def parse_body(content: Mapping[str, Any]) -> tuple[OllamaBody, ParsedChat | None]:
    """Read a request; None instead of a chat where there is no question: that loads the model."""
    refuse_fields(content, NEUTRAL)
    if isinstance(options := content.get("options"), dict):
        refuse_fields(options, NEUTRAL_OPTIONS)
    body = OllamaBody.model_validate(content)
    if body.messages:
        return body, parse_messages(body.messages)
    if body.prompt or body.images:
        images = read_images(body.images, "images")
        parts: tuple[Part, ...] = (*images, TextPart(body.prompt or ""))
        return body, ParsedChat((ParsedMessage("user", parts),), body.system)
    return body, None


def parse_messages(messages: Sequence[Any]) -> ParsedChat:
    parsed: list[ParsedMessage] = []
    system: list[str] = []
    for where, message in numbered_messages(messages):
        role, content = message.get("role"), message.get("content")
        if message.get("tool_calls"):
            raise unsupported(f"{where}.tool_calls")
        if content is not None and not isinstance(content, str):
            raise invalid(f"{where}.content must be text", f"{where}.content")
        images = read_images(message.get("images"), f"{where}.images")
        parts: tuple[Part, ...] = (*images, TextPart(content or ""))
        if role == "user" or role == "assistant":
            parsed.append(ParsedMessage(role, parts))
        elif role == "system":
            system.append(joined_text(parts, where))
        else:
            raise invalid(f"{where}.role must be system, user or assistant", f"{where}.role")
    if not parsed:
        raise invalid("messages has no user's message; send at least one", "messages")
    return ParsedChat(tuple(parsed), SYSTEM_JOINT.join(system) if system else None)


def read_images(images: Any, where: str) -> list[MediaSource]:
    """Read images as base64."""
    if images is None:
        return []
    if not isinstance(images, list) or not all(isinstance(one, str) and one for one in images):
        raise invalid(f"{where} must be a list of images as base64", where)
    return [MediaSource(one, f"{where}[{n}]", is_base64=True) for n, one in enumerate(images)]


def make_request(
    body: OllamaBody,
    system: str | None,
    messages: tuple[ChatMessage, ...],
    limits: ServerLimits,
) -> AnswerRequest:
    """Make the engine's request; the answer continues a last message of the assistant."""
    given = body.options or Options()
    wanted = given.num_predict if given.num_predict and given.num_predict > 0 else None
    options = {
        **body.own_options(),
        "json_schema": read_format(body.format),
        "system": system,
        "max_tokens": token_limit(limits, wanted),
        "temperature": given.temperature,
        "top_p": given.top_p,
        "top_k": given.top_k,
        "min_p": given.min_p,
        "repetition_penalty": given.repeat_penalty,
        "seed": read_seed(given.seed),
        "stop": read_stops(given.stop) or None,
    }
    return AnswerRequest(
        messages=messages,
        config=make_config(options),
        continue_final_message=messages[-1].role == "assistant",
        **body.own_choices(),
        frequency_penalty=given.frequency_penalty or 0.0,
        presence_penalty=given.presence_penalty or 0.0,
        housekeeping=bool(body.housekeeping) or is_housekeeping_chat(messages),
    )


def read_format(value: str | Mapping[str, Any] | None) -> Any:
    """Return the JSON schema that ``format`` asks for: "json" or a schema."""
    if value is None or value == "":
        return None
    if value == "json":
        return ANY_OBJECT
    return read_schema(value, "format")


@dataclass(frozen=True)
class OllamaReply:
    """Formats the answer to one request. generates: as /api/generate, not as /api/chat."""

    model: str
    generates: bool

    def piece(self, text: str, thinking: str = "", **more: Any) -> dict[str, Any]:
        content: dict[str, Any] = {"model": self.model, "created_at": timestamp(time.time())}
        thought = {"thinking": thinking} if thinking else {}
        if self.generates:
            content |= {"response": text, **thought}
        else:
            content["message"] = {"role": "assistant", "content": text, **thought}
        return {**content, "done": False, **more}

    def whole(self, answers: Sequence[AnswerDone], running: RunningAnswer) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        thinking, text = split_thinking(answers[0].text)
        return self.piece(text, thinking, **ending_of(answers[0], running))

    def loaded(self, reason: str) -> dict[str, Any]:
        """Return the answer to a request without a question. reason: load or unload."""
        return self.piece("", done=True, done_reason=reason)

    async def stream(self, running: RunningAnswer) -> AsyncIterator[bytes]:
        """Yield a line for each piece; a failure after the start is in the last one."""
        parts = AnswerParts()
        try:
            async for event in running.events():
                if isinstance(event, PromptRead):
                    continue
                for kind, text in parts.feed(event):
                    thought = kind == "thinking"
                    yield ndjson(self.piece("" if thought else text, text if thought else ""))
                if isinstance(event, AnswerDone):
                    yield ndjson(self.piece("", **ending_of(event, running)))
        except Exception as fault:  # noqa: BLE001  the client must learn that the answer broke off
            running.note.fault = type(fault).__name__
            yield ndjson(as_api_error(fault).body("ollama"))


def ending_of(answer: AnswerDone, running: RunningAnswer) -> dict[str, Any]:
    """Return the last line's counts, and times in nanoseconds."""
    usage, timing = running.usage, answer.timing
    total = timing.queue_s + timing.preprocess_s + timing.prefill_s + timing.decode_s
    return {
        "done": True,
        "done_reason": answer.finish_reason,
        "total_duration": int(total * NS),
        "load_duration": int(timing.load_s * NS),
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": int(timing.prefill_s * NS),
        "eval_count": usage.completion_tokens,
        "eval_duration": int(timing.decode_s * NS),
    }


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def describe_model(model: ModelStatus) -> dict[str, Any]:
    """Return a model as /api/tags lists it."""
    digest = hashlib.sha256(model.name.encode()).hexdigest()
    name = model.name if ":" in model.name else model.name + LATEST
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(model.created),
        "size": model.nbytes,
        "digest": digest,
        "details": model_details(model),
    }


def describe_running(model: ModelStatus) -> dict[str, Any]:
    """Return a loaded model as /api/ps lists it."""
    never = model.created + 10**9
    return {
        **describe_model(model),
        "expires_at": timestamp(never if model.expires_at is None else model.expires_at),
        "size_vram": model.nbytes,
        "context_length": model.context_length,
    }


def show_model(model: ModelStatus) -> dict[str, Any]:
    """Return what /api/show says about a model."""
    return {
        "capabilities": ["completion", "vision"],
        "details": model_details(model),
        "model_info": {
            "general.architecture": "internvl",
            "general.basename": model.name,
            "general.parameter_count": model.parameters,
            "internvl.context_length": model.context_length,
        },
        "modified_at": timestamp(model.created),
        "template": "{{ .Prompt }}",
        "parameters": "",
        "license": "",
    }


def model_details(model: ModelStatus) -> dict[str, Any]:
    billions = model.parameters / 1e9
    size = f"{billions:.1f}B" if billions >= 1 else f"{model.parameters / 1e6:.0f}M"
    return {
        "parent_model": "",
        "format": "mlx",
        "family": "internvl",
        "families": ["internvl"],
        "parameter_size": size,
        "quantization_level": f"{model.bits}-bit" if model.bits else "16-bit",
    }
