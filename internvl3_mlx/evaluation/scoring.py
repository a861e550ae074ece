"""Parsers and metrics by name: from what a model wrote to a score, and from scores to a result."""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from internvl3_mlx.errors import DataError
from internvl3_mlx.evaluation.items import EvalItem
from internvl3_mlx.metrics.answers import (
    final_answer,
    first_letter,
    option_letter,
    without_thinking,
    yes_or_no,
    yes_or_no_prefix,
    yes_unless_denied,
)
from internvl3_mlx.metrics.box_scores import MIN_IOU, first_box, first_point, in_box, iou
from internvl3_mlx.metrics.group_scores import (
    GroupScore,
    ScoredItem,
    all_right,
    hallusion,
    mean_f1,
    mean_score,
    mme,
)
from internvl3_mlx.metrics.mathvista import INTEGER, mathvista
from internvl3_mlx.metrics.mmmu import authors_choice, open_score
from internvl3_mlx.metrics.scores import anls, contains, exact, letter, parse_number, relaxed, vqa
from internvl3_mlx.metrics.statistics import Interval, bootstrap, mean_interval

Parser = Callable[[EvalItem, str], str | None]
FORMULAS = "HME100k"  # the part of OCRBench in which blanks do not count
YES_NO = {"yes": "yes", "no": "no", "1": "yes", "0": "no", "true": "yes", "false": "no"}
_STATED = re.compile(r"(?:final answer|answer)\s*[:：]", re.IGNORECASE)
_LEADING_LETTER = re.compile(r"\s*([A-Z])\.")


@dataclass(frozen=True)
class ItemScore:
    """The score of one item, 0 to 1. extracted: what was scored; None where nothing was found."""

    score: float
    extracted: str | None
    said: str | None = None


@dataclass(frozen=True)
class Metric:
    """A metric. scale: what a mean of 1 is shown as; 1 where the score is a sum."""

    score: Callable[[EvalItem, str], float]
    words: str
    aggregate: str = "mean"
    scale: float = 100.0


@dataclass(frozen=True)
class Score:
    """The result of a task or of a category, on the metric's scale."""

    n: int
    value: float
    interval: Interval


def _as_written(_: EvalItem, text: str) -> str:
    return text.strip()


def _rules(item: EvalItem, text: str) -> str | None:
    if not item.options:
        return final_answer(text).strip().removesuffix(".")
    return option_letter(text, item.options)


def _first_character(item: EvalItem, text: str) -> str | None:
    return first_letter(text, item.options) if item.options else text


def _authors(item: EvalItem, text: str) -> str | None:
    """Guess where nothing is found, as MMMU's authors do; the guess depends on the item alone."""
    if not item.options:
        return text
    found = authors_choice(text, item.options)
    return random.Random(item.id).choice([*item.options]) if found is None else found


def _leading_letter(_: EvalItem, text: str) -> str:
    match = _LEADING_LETTER.match(text)
    return match[1] if match else text.strip()


def _bracketed_letter(item: EvalItem, text: str) -> str | None:
    """Compare the first word with ``(A)``, as InternVL's MVBench script does."""
    word = text.replace("Answer: ", "").strip().split(" ")[0].lower().replace(".", "")
    marks = {letter: f"({letter.lower()})" for letter in item.options}
    found = [letter for letter, mark in marks.items() if word and (word in mark or mark in word)]
    return found[0] if len(found) == 1 else None


def _stated(item: EvalItem, text: str) -> str | None:
    """Find a marked answer, a sure option, or a number alone; else a judge has to read it."""
    if _STATED.search(text) or "\\boxed" in text:
        return final_answer(text)
    if item.options:
        return option_letter(text, item.options)
    if item.answer_type in (INTEGER, "float"):
        return text.strip() if parse_number(text) is not None else None
    return text.strip() if len(text.split()) <= 1 else None


PARSERS: Mapping[str, Parser] = MappingProxyType({
    "text": _as_written,
    "lower": lambda _, text: text.strip().lower(),
    "final": lambda _, text: final_answer(text),
    "rules": _rules,
    "first_character": _first_character,
    "authors": _authors,
    "leading_letter": _leading_letter,
    "bracketed_letter": _bracketed_letter,
    "stated": _stated,
    "yes_or_no": lambda _, text: yes_or_no(text),
    "yes_or_no_prefix": lambda _, text: yes_or_no_prefix(text),
    "yes_unless_denied": lambda _, text: yes_unless_denied(text),
})  # fmt: skip


def _score_letter(item: EvalItem, said: str) -> float:
    return letter(said.strip().upper(), item.answers) if item.options else exact(said, item.answers)


def _score_mmmu(item: EvalItem, said: str) -> float:
    return letter(said, item.answers) if item.options else open_score(said, item.answers)


def _score_contains(item: EvalItem, said: str) -> float:
    return contains(said, item.answers, ignore_blanks=item.kind == FORMULAS)


def _score_contains_folded(item: EvalItem, said: str) -> float:
    blanks = item.kind == FORMULAS
    return contains(said, item.answers, ignore_blanks=blanks, fold_width=True)


def _score_iou(item: EvalItem, said: str) -> float:
    return float(item.box is not None and iou(first_box(said), item.box) >= MIN_IOU)


def _score_point(item: EvalItem, said: str) -> float:
    point = first_point(said)
    return float(item.box is not None and point is not None and in_box(point, item.box))


def _score_mathvista(item: EvalItem, said: str) -> float:
    options = [*item.options.values()]
    kind, precision = item.answer_type, item.precision
    return mathvista(said, item.answers, answer_type=kind, options=options, precision=precision)


def _score_yes_no(item: EvalItem, said: str) -> float:
    return float(said == true_yes_or_no(item))


def _score_rendered(item: EvalItem, said: str) -> float:
    score = {"exact": exact, "relaxed": relaxed, "anls": anls}[item.kind]
    return score(said, item.answers)


def true_yes_or_no(item: EvalItem) -> str:
    """Return the true answer as "yes" or "no"; raises ``DataError`` for any other."""
    answer = (item.answers or ("",))[0].strip().lower().rstrip(".")
    if answer not in YES_NO:
        raise DataError(f"item {item.id}: the answer is {answer!r}; this task needs yes or no")
    return YES_NO[answer]


METRICS: Mapping[str, Metric] = MappingProxyType({
    "exact": Metric(lambda i, t: exact(t, i.answers), "exact match"),
    "letter": Metric(_score_letter, "right letters"),
    "relaxed": Metric(lambda i, t: relaxed(t, i.answers), "relaxed accuracy"),
    "relaxed_by_prediction": Metric(
        lambda i, t: relaxed(t, i.answers, relative_to_prediction=True),
        "relaxed accuracy, 5% of the model's number",
    ),
    "anls": Metric(lambda i, t: anls(t, i.answers), "ANLS"),
    "vqa": Metric(lambda i, t: vqa(t, i.answers), "VQA accuracy"),
    "contains": Metric(_score_contains, "answers contained"),
    "ocrbench": Metric(_score_contains, "OCRBench points of 1,000", scale=1000.0),
    "ocrbench_folded": Metric(_score_contains_folded, "OCRBench points of 1,000", scale=1000.0),
    "iou": Metric(_score_iou, "boxes with IoU of 0.5 or more"),
    "point": Metric(_score_point, "points inside the box"),
    "mmmu": Metric(_score_mmmu, "right answers"),
    "mathvista": Metric(_score_mathvista, "right answers"),
    "pope": Metric(_score_yes_no, "mean F1 of yes", "pope"),
    "mme": Metric(_score_yes_no, "MME points of 2,800", "mme", 1.0),
    "hallusion": Metric(
        _score_yes_no, "mean of accuracy by answer, figure and question", "hallusion"
    ),
    "rendered": Metric(_score_rendered, "right answers; similarity (ANLS) for the page"),
    "circular": Metric(_score_letter, "right in every rotation of the options", "circular"),
})  # fmt: skip
OWN_METRICS = ("exact", "letter", "relaxed", "anls", "vqa", "contains", "iou", "point")
BOX_METRICS = ("iou", "point")
# metrics that leave where the letters stand to the parser, and have one for each item
AGGREGATES: Mapping[str, Callable[[Sequence[ScoredItem]], GroupScore]] = MappingProxyType(
    {
        "pope": mean_f1,
        "mme": mme,
        "hallusion": hallusion,
        "circular": all_right,
    }
)


def parse_answer(item: EvalItem, parser: str, text: str) -> str | None:
    """Extract what is scored from an answer; None where the parser finds nothing."""
    return PARSERS[parser](item, without_thinking(text))


def score_answer(item: EvalItem, metric: str, extracted: str | None) -> ItemScore:
    """Score an extracted answer; nothing found scores 0.

    Raises ``DataError`` where the data lack what the metric needs.
    """
    if extracted is None:
        return ItemScore(0.0, None)
    try:
        return ItemScore(METRICS[metric].score(item, extracted), extracted)
    except ValueError as error:
        raise DataError(f"item {item.id}: {error}") from error


def scored_item(item: EvalItem, metric: str, found: ItemScore) -> ScoredItem:
    """Add what groups an item to its score."""
    figure: tuple[str, ...] = (item.id,)
    question, group = figure, item.group or item.id
    true = None
    if METRICS[metric].score is _score_yes_no:
        true = true_yes_or_no(item)
    if METRICS[metric].aggregate == "hallusion":
        *front, figure_id, question_id = item.id.split("_")
        group = "_".join(front)
        figure, question = (group, figure_id), (group, question_id)
    return ScoredItem(
        found.score,
        item.category,
        group,
        said=found.extracted,
        true=true,
        figure=figure,
        question=question,
    )


def aggregate(metric: str, items: Sequence[ScoredItem], *, seed: int = 0) -> Score:
    """Aggregate scores of a task, with a 95% interval, on the metric's scale."""
    what = METRICS[metric]
    group = AGGREGATES.get(what.aggregate)
    if group is None:
        scores = [item.score for item in items]
        return _scaled(len(items), mean_score(scores).value, mean_interval(scores), what.scale)
    found = group(items)
    return _scaled(len(items), found.value, bootstrap(found, seed=seed), what.scale)


def _scaled(n: int, value: float, interval: Interval, scale: float) -> Score:
    low, high = interval.low * scale, interval.high * scale
    return Score(n, value * scale, Interval(low, high, interval.method))


def by_category(metric: str, items: Sequence[ScoredItem]) -> dict[str, Score]:
    """Aggregate each category; empty where there is only one."""
    groups: dict[str, list[ScoredItem]] = defaultdict(list)
    for item in items:
        groups[item.category].append(item)
    if len(groups) < 2:
        return {}
    return {name or "–": aggregate(metric, groups[name]) for name in sorted(groups)}
