"""Find the answer inside what a model wrote: after its reasoning, in a box, as a letter, yes or no.

Every function returns text that stands in the model's output, so that a result can be read back.
"""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from internvl3_mlx.metrics.edit_distance import similarity

THINKING_END = "</think>"
_ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_ANSWER_LINE = re.compile(
    r"(?:final answer|correct answer|answer|最终答案|答案)\s*(?:is|是)?\s*[:：]\s*(\S[^\n]*)",
    re.IGNORECASE,
)
_BOX_START = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_MARKS = "*`\"'$“”‘’"  # around an answer, from Markdown, LaTeX and quotation
_NOT_LETTERS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED_LETTER = re.compile(
    r"(?:answer|option|choice|选项|答案)(?:\s+is|\s*[是为])?\s*[:：]?\s*\(?([A-Z])\b(?![’'])"
)
LETTER_WINDOW = 5  # words from the end in which a letter alone counts as the answer


def without_thinking(text: str) -> str:
    """Return what follows the last ``</think>``, or all of the text without one.

    A thought that was cut before its end is no answer, so then nothing is left.
    """
    if THINKING_END in text:
        return text.rpartition(THINKING_END)[2].strip()
    return "" if text.lstrip().startswith("<think>") else text.strip()


def boxed_answers(text: str) -> list[str]:
    r"""Return the content of every complete ``\boxed{}``, in order; braces inside may nest."""
    found: list[str] = []
    for start in _BOX_START.finditer(text):
        depth = 1
        for index in range(start.end(), len(text)):
            if text[index - 1] == "\\":
                continue  # \{ and \} are characters of the answer
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if not depth:
                found.append(text[start.end() : index].strip())
                break
    return found


def final_answer(text: str) -> str:
    r"""Return the answer at the end of a reasoning, or the whole text where none is marked.

    Looked for in this order, the last one of each: ``\boxed{}``, ``<answer>``, and a line such as
    ``Final answer: ..``. Thinking, LaTeX text commands and marks around the answer are removed.
    """
    text = without_thinking(text)
    boxed = boxed_answers(text)
    tagged = [part.strip() for part in _ANSWER_TAG.findall(text) if part.strip()]
    lines = _ANSWER_LINE.findall(text)
    found = next((parts[-1] for parts in (boxed, tagged, lines) if parts), text)
    found = _TEXT_COMMAND.sub(r"\1", found).strip()
    stripped = found.strip(_MARKS + " ")
    return stripped.removesuffix(".").strip() if found is not text else stripped


def vote_key(text: str) -> str:
    """Return what two answers must share to count as the same in a majority vote.

    Of an answer that marks no final one it is the last line, as self-consistency takes it.
    """
    answer = final_answer(text)
    lines = [line for line in answer.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return " ".join(last.strip(_MARKS + " .").lower().split())


def option_letters(options: Sequence[str]) -> list[str]:
    """Return the letters A, B, … of some options."""
    return list(ascii_uppercase[: len(options)])


def option_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Find the option that an answer names by its letter or by its text; None if unclear.

    options: letter to text. These are the rules of VLMEvalKit before it asks a judge: exactly one
    letter alone among the last words, else exactly one option whose text occurs; an answer that
    states its letter (``the answer is B``) comes first.
    """
    answer = final_answer(text)
    if answer.strip(" .():*").upper() in options:
        return answer.strip(" .():*").upper()
    stated = [letter for letter in _STATED_LETTER.findall(answer) if letter in options]
    if stated:
        return stated[-1]
    words = answer.translate(_NOT_LETTERS).split()
    present = [letter for letter in options if letter in words]
    if len(present) == 1 and words.index(present[0]) > len(words) - LETTER_WINDOW:
        return present[0]
    if words and words[0] in options and answer.lstrip(" (*")[1:2] in (".", ")", ":", "*"):
        return words[0]
    return option_by_text(answer, options)


def option_by_text(answer: str, options: Mapping[str, str]) -> str | None:
    """Find the only option whose text occurs in an answer that is not much longer than they are."""
    lowered = answer.lower()
    if len(lowered) > 2 * sum(map(len, options.values())):
        return None
    named = [key for key, text in options.items() if text.strip() and text.lower() in lowered]
    return named[0] if len(named) == 1 else None


def first_letter(text: str, options: Mapping[str, str]) -> str | None:
    """Find the option as InternVL's MMMU script does: the first character, else the option's text.

    A single character is the answer whatever it is, so this may return a letter that no option has.
    """
    text = text.strip()
    if len(text) == 1:
        return text
    if text[:1] in options:
        return text[0]
    return next((key for key, option in options.items() if option and option in text), None)


def nearest_option(text: str, options: Sequence[str]) -> str | None:
    """Return the option with the smallest edit distance to a text; None without any options."""
    answer = text.strip().lower()
    return max(options, key=lambda option: similarity(answer, option.lower()), default=None)


def yes_or_no(text: str) -> str | None:
    """Return "yes" or "no" if exactly one of them is a word of the text, else None."""
    words = {*re.findall(r"[a-z]+", text.lower())} & {"yes", "no"}
    return words.pop() if len(words) == 1 else None


def yes_or_no_prefix(text: str) -> str | None:
    """Return "yes" or "no" by the first four characters, as MME's own script does."""
    start = text.strip().lower().replace(".", "")[:4]
    if start in ("y", "n"):
        return {"y": "yes", "n": "no"}[start]
    return next((word for word in ("yes", "no") if word in start), None)


def yes_unless_denied(text: str) -> str:
    """Return "no" if the first sentence has the word no or not, else "yes", as POPE's script."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & {*words} else "yes"
