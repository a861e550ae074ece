"""Chat templates, messages to prompt segments: InternVL's own, or the repository's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from internvl3_mlx.errors import ConfigError
from internvl3_mlx.prompt.harmony import FINAL_HEADER, HARMONY_SYSTEM
from internvl3_mlx.prompt.messages import (
    GeneratedAnswer,
    Message,
    Segment,
    TextSegment,
    check_messages,
    merge_segments,
    message_segments,
    system_segment,
)
from internvl3_mlx.prompt.tokenizer_files import END, MESSAGE, RETURN, START

if TYPE_CHECKING:
    from internvl3_mlx.config import ModelConfig

MESSAGE_START, MESSAGE_END = "<|im_start|>{role}\n", "<|im_end|>\n"


class Template(Protocol):
    """Renders a conversation as segments, ending with the beginning of the assistant's message."""

    def render(self, messages: Sequence[Message], system: str | None) -> list[Segment]: ...


@dataclass(frozen=True)
class InternVLTemplate:
    """``internvl2_5``: ChatML with InternVL's system prompt, the template of every InternVL3."""

    system_message: str | None = None

    def render(self, messages: Sequence[Message], system: str | None) -> list[Segment]:
        """Render the prompt. system: None for the model's own text, "" for none."""
        check_messages(messages)
        instruction = system_segment(system, self.system_message)
        segments = _message_segments("system", [instruction]) if instruction.text else []
        for turn in messages:
            segments += _message_segments(turn.role, message_segments(turn))
        return merge_segments([*segments, TextSegment(MESSAGE_START.format(role="assistant"))])


@dataclass(frozen=True)
class HarmonyTemplate:
    """``internvl3_5_gpt_oss``: the harmony format of GPT-OSS; answers end with <|return|>."""

    system_message: str | None = None

    def render(self, messages: Sequence[Message], system: str | None) -> list[Segment]:
        """Render the prompt. system: None for the model's own text, "" for none."""
        check_messages(messages)
        instruction = system_segment(system, self.system_message or HARMONY_SYSTEM)
        segments = harmony_message("system", [instruction]) if instruction.text else []
        for turn in messages:
            segments += harmony_message(turn.role, message_segments(turn))
        return merge_segments([*segments, TextSegment(f"{START}assistant")])


def harmony_message(role: str, body: Sequence[Segment]) -> list[Segment]:
    """Return one message; the ids of an answer bring their channel with them."""
    if role != "assistant":
        return [TextSegment(f"{START}{role}{MESSAGE}"), *body, TextSegment(END)]
    has_channel = any(isinstance(segment, GeneratedAnswer) for segment in body)
    opening = f"{START}assistant" + ("" if has_channel else FINAL_HEADER)
    return [TextSegment(opening), *body, TextSegment(RETURN)]


TEMPLATES: dict[str, type[InternVLTemplate | HarmonyTemplate]] = {
    "internvl2_5": InternVLTemplate,
    "internvl3_5_gpt_oss": HarmonyTemplate,
}


def load_template(config: "ModelConfig", folder: Path) -> Template:
    """Return the template the config names, or else the repository's own Jinja template.

    Fine-tunes name templates of their own. Raises ``ConfigError`` for an unknown name in a
    repository without a chat template: another template would silently be worse.
    """
    if config.template in TEMPLATES:
        return TEMPLATES[config.template](config.system_message)
    from internvl3_mlx.prompt.jinja_template import read_jinja

    own = read_jinja(Path(folder), config.system_message)
    if own is None and config.template is not None:
        raise ConfigError(
            f"config.json names the template {config.template!r}, and the model has no chat "
            f"template for images of its own; choose from {', '.join(TEMPLATES)}"
        )
    return own or InternVLTemplate(config.system_message)


def unknown_template_note(config: "ModelConfig") -> str | None:
    """Say that another template is used than the config names; None where it is that one."""
    if config.template is None or config.template in TEMPLATES:
        return None
    return (
        f"config.json names the template {config.template!r}, which is not known here: prompts "
        "have the form of the model's own chat template"
    )


def _message_segments(role: str, body: Sequence[Segment]) -> list[Segment]:
    return [TextSegment(MESSAGE_START.format(role=role)), *body, TextSegment(MESSAGE_END)]
