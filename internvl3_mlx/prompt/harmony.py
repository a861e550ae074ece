"""Harmony, the format of GPT-OSS: messages with channels, by the template internvl3_5_gpt_oss.

An answer is ``<|channel|>analysis<|message|>thought<|end|><|start|>assistant<|channel|>final
<|message|>answer<|return|>``, or the final message alone. The special tokens are data of the
published template and training code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from internvl3_mlx.prompt.detokenizer import StreamingDetokenizer
from internvl3_mlx.prompt.reasoning import THINK_END, THINK_START
from internvl3_mlx.prompt.tokenizer_files import CALL, CHANNEL, END, MESSAGE, RETURN, START

MESSAGE_ENDS = (END, RETURN, CALL)
FINAL = "final"
FINAL_HEADER = f"{CHANNEL}{FINAL}{MESSAGE}"
# what closes a thought that has used up its budget
THOUGHT_CLOSING = f"{END}{START}assistant{FINAL_HEADER}"
# the exact system prompt of the published template
HARMONY_SYSTEM = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n"
    "# Valid channels: final. Channel must be included for every message."
)


def is_harmony(added: Mapping[str, object]) -> bool:
    """Tell whether a tokenizer with these added tokens is one of GPT-OSS."""
    return {START, END, CHANNEL, MESSAGE, RETURN} <= added.keys()


class Place(Enum):
    """Where in an answer the last token was."""

    BODY = "body"  # of a message; the prompt may open one
    ROLE = "role"  # between <|start|> and <|channel|> or <|message|>
    CHANNEL = "channel"  # the name of a channel


@dataclass(eq=False)
class HarmonyDetokenizer:
    """Decodes an answer by channel: the final one is the answer, any other one a thought.

    A thought is put between think tags, which all that follows knows, or left out without
    ``keep_tags``. names: of the special tokens, by id.
    """

    inner: StreamingDetokenizer
    names: Mapping[int, str]
    keep_tags: bool
    place: Place = Place.BODY
    channel: str = FINAL
    pending_channel: str = ""
    thinks: bool = False

    def add_token(self, token_id: int) -> str:
        """Add one id and return the text that it completes, often none."""
        name = self.names.get(int(token_id))
        if name == START or name in MESSAGE_ENDS:
            self.place = Place.ROLE
            return ""
        if name == CHANNEL:
            self.place, self.pending_channel = Place.CHANNEL, ""
            return ""
        if name == MESSAGE:
            return self.open_message()
        text = self.inner.add_token(token_id)
        if self.place is Place.CHANNEL:
            self.pending_channel += text
        if self.place is not Place.BODY:
            return ""
        return text if self.keep_tags or self.channel == FINAL else ""

    def open_message(self) -> str:
        """Begin the body of a message; return the tag between a thought and what follows it."""
        words = self.pending_channel.split()
        self.channel = words[0] if words else FINAL
        self.place, self.pending_channel = Place.BODY, ""
        before, self.thinks = self.thinks, self.channel != FINAL
        if not self.keep_tags or (before, self.thinks) == (False, False):
            return ""
        if before and self.thinks:
            return "\n"  # a thought in several messages
        return THINK_START if self.thinks else f"\n{THINK_END}\n\n"

    def finalize(self) -> str:
        """End the answer; a thought that was not closed stays one."""
        return self.inner.finalize()


Detokenizer = StreamingDetokenizer | HarmonyDetokenizer
