"""Thinking: split an answer into its thought, between think tags, and the answer itself."""

from dataclasses import dataclass, field
from enum import Enum

import mlx.core as mx

from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.prompt.harmony import THOUGHT_CLOSING, Detokenizer
from internvl3_mlx.prompt.reasoning import THINK_END, THINK_START
from internvl3_mlx.prompt.tokenizer import Tokenizer

CLOSING = f"\n{THINK_END}\n\n"  # what ends a thought that has used up its budget


class Part(Enum):
    """Where in an answer the text is."""

    START = "start"  # nothing but whitespace so far, or the beginning of the tag
    THOUGHT = "thought"
    ANSWER = "answer"


@dataclass
class ThoughtSplitter:
    """Splits streamed text. A tag may be split across pieces, and a thought may never end.

    An answer that does not begin with ``<think>`` has no thought. ``pending``: text that may still
    turn out to be a tag, or whitespace at the end of the thought, which is dropped.
    ``has_thought``: the answer began with the tag.
    """

    part: Part = Part.START
    pending: str = ""
    has_thought: bool = False
    has_thought_text: bool = False

    def add(self, text: str) -> tuple[str, str]:
        """Add text; return what is now known to belong to the thought, and to the answer."""
        self.pending += text
        if self.part is Part.START:
            self.leave_start()
        thought = self.release_thought() if self.part is Part.THOUGHT else ""
        answer = self.take_pending() if self.part is Part.ANSWER else ""
        return thought, answer

    def finish(self) -> tuple[str, str]:
        """Return the rest at the end of the answer; an unclosed thought stays one."""
        rest = self.take_pending()
        return (rest.rstrip(), "") if self.part is Part.THOUGHT else ("", rest)

    def leave_start(self) -> None:
        shown = self.pending.lstrip()
        if shown.startswith(THINK_START):
            self.part, self.pending = Part.THOUGHT, shown.removeprefix(THINK_START)
            self.has_thought = True
        elif not THINK_START.startswith(shown):
            self.part = Part.ANSWER

    def release_thought(self) -> str:
        if not self.has_thought_text:
            self.pending = self.pending.lstrip()
        thought, tag, rest = self.pending.partition(THINK_END)
        if tag:
            self.part, self.pending = Part.ANSWER, rest
        else:
            thought = thought[: len(thought) - partial_length(thought, THINK_END)]
        ready = thought.rstrip()
        if not tag:
            self.pending = self.pending[len(ready) :]
        self.has_thought_text |= bool(ready)
        return ready

    def take_pending(self) -> str:
        taken, self.pending = self.pending, ""
        return taken


def partial_length(text: str, tag: str) -> int:
    """Count the last characters of ``text`` that may grow into ``tag``."""
    longest = min(len(tag) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


@dataclass
class ThoughtBudget:
    """Closes a thought after ``limit`` tokens, so that the model goes on with its answer.

    ``forced``: ids that take the place of the next sampled ones.
    """

    limit: int
    closing_ids: tuple[int, ...]
    spent: int = 0
    is_used_up: bool = False
    forced: list[int] = field(default_factory=list[int])

    def next_token(self, part: Part) -> int | None:
        """Return the id that the next token must have, None to sample it.

        part: where the answer is after its last token. Called once for each token.
        """
        self.spent += part is Part.THOUGHT
        if self.spent >= self.limit and part is Part.THOUGHT and not self.is_used_up:
            self.is_used_up, self.forced = True, [*self.closing_ids]
        return self.forced.pop(0) if self.forced else None


@dataclass(eq=False)
class ThoughtConstraint:
    """A thought budget for answers that are decoded together: it allows only the forced token.

    detokenizer: of this answer, keeping the tags of a thought.
    """

    budget: ThoughtBudget
    detokenizer: Detokenizer
    splitter: ThoughtSplitter
    forced: int | None = None

    def mask_logits(self, logits: mx.array) -> mx.array:
        """Set all tokens but the forced one, if any, to -inf: (1, vocab) -> (1, vocab)."""
        if self.forced is None:
            return logits
        is_forced = mx.arange(logits.shape[-1]) == self.forced
        return mx.where(is_forced, mx.zeros_like(logits), mx.array(-mx.inf, logits.dtype))

    def accept(self, token: int) -> bool:
        """Append the next token. The answer goes on: a budget ends no answer."""
        self.splitter.add(self.detokenizer.add_token(token))
        self.forced = self.budget.next_token(self.splitter.part)
        return True


def make_thought_constraint(
    config: GenerationConfig, tokenizer: Tokenizer
) -> ThoughtConstraint | None:
    budget = make_thought_budget(config, tokenizer)
    if budget is None:
        return None
    return ThoughtConstraint(budget, tokenizer.detokenizer(keep_tags=True), ThoughtSplitter())


def make_thought_budget(config: GenerationConfig, tokenizer: Tokenizer) -> ThoughtBudget | None:
    if config.think_budget is None:
        return None
    closing = THOUGHT_CLOSING if tokenizer.is_harmony else CLOSING
    return ThoughtBudget(config.think_budget, tuple(tokenizer.encode_text(closing, specials=True)))
