"""Ids to text, one at a time: what is returned is final, and never half a character."""

import codecs
from collections.abc import Callable, Mapping

from internvl3_mlx.prompt.tokenizer_files import AddedToken
from internvl3_mlx.prompt.vocabulary import LeadingSpace


class StreamingDetokenizer:
    """Turn the ids of an answer into pieces of text, at a constant cost per id.

    Bytes that no character can contain become U+FFFD. A character that the last ids left
    unfinished is dropped: nothing could complete it.
    """

    def __init__(
        self,
        spell: Callable[[int], bytes],
        shown: Mapping[int, bytes | None],
        lead: LeadingSpace,
    ):
        """``shown``: what each added token writes, None for those that are skipped."""
        self._spell, self._shown, self._lead = spell, shown, lead
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_blank = lead != "none"

    def add_token(self, token_id: int) -> str:
        """Take one id and return the text that it completes, often none."""
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
        """End the answer and return the text still held back: none, half a character is dropped."""
        self._characters.reset()
        return ""


def visible_added_tokens(
    added: Mapping[str, AddedToken], keep: frozenset[str]
) -> dict[int, bytes | None]:
    """Say what each added token writes into an answer: special ones nothing, unless kept."""
    return {
        entry.id: None if entry.special and token not in keep else token.encode()
        for token, entry in added.items()
    }
