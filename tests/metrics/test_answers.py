import pytest

from internvl3_mlx.metrics.answers import (
    boxed_answers,
    final_answer,
    first_letter,
    nearest_option,
    option_letter,
    vote_key,
    without_thinking,
    yes_or_no,
    yes_or_no_prefix,
    yes_unless_denied,
)

ANIMALS = {"A": "cat", "B": "dog", "C": "wild boar"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"So \boxed{12}.", ["12"]),
        (r"\boxed{\frac{1}{2}} and \boxed{ B }", [r"\frac{1}{2}", "B"]),
        (r"\boxed{a\}b}", [r"a\}b"]),
        (r"\fbox{7}", ["7"]),
        (r"\boxed{cut at the end", []),
        ("none", []),
    ],
)
def test_boxes_are_found_with_nested_braces(text, found):
    assert boxed_answers(text) == found


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("dog", "dog"),
        ("a dog.", "a dog."),
        (r"First 3, then \boxed{4}. Final answer: 5", "4"),
        (r"Answer: \boxed{\text{New York}}", "New York"),
        ("Two and two.\nFinal answer: 4.", "4"),
        ("Answer: 3\nwait\nAnswer: **5**", "5"),
        ("The answer is: B", "B"),
        ("<think>Answer: 9</think>\n\n12", "12"),
        ("<think>a\n</think>\n<answer> 7 </answer>", "7"),
        ("<think>never ended, answer: 9", ""),
        ("最终答案：三", "三"),
        ("", ""),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


def test_thinking_is_cut_at_its_last_end():
    assert without_thinking("<think>a</think>b<think>c</think> d ") == "d"
    assert without_thinking(" x ") == "x"


def test_votes_ignore_case_blanks_and_marks_and_take_the_last_line():
    assert vote_key("It is\n a  Dog.") == vote_key(r"\boxed{A dog}") == "a dog"
    assert vote_key("") == vote_key("\n") == ""


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. dog", "B"),
        (r"\boxed{C}", "C"),
        ("The answer is B because A is not.", "B"),
        ("I see a dog", "B"),
        ("It is the wild boar", "C"),
        ("a cat or a dog", None),
        ("A cat sits there and looks at the other one", None),
        ("none of them", None),
        ("", None),
        ("D", None),
    ],
)
def test_option_letters(text, letter):
    assert option_letter(text, ANIMALS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("D", "D"), ("Bus", "B"), ("the dog", "B"), ("unsure", None)],
)
def test_the_mmmu_script_takes_the_first_character(text, letter):
    assert first_letter(text, ANIMALS) == letter


def test_the_nearest_option_is_the_one_with_the_fewest_edits():
    assert nearest_option("Dogs", ["cat", "dog", "wild boar"]) == "dog"
    assert nearest_option("x", []) is None


@pytest.mark.parametrize(
    ("text", "word", "prefix", "pope"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("No.", "no", "no", "no"),
        ("No, there is not.", "no", "no", "no"),
        ("There is no dog.", "no", None, "no"),
        ("yes and no", None, "yes", "no"),
        ("I do not know", None, None, "no"),
        ("A dog. No cat.", "no", None, "yes"),
        ("y", None, "yes", "yes"),
        ("maybe", None, None, "yes"),
        ("Nothing here", None, "no", "yes"),
    ],
)
def test_three_ways_to_read_yes_or_no(text, word, prefix, pope):
    assert (yes_or_no(text), yes_or_no_prefix(text), yes_unless_denied(text)) == (
        word,
        prefix,
        pope,
    )
