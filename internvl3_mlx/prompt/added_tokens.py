"""Find added tokens in a text by the rules of the ``tokenizers`` library.

First the tokens that are matched as written, then, in the normalized rest, the ``normalized`` ones.
Of tokens that begin at one place the longest counts. A ``single_word`` token is one only between
characters that are not of a word; ``lstrip`` and ``rstrip`` ones take the whitespace beside them.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping

from internvl3_mlx.prompt.tokenizer_files import AddedToken

WORD_CATEGORIES = ("Nd", "Nl", "Pc")  # besides letters and marks
JOINERS = "\u200c\u200d"
SPACES = r"[ \t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"  # White_Space
SPACE_BEFORE, SPACE_AFTER = re.compile(SPACES + r"\Z"), re.compile(SPACES)
NORMALIZER_PROBE = "a e\u0301\uff21 b"


def keep(text: str) -> str:
    """Return a text as it is, as tokenizers without a normalizer do."""
    return text


class AddedTokenMatcher:
    """Splits texts at some added tokens. normalize: what the tokenizer does to a text first."""

    def __init__(
        self, tokens: Mapping[str, AddedToken], normalize: Callable[[str], str] = keep
    ) -> None:
        # normalizers such as those that prepend a space cannot be applied before the tokenizer is
        once = normalize(NORMALIZER_PROBE)
        self._normalize = normalize if normalize(once) == once else keep
        written = {text: token for text, token in tokens.items() if not token.normalized}
        normalized = {
            self._normalize(text): token for text, token in tokens.items() if token.normalized
        }
        self._written = (written, _any_of(written))
        self._normalized = (normalized, _any_of(normalized)) if normalized else None

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the ids of the tokens, and the texts before, between and after them."""
        for piece in _split(text, *self._written):
            if isinstance(piece, int) or self._normalized is None:
                yield piece
            else:
                yield from _split(self._normalize(piece), *self._normalized)


def _any_of(tokens: Mapping[str, AddedToken]) -> re.Pattern[str]:
    """Compile a pattern for any of the tokens, longest first; it never matches without tokens."""
    alternatives = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return re.compile(alternatives or "(?!)")


def _split(
    text: str, tokens: Mapping[str, AddedToken], pattern: re.Pattern[str]
) -> Iterator[str | int]:
    done = 0
    for match in pattern.finditer(text):
        token, (start, stop) = tokens[match[0]], match.span()
        if token.single_word and not _is_single_word(text, start, stop):
            continue
        if token.lstrip:
            start = SPACE_BEFORE.search(text, done, start).start()  # type: ignore[union-attr]
        if token.rstrip:
            stop = SPACE_AFTER.match(text, stop).end()  # type: ignore[union-attr]
        if done < start:
            yield text[done:start]
        yield token.id
        done = stop
    if done < len(text):
        yield text[done:]


def _is_single_word(text: str, start: int, stop: int) -> bool:
    before, after = text[start - 1 : start] if start else "", text[stop : stop + 1]
    return not any(is_word_character(character) for character in before + after)


def is_word_character(character: str) -> bool:
    """Tell whether a character is part of a word, as Unicode's regular expressions define it."""
    category = unicodedata.category(character)
    return category[0] in "LM" or category in WORD_CATEGORIES or character in JOINERS
