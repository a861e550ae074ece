"""A repository's own Jinja chat template, rendered so that user text cannot pass for markup."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from internvl3_mlx.errors import CheckpointError, PromptError
from internvl3_mlx.json_files import read_optional_json
from internvl3_mlx.prompt.messages import (
    ImageSegment,
    Message,
    Segment,
    TextSegment,
    check_messages,
    merge_segments,
    message_segments,
)
from internvl3_mlx.prompt.tokenizer_files import read_optional_text, token_text

if TYPE_CHECKING:
    import jinja2

# Texts pass through the template as numbers between two private-use characters.
TEXT_SENTINEL = "\ue000{}\ue001"
SENTINEL_PATTERN = re.compile(
    "\ue000(?P<text>[0-9]+)\ue001"
    r"|(?:<img>|<\|vision_start\|>)?"
    r"(?:<IMG_CONTEXT>|<image>|<\|image(?:_pad)?\|>)"
    r"(?:</img>|<\|vision_end\|>)?"
)
# The variable by which a template that we write leaves out its own system turn.
NO_DEFAULT_SYSTEM = "add_default_system"
BUILT_IN_HINT = 'put "template": "internvl2_5" into config.json to use the built-in template'


@dataclass(frozen=True)
class JinjaTemplate:
    """A compiled chat template; ``origin`` is the file it came from, ``source`` its text."""

    compiled: "jinja2.Template"
    origin: str
    source: str
    system_message: str | None
    variables: dict[str, Any]

    def render(self, messages: Sequence[Message], system: str | None) -> list[Segment]:
        """Render the prompt. system: None for the repository's own prompt, "" for no system turn.

        Its own prompt has a system turn only where the template writes one or config.json has a
        system_message. Raises PromptError where the template fails.
        """
        check_messages(messages)
        instruction = (
            TextSegment(self.system_message or "")
            if system is None
            else TextSegment(system, untrusted=True)
        )
        without = {NO_DEFAULT_SYSTEM: False} if system == "" else {}
        told: list[tuple[str, list[Segment]]] = []
        if instruction.text:
            told.append(("system", [instruction]))
        told += [(turn.role, message_segments(turn)) for turn in messages]
        given = [segment for _, body in told for segment in body]
        problem: Exception | None = None
        for plain in (False, True):  # some templates read lists, some only plain strings
            try:
                rendered = self._write(_template_messages(told, plain), without)
                segments = _substitute(rendered, given)
            except _template_failures() as error:
                problem = problem or error
                continue
            if segments is not None:
                return segments
        fault = " ".join(str(problem or "it omits a message or an image").split())
        raise PromptError(
            f"{self.origin} cannot render this conversation: {fault}; {BUILT_IN_HINT}"
        )

    def _write(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        environment: Any = self.compiled.environment
        environment.start()
        return self.compiled.render(
            messages=messages, add_generation_prompt=True, **self.variables, **options
        )


def read_jinja(folder: Path, system_message: str | None) -> JinjaTemplate | None:
    """Read the repository's chat template, or return None when it has none for images.

    Original repositories inherit a text-only template from their language model, which their own
    code never uses: one that does not mention images is ignored.
    """
    config = read_optional_json(folder / "tokenizer_config.json")
    for origin, source in (
        ("chat_template.jinja", read_optional_text(folder / "chat_template.jinja")),
        (
            "chat_template.json",
            read_optional_json(folder / "chat_template.json").get("chat_template"),
        ),
        ("tokenizer_config.json", _default_template(config.get("chat_template"))),
    ):
        if isinstance(source, str) and "image" in source.lower():
            names = ("bos_token", "eos_token", "pad_token", "unk_token")
            variables: dict[str, Any] = {name: token_text(config.get(name)) or "" for name in names}
            compiled = _compile(source, origin)
            return JinjaTemplate(compiled, origin, source, system_message, variables)
    return None


def _default_template(entry: Any) -> Any:
    """Take the template named "default" where the file lists several."""
    if isinstance(entry, list):
        named = (item for item in entry if isinstance(item, dict))
        return next((item.get("template") for item in named if item.get("name") == "default"), None)
    return entry


def _compile(source: str, origin: str) -> "jinja2.Template":
    """Compile in the sandbox, with the settings chat templates are written for."""
    from internvl3_mlx.prompt.template_sandbox import COMPILE_FAILURES, BoundedEnvironment

    environment = BoundedEnvironment()
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.compile_bounded(source)
    except COMPILE_FAILURES as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f"line {line}: "
        words = getattr(error, "message", None) or "it is nested too deeply or holds huge numbers"
        raise CheckpointError(
            f"{origin} is not a valid chat template ({where}{str(words)[:200]}); {BUILT_IN_HINT}"
        ) from error


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _template_failures() -> tuple[type[Exception], ...]:
    """List what rendering a template can raise; a template is a program."""
    import jinja2

    return (
        jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RuntimeError,
        MemoryError, AttributeError,
    )  # fmt: skip


def _template_messages(
    told: Sequence[tuple[str, list[Segment]]], plain: bool
) -> list[dict[str, Any]]:
    """Make messages whose texts are numbered sentinels; ``plain`` makes pure text a string."""
    messages, number = [], 0
    for role, body in told:
        parts = []
        for segment in body:
            if not isinstance(segment, ImageSegment):
                parts.append({"type": "text", "text": TEXT_SENTINEL.format(number)})
            else:
                parts.append({"type": "image"})
            number += 1
        text_only = all("text" in part for part in parts)
        joined = "".join(part.get("text", "") for part in parts)
        as_string = text_only and (plain or role == "system")
        messages.append({"role": role, "content": joined if as_string else parts})
    return messages


def _substitute(rendered: str, given: Sequence[Segment]) -> list[Segment] | None:
    """Put texts and images back in; None when the template lost, repeated or moved one.

    After an image that the template ends with a newline, the text gets no second one.
    """
    segments: list[Segment] = []
    waiting = list(enumerate(given))[::-1]
    end = 0
    for place in SENTINEL_PATTERN.finditer(rendered):
        literal, end = rendered[end : place.start()], place.end()
        number, segment = waiting.pop() if waiting else (-1, ImageSegment(0))
        is_text = place["text"] is not None
        if is_text == isinstance(segment, ImageSegment) or (
            is_text and int(place["text"]) != number
        ):
            return None
        after_image = bool(segments) and isinstance(segments[-1], ImageSegment)
        if isinstance(segment, TextSegment) and after_image and literal == "\n":
            segment = TextSegment(segment.text.removeprefix("\n"), segment.untrusted)
        segments += [TextSegment(literal), segment]
    return None if waiting else merge_segments([*segments, TextSegment(rendered[end:])])
