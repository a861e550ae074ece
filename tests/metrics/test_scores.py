"""Metrics against cases worked by hand."""

import pytest

from internvl3_mlx.metrics.edit_distance import edit_distance, similarity
from internvl3_mlx.metrics.evalai import normalize_answer
from internvl3_mlx.metrics.mathvista import mathvista
from internvl3_mlx.metrics.mmmu import authors_choice, open_score
from internvl3_mlx.metrics.scores import anls, contains, exact, letter, relaxed, vqa


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)],
)
def test_edit_distances(a, b, edits):
    assert edit_distance(a, b) == edit_distance(b, a) == edits


def test_similarity_of_empty_texts_is_whole():
    assert similarity("", "") == 1
    assert similarity("a", "") == 0


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("pariss", ["Paris"], 1 - 1 / 6),
        ("Paris", ["London", "paris"], 1),
        ("", ["Paris"], 0),
        ("", [""], 1),
        ("abcd", ["abxy"], 0.5),  # exactly at the threshold
        ("abcde", ["abxyz"], 0),  # 0.4 is below it
        ("a  b", ["a b"], 1),  # blanks collapse
        (" a ", ["a"], 1),
        ("x", [], 0),
    ],
)
def test_anls(said, answers, score):
    assert anls(said, answers) == pytest.approx(score)


def test_anls_divides_by_the_raw_lengths():
    # one edit over seven characters, of which two are blanks around
    assert anls(" pariz ", ["paris"]) == pytest.approx(1 - 1 / 7)


@pytest.mark.parametrize(
    ("said", "answer", "by_answer", "by_prediction"),
    [
        ("105", "100", 1, 1),
        ("106", "100", 0, 0),
        ("95", "100", 1, 0),  # 5 / 95 is more than 5%
        ("105.2", "100", 0, 1),  # 5.2 / 105.2 is less than 5%
        ("3%", "0.03", 1, 1),
        ("3", "0.03", 0, 0),
        ("0", "0", 1, 1),
        ("0", "0.0", 0, 0),  # nothing to divide by, so texts
        ("0", "10", 0, 0),
        ("Yes", "yes", 1, 1),
        ("yes ", "yes", 0, 0),
        ("12 dogs", "12", 0, 0),
        ("", "5", 0, 0),
    ],
)
def test_relaxed_accuracy_relative_to_either_number(said, answer, by_answer, by_prediction):
    assert relaxed(said, [answer]) == by_answer
    assert relaxed(said, [answer], relative_to_prediction=True) == by_prediction


@pytest.mark.parametrize(
    ("equal", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_leaves_one_annotator_out(equal, score):
    # of 10 subsets of 9, those without an equal answer have `equal`, the others one fewer
    worked = sum(min(1, (equal - one) / 3) for one in [1] * equal + [0] * (10 - equal)) / 10
    answers = ["Two"] * equal + ["red"] * (10 - equal)
    assert vqa("2.", answers) == pytest.approx(worked) == pytest.approx(score)


def test_vqa_accuracy_needs_several_annotators():
    with pytest.raises(ValueError, match="there are 1; use the metric exact"):
        vqa("a", ["a"])


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The two dogs", "2 dogs"),
        ("dont", "don't"),
        ("it's", "it 's"),
        ("e-mail", "e mail"),
        ("yes - no", "yes no"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("A\nB", "b"),
        ("None", "0"),
        ("youre", "you're"),
    ],
)
def test_evalai_normalization(text, normalized):
    assert normalize_answer(text) == normalized


def test_exact_ignores_case_and_outer_blanks_only():
    assert exact(" Dog ", ["cat", "dog"]) == 1
    assert exact("a dog", ["dog"]) == 0


def test_contains_is_case_blind_except_for_formulas():
    assert contains("The sign says STOP", ["stop"]) == 1
    assert contains("a\nb", ["a b"]) == 1
    assert contains(r"\frac { a } { b }", [r"\frac{a}{b}"]) == 0
    assert contains(r"= \frac { a } { b }", [r"\frac{a}{b}"], ignore_blanks=True) == 1
    assert contains("X", ["x"], ignore_blanks=True) == 0


def test_contains_folds_full_width_letters_on_request():
    assert contains("ＡＢ１", ["ab1"]) == 0
    assert contains("ＡＢ１", ["ab1"], fold_width=True) == 1


def test_letters():
    assert letter("B", ["b"]) == 1
    assert letter(None, ["B"]) == 0


OPTIONS = {"A": "3 km", "B": "4 km"}


@pytest.mark.parametrize(
    ("said", "choice"),
    [
        ("B", "B"),
        ("(A) is wrong, (B) it is", "B"),
        ("A or B", "B"),
        ("Answer: B.", "B"),
        ("it must have been about 3 km long", "A"),
        ("I am not sure at all about it", None),
    ],
)
def test_choices_of_mmmus_authors(said, choice):
    assert authors_choice(said, OPTIONS) == choice


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("The answer is 1,234.5", ["1234.5"], 1),
        ("x = 0.333", ["0.33"], 1),
        ("The result is a green apple", ["apple"], 1),
        ("so b", ["a"], 0),
        ("12", ["13"], 0),
        ("", ["5"], 0),
    ],
)
def test_open_answers_of_mmmus_authors(said, answers, score):
    assert open_score(said, answers) == score


@pytest.mark.parametrize(
    ("said", "answer", "kind", "options", "precision", "score"),
    [
        ("14", "14", "integer", (), None, 1),
        ("14.0", "14", "integer", (), None, 1),
        ("fourteen", "14", "integer", (), None, 0),
        ("1.46", "1.5", "float", (), 1, 1),
        ("1.44", "1.5", "float", (), 1, 0),
        ("[2007, 2008]", "[2007, 2008]", "list", (), None, 1),
        ("(B)", "8/11", "text", ("3/11", "8/11"), None, 1),
        ("8/11 ", "8/11", "text", ("3/11", "8/11"), None, 1),
        ("A", "B", "text", ("3/11", "8/11"), None, 0),
        ("9/11", "B", "text", ("3/12", "8/11"), None, 1),  # the nearest option
    ],
)
def test_mathvista(said, answer, kind, options, precision, score):
    found = mathvista(said, [answer], answer_type=kind, options=options, precision=precision)
    assert found == score
