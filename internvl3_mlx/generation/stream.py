"""From tokens to streamed text: whole characters, stop strings, and the end of the answer."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from internvl3_mlx.generation.answer import FinishReason
from internvl3_mlx.generation.thinking import ThoughtSplitter
from internvl3_mlx.prompt.harmony import Detokenizer


@dataclass
class TextStream:
    """Decodes tokens to text, stripped of whitespace at both ends as the published ``chat()`` does.

    ``pending`` is text that cannot be shown yet: it may be the beginning of a stop string, or
    whitespace at the end. ``thought``: splits off the thought, to which no stop string applies;
    ``reasoning`` is its text so far, ``new_reasoning`` what the last token added.
    ``continues``: the answer continues a text, so that whitespace at its beginning counts.
    ``stop_string``: the one that ended the answer, if any.
    """

    detokenizer: Detokenizer
    stop_ids: Collection[int]
    stop: Sequence[str] = ()
    token_ids: list[int] = field(default_factory=list[int])
    text: str = ""
    pending: str = ""
    finish_reason: FinishReason = "length"
    thought: ThoughtSplitter | None = None
    reasoning: str = ""
    new_reasoning: str = ""
    continues: bool = False
    stop_string: str | None = None

    def decode(self, tokens: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Yield each token with the text that it makes final, until the answer ends."""
        for token in tokens:
            if token in self.stop_ids:
                self.finish_reason = "stop"
                return
            self.token_ids.append(token)
            yield token, self.release(self.split_thought(self.detokenizer.add_token(token)))
            if self.finish_reason == "stop":
                return

    def flush(self) -> str:
        """Return the pending text after the last token."""
        rest = self.split_thought(self.detokenizer.finalize(), is_last=True)
        ready = (self.pending + rest).rstrip()
        ready = ready if self.text or self.continues else ready.lstrip()
        self.pending = ""
        self.text += ready
        return ready

    def split_thought(self, new: str, *, is_last: bool = False) -> str:
        """Keep what belongs to the thought and return what belongs to the answer."""
        if self.thought is None:
            return new
        thought, answer = self.thought.add(new)
        if is_last:
            rest = self.thought.finish()
            thought, answer = thought + rest[0], answer + rest[1]
        self.new_reasoning = thought
        self.reasoning += thought
        return answer

    def release(self, new: str) -> str:
        """Add new text and return what is final now."""
        self.pending += new
        if not self.text and not self.continues:
            self.pending = self.pending.lstrip()
        places = ((self.pending.find(stop), stop) for stop in self.stop)
        found = [(place, stop) for place, stop in places if place >= 0]
        if found:
            place, self.stop_string = min(found)
            self.finish_reason, self.pending = "stop", self.pending[:place]
            return ""
        final = self.pending[: len(self.pending) - self.partial_stop_length()].rstrip()
        self.pending = self.pending[len(final) :]
        self.text += final
        return final

    def partial_stop_length(self) -> int:
        """Count the last characters that may grow into a stop string."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        for length in range(min(longest, len(self.pending)), 0, -1):
            if any(stop.startswith(self.pending[-length:]) for stop in self.stop):
                return length
        return 0
