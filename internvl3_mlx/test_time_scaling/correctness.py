"""Whether a response is correct: its final answer equals a known one, as text, number or letter."""

import re
from collections.abc import Sequence
from math import isclose

from internvl3_mlx.metrics.answers import vote_key
from internvl3_mlx.metrics.scores import parse_number

LETTER = re.compile(r"\(?([a-z])(?:[).:]|$)")  # of an option, at the beginning of an answer
RELATIVE_TOLERANCE = 1e-6


def is_correct(response: str, answers: Sequence[str]) -> bool:
    """Tell whether the final answer of a response is one of the known answers.

    Case, marks and blanks around it do not count; numbers are compared as numbers; an option's
    letter may be followed by its text.
    """
    said = vote_key(response)
    return bool(said) and any(matches(said, vote_key(answer)) for answer in answers)


def matches(said: str, known: str) -> bool:
    """Compare two final answers in the form of ``vote_key``."""
    if said == known:
        return True
    numbers = [parse_number(text.replace(",", "")) for text in (said, known)]
    if numbers[0] is not None and numbers[1] is not None:
        return isclose(numbers[0], numbers[1], rel_tol=RELATIVE_TOLERANCE)
    letter = LETTER.match(said)
    return len(known) == 1 and letter is not None and letter[1] == known
