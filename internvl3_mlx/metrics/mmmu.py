"""The parser of MMMU's authors: option letters, and open answers with numbers.

The authors choose at random where they find nothing. ``authors_choice`` returns None there, and its
caller decides: lmms-eval guesses too, InternVL's script counts it as wrong.
"""

import re
from collections.abc import Mapping, Sequence

Parsed = str | float
LONG_ANSWER_WORDS = 5  # in a longer one an option's text may stand for its letter
_END_MARKS = (",", ".", "!", "?", ";", ":", "'")
_KEY_PHRASES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def authors_choice(response: str, options: Mapping[str, str]) -> str | None:
    """Find the option letter in a response; None where the authors would guess.

    options: letter to text. Looked for are ``(A)``, ``A `` and ``A.``, then in longer responses the
    options' texts; of several the one that stands last counts.
    """
    for mark in _END_MARKS:
        response = response.strip(mark)
    response = f" {response} "
    for form, position in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [key for key in options if form.format(key) in response]
        if found:
            return max(found, key=lambda key: response.rfind(position.format(key)))
    if len(response.split()) > LONG_ANSWER_WORDS:
        lowered = response.lower()
        named = [key for key, text in options.items() if text.lower() in lowered]
        if named:
            return max(named, key=lambda key: lowered.rfind(options[key].lower()))
    return None


def open_score(response: str, answers: Sequence[str]) -> float:
    """Return 1 if an open answer holds a true one: equal as a number, or as part of the text."""
    true = [form for answer in answers for form in normalized(answer)]
    texts = [form for form in true if isinstance(form, str)]
    for said in open_answers(response):
        if isinstance(said, str):
            if any(text in said for text in texts):
                return 1.0
        elif said in true:
            return 1.0
    return 0.0


def open_answers(response: str) -> set[Parsed]:
    """Return what a response may mean: its key phrases and the numbers in them, normalized."""
    phrases = key_phrases(response)
    numbers = [number for phrase in phrases for form in _NUMBERS for number in form.findall(phrase)]
    return {form for text in (*phrases, *numbers) for form in normalized(text)}


def key_phrases(response: str) -> list[str]:
    """Return the shortest end of each line that follows words such as "answer" or "is"."""
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    found: list[str] = []
    for number, line in enumerate(lines, start=1):
        marks = (*_KEY_PHRASES, "=") if number == len(lines) else _KEY_PHRASES
        ends = [line.split(mark)[-1].strip() for mark in marks if mark in line]
        # an empty end gives way to the next one, as in the authors' script
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in (*_END_MARKS,):
            found.append(shortest)
    return found or [response]


def normalized(text: str) -> list[Parsed]:
    """Return a number rounded to two places, or the text in lower case.

    A single character gets a blank on either side, so that it does not match inside words.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]
