"""Streaming detokenizer: ids to text, one at a time, never half a character."""

import codecs
from collections.abc import Callable, Mapping

from internvl3_mlx.prompt.tokenizer_files import AddedToken
from internvl3_mlx.prompt.vocabulary import LeadingSpace


class StreamingDetokenizer:
    """Decodes the ids of an answer to text, at a constant cost per id.

    Invalid bytes become U+FFFD. A character that the last ids leave incomplete is dropped.
    """

    def __init__(
        self,
        spell: Callable[[int], bytes],
        shown: Mapping[int, bytes | None],
        lead: LeadingSpace,
    ):
        """``shown``: the text of each added token, None for those that are skipped."""
        self._spell, self._shown, self._lead = spell, shown, lead
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_blank = lead != "none"

    def add_token(self, token_id: int) -> str:
        """Add one id and return the text that it completes, often none."""
        token_id = int(token_id)
        if token_id in self._shown:
            written = self._shown[token_id]
            if written is None:
                return ""
            self._drop_blank = self._lead == "chunk"
            return self._characters.decode(written)
        written = self._spell(token_id)
        if written and self._drop_blank:
            self._drop_blank = False
            written = written.removeprefix(b" ")
        return self._characters.decode(written)

    def finalize(self) -> str:
        """End the answer and return the rest: none, as an incomplete character is dropped."""
        self._characters.reset()
        return ""


def visible_added_tokens(
    added: Mapping[str, AddedToken], keep: frozenset[str]
) -> dict[int, bytes | None]:
    """Return the text of each added token in an answer: None for special ones, unless kept."""
    return {
        entry.id: None if entry.special and token not in keep else token.encode()
        for token, entry in added.items()
    }
