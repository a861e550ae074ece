"""Scores of one answer, 0 to 1, as the benchmarks define them.

Where harnesses differ, an argument says whose rule is followed. Scores that only a group of answers
has (POPE's F1, MME, HallusionBench) are in ``group_scores``.
"""

from collections.abc import Sequence
from statistics import fmean

from internvl3_mlx.metrics.edit_distance import edit_distance
from internvl3_mlx.metrics.evalai import normalize_answer

RELAXED_TOLERANCE = 0.05  # of ChartQA's relaxed accuracy
ANLS_THRESHOLD = 0.5  # below it an answer counts as wrong
VOTES_FOR_FULL_SCORE = 3  # of the other annotators, in VQA accuracy
MIN_VQA_ANSWERS = 4  # below it even the annotators' own answer could not reach a score of 1
FULLWIDTH_OFFSET = 0xFEE0  # of ！ to ～ from ! to ~
_FULLWIDTH = {code: code - FULLWIDTH_OFFSET for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction equals an answer; case and blanks around it do not count."""
    said = prediction.strip().lower()
    return float(any(said == answer.strip().lower() for answer in answers))


def relaxed(
    prediction: str, answers: Sequence[str], *, relative_to_prediction: bool = False
) -> float:
    """Return 1 if a number is within 5% of an answer, or a text equals it (ChartQA).

    A trailing % divides by 100. relative_to_prediction: InternVL's script measures the 5% by the
    model's number rather than the true one. A number of 0 there is compared as text.
    """
    return float(any(_is_close(prediction, answer, relative_to_prediction) for answer in answers))


def _is_close(prediction: str, answer: str, relative_to_prediction: bool) -> bool:
    said, true = parse_number(prediction), parse_number(answer)
    base = said if relative_to_prediction else true
    if said is not None and true is not None and base:
        return abs(said - true) / abs(base) <= RELAXED_TOLERANCE
    return prediction.lower() == answer.lower()


def parse_number(text: str) -> float | None:
    """Parse a number, with a percent sign as hundredths; None for any other text."""
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the average normalized Levenshtein similarity to the nearest answer (DocVQA).

    Case and repeated blanks do not count in the distance; it is divided by the length of the
    longer text as it was written. Below 0.5 the score is 0.
    """
    return max((_similarity_to(prediction, answer) for answer in answers), default=0.0)


def _similarity_to(prediction: str, answer: str) -> float:
    longest = max(len(answer), len(prediction))
    if not longest:
        return 1.0
    said, true = (" ".join(text.lower().split()) for text in (prediction, answer))
    score = 1.0 - edit_distance(true, said) / longest
    return score if score >= ANLS_THRESHOLD else 0.0


def vqa(prediction: str, answers: Sequence[str]) -> float:
    """Return VQA accuracy: the mean over all annotators of min(1, equal answers of the others / 3).

    Both sides are normalized by EvalAI's rules. With fewer than four answers nothing could score
    1: raises ``ValueError``.
    """
    if len(answers) < MIN_VQA_ANSWERS:
        raise ValueError(
            f"VQA accuracy needs {MIN_VQA_ANSWERS} or more answers of annotators, and there are "
            f"{len(answers)}; use the metric exact"
        )
    said = normalize_answer(prediction)
    equal = [normalize_answer(answer) == said for answer in answers]
    total = sum(equal)
    return fmean(min(1.0, (total - one) / VOTES_FOR_FULL_SCORE) for one in equal)


def contains(
    prediction: str,
    answers: Sequence[str],
    *,
    ignore_blanks: bool = False,
    fold_width: bool = False,
) -> float:
    """Return 1 if an answer occurs in the prediction (OCRBench).

    ignore_blanks: compare without blanks but with case, as for formulas (HME100k). fold_width:
    read full-width letters as ordinary ones, as lmms-eval does.
    """

    def prepared(text: str) -> str:
        text = text.strip().replace("\n", " ")
        if ignore_blanks:
            return text.replace(" ", "")
        return (text.translate(_FULLWIDTH) if fold_width else text).lower().strip()

    said = prepared(prediction)
    return float(any(prepared(answer) in said for answer in answers))


def letter(chosen: str | None, answers: Sequence[str]) -> float:
    """Return 1 if the chosen option's letter is an answer."""
    return float(chosen is not None and chosen in {answer.strip().upper() for answer in answers})
