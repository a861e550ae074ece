"""The normalization of answers in VQAv2, TextVQA, OK-VQA and VizWiz (EvalAI's rules)."""

import re

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(n) for n, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# word before the ending -> endings whose apostrophe people leave out
_NEGATED = (
    "ai are ca could did does do had has have is might must need ought sha should was were wo would"
)
_ENDINGS = {
    "d": "he how it someone something there they where who you",
    "ll": "how it somebody someone something they what who why you",
    "re": "there they what why you",
    "s": "he how somebody someone that there what when where who why",
    "ve": "could might must not should they we what where who would you",
}
_DOUBLE_NT = "could had might should would"
_DOUBLE_D = "he it she somebody someone something there they we who you"


def _contractions() -> dict[str, str]:
    """Map contractions without apostrophes to those with them, as far as EvalAI's list goes."""
    table = {f"{word}nt": f"{word}n't" for word in _NEGATED.split()}
    for ending, words in _ENDINGS.items():
        table |= {f"{word}{ending}": f"{word}'{ending}" for word in words.split()}
    for word in _DOUBLE_NT.split():
        table |= dict.fromkeys((f"{word}nt've", f"{word}n'tve"), f"{word}n't've")
    for word in _DOUBLE_D.split():
        table |= dict.fromkeys((f"{word}d've", f"{word}'dve"), f"{word}'d've")
    table |= {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table |= {"somebody'd": "somebodyd"}  # the other way round in EvalAI's list
    return table


CONTRACTIONS = _contractions()
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")


def normalize_answer(text: str) -> str:
    """Normalize case, punctuation, number words, articles and contractions.

    A mark of punctuation disappears if it stands beside a blank anywhere, or if the text has a
    number with a comma; otherwise it becomes a blank.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    words = [NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    cleaned = text
    joins_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank or joins_number else " ")
    return _PERIOD.sub("", cleaned)
