"""Metrics against lmms-eval's own functions, where that package is installed."""

import random
import string

import pytest

from internvl3_mlx.metrics.answers import yes_or_no_prefix
from internvl3_mlx.metrics.box_scores import iou
from internvl3_mlx.metrics.evalai import CONTRACTIONS, normalize_answer
from internvl3_mlx.metrics.group_scores import ScoredItem, mme
from internvl3_mlx.metrics.mmmu import authors_choice, open_answers, open_score
from internvl3_mlx.metrics.scores import anls, contains, relaxed, vqa

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

TEXTS = (
    *("12", "12.0", "3%", "0.03", "0", "-5", "105", "100", "1,000", "1e3", "", " ", "Yes", "yes."),
    *(
        "no",
        "The two dogs",
        "a dog",
        "dont know",
        "New York",
        "new  york",
        "ＮＹ",
        "it's",
        "e-mail",
    ),
    *("B.", "(C)", "A or B", "I think the answer is B", "so x = 3.14159", "it could be four"),
    *("the result is 1,234.50", "none", "A\nB", "3.5 m.", "[1, 2]", "y", "Nothing at all"),
    *("it's theirs; isnt it?", "100 - 3"),
)


def random_texts(count):
    generator = random.Random(4)
    letters = string.ascii_letters + string.digits + " .,-%()'?!\n"
    return ["".join(generator.choices(letters, k=generator.randrange(1, 24))) for _ in range(count)]


PAIRS = [
    (said, true) for said in (*TEXTS, *random_texts(30)) for true in (*TEXTS, *random_texts(5))
]


def test_relaxed_accuracy():
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    for said, true in PAIRS:
        assert relaxed(said, [true]) == relaxed_correctness(said, true), (said, true)


def test_anls():
    from lmms_eval.api.metrics import anls as published

    for said, true in PAIRS:
        expected = published([true, "Paris"], [said])["anls"]
        assert anls(said, [true, "Paris"]) == pytest.approx(expected), (said, true)


def test_evalai_normalization():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    published = EvalAIAnswerProcessor()
    for text in (*TEXTS, *random_texts(500), *published.CONTRACTIONS, *CONTRACTIONS):
        assert normalize_answer(text) == published(text), text


def test_vqa_accuracy():
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    generator = random.Random(1)
    for said in TEXTS:
        answers = generator.choices([*TEXTS[:6], said], k=10)
        doc = {"answers": [*answers], "question_id": 1}
        expected = textvqa_process_results(doc, [said])["exact_match"]
        assert vqa(said, answers) == pytest.approx(expected), (said, answers)


def test_ocrbench():
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

    for dataset in ("HME100k", "IIIT5K"):
        for said, true in PAIRS:
            doc = {"answer": [true], "dataset": dataset, "question_type": "x"}
            expected = ocrbench_process_results(doc, [said])["ocrbench_accuracy"]["score"]
            # lmms-eval strips the answer of blanks before it looks at it
            found = contains(
                said.strip(), [true], ignore_blanks=dataset == "HME100k", fold_width=True
            )
            assert found == expected, (dataset, said, true)


def test_mmmu_choices():
    from lmms_eval.tasks.mmmu.utils import get_multi_choice_info, parse_multi_choice_response

    options = ["12 dogs", "New York", "none", "four"]
    letters, choices = get_multi_choice_info(options)
    for said in (*TEXTS, *random_texts(300)):
        random.seed(0)
        expected = parse_multi_choice_response(said, choices, letters)
        random.seed(0)
        guess = random.choice(choices)
        found = authors_choice(said, letters)
        assert (guess if found is None else found) == expected, said


def test_mmmu_open_answers():
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    for said, true in PAIRS:
        assert open_answers(said) == {*parse_open_response(said)}, said
        assert open_score(said, [true]) == eval_open([true], parse_open_response(said)), (
            said,
            true,
        )


def test_mme():
    from lmms_eval.tasks.mme.utils import mme_aggregate_results, parse_pred_ans

    for said in (*TEXTS, *random_texts(300)):
        assert (yes_or_no_prefix(said) or "other") == parse_pred_ans(said), said
    generator = random.Random(2)
    items = [
        ScoredItem(float(generator.random() < 0.7), category, group=number)
        for category in ("count", "OCR")
        for number in range(13)
        for _ in range(2)
    ]
    published = mme_aggregate_results(
        [{"question_id": i.group, "category": i.category, "score": i.score} for i in items]
    )
    assert mme(items).value == pytest.approx(published)


def test_iou():
    from lmms_eval.tasks.refcoco.utils_rec import compute_iou

    generator = random.Random(3)
    for _ in range(200):
        boxes = []
        for _ in range(2):
            x1, y1, w, h = (generator.random() for _ in range(4))
            boxes.append((x1, y1, x1 + w, y1 + h))
        assert iou(*boxes) == pytest.approx(compute_iou(*boxes))
