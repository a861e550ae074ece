"""MathVista: an extracted answer becomes an option or a number of the stated precision."""

from collections.abc import Mapping, Sequence

from internvl3_mlx.metrics.answers import nearest_option, option_letters

INTEGER, FLOAT, LIST, TEXT = "integer", "float", "list", "text"


def normalize_extraction(
    extraction: str, answer_type: str, options: Sequence[str] = (), precision: int | None = None
) -> str | None:
    """Turn an extracted answer into the form that the true answer has; None if it has none.

    A letter, in parentheses or not, becomes its option; any other text the option nearest to it.
    Numbers are rounded: "1.46" with precision 1 is "1.5".
    """
    text = extraction.strip()
    if options:
        return _option(text, options)
    try:
        if answer_type == INTEGER:
            return str(int(float(text.replace(",", ""))))
        if answer_type == FLOAT:
            return str(round(float(text.replace(",", "")), precision or 0))
    except (ValueError, OverflowError):
        return None
    return text


def _option(text: str, options: Sequence[str]) -> str | None:
    letters: Mapping[str, str] = dict(zip(option_letters(options), options, strict=True))
    inside = text.strip("() .").upper()
    return letters[inside] if inside in letters else nearest_option(text, options)


def mathvista(
    extraction: str,
    answers: Sequence[str],
    *,
    answer_type: str = TEXT,
    options: Sequence[str] = (),
    precision: int | None = None,
) -> float:
    """Return 1 if the normalized extraction equals a true answer."""
    found = normalize_extraction(extraction, answer_type, options, precision)
    if found is None:
        return 0.0
    letters = dict(zip(option_letters(options), options, strict=True))
    return float(any(found == letters.get(answer.strip(), answer.strip()) for answer in answers))
