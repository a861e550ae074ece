"""Read a record of any published format as a conversation, or as one that ends with two answers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from internvl3_mlx.prompt.reasoning import (
    CORRECT,
    INCORRECT,
    PRM_SYSTEM_PROMPT,
    critic_question,
)
from internvl3_mlx.records.json_values import (
    RecordError,
    decode_structured,
    describe_json,
)
from internvl3_mlx.training.data.formats import (
    ANSWER,
    CHOSEN,
    HISTORY,
    INPUT,
    LABEL,
    PAIRS,
    QUESTION,
    REJECTED,
    STEPS,
    TEXT,
    TURNS,
    RecordFormat,
    is_message,
    says,
)


@dataclass(frozen=True)
class ConversationRecord:
    """A record whatever its format: messages as JSON objects, and the last ones of a pair.

    label: whether the last message is a desirable answer, of an unpaired preference.
    """

    turns: list[Any]
    chosen: Any = None
    rejected: Any = None
    is_text: bool = False
    label: bool | None = None

    @property
    def is_pair(self) -> bool:
        return self.chosen is not None


def read_conversation(record: Mapping[str, Any], form: RecordFormat) -> ConversationRecord:
    """Read a record of a format as a conversation. Raises ``RecordError``."""
    keys = {role: key for key, role in form.fields.items()}
    if TEXT in keys:
        return ConversationRecord([_turn("user", _read_text(record, keys[TEXT]))], is_text=True)
    if STEPS in keys:
        return ConversationRecord([*_read_steps(record, keys)])
    if PAIRS in keys:
        return ConversationRecord([*_read_pairs(record[keys[PAIRS]], keys[PAIRS])])
    turns = _read_history(record, keys.get(HISTORY))
    if TURNS in keys:
        turns += _read_list(record, keys[TURNS])
    if QUESTION in keys:
        turns += _read_question(record, keys)
    if ANSWER in keys:
        turns += _read_turns(record, keys[ANSWER], "assistant")
    if REJECTED not in keys:
        label = read_label(record, keys[LABEL]) if LABEL in keys else None
        return ConversationRecord(_with_system(record, turns), label=label)
    rejected = _read_turns(record, keys[REJECTED], "assistant")
    chosen = _read_turns(record, keys[CHOSEN], "assistant") if CHOSEN in keys else []
    if not chosen:  # the last message is the chosen answer, or both lists begin with the prompt
        turns, chosen = ([], turns) if len(rejected) > 1 else (turns[:-1], turns[-1:])
    shared, chosen, rejected = _split_prompt(chosen, rejected)
    return ConversationRecord(_with_system(record, [*turns, *shared]), chosen, rejected)


LABELS = {"true": True, "1": True, "false": False, "0": False}  # as in CSV and TSV files


def read_label(record: Mapping[str, Any], key: str) -> bool:
    """Read whether an answer is desirable. Raises ``RecordError``."""
    value = record[key]
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise RecordError(
            f"{key!r} is {value!r}; expected true for a good answer or false; drop "
            "the key if it means something else"
        )
    return label


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _with_system(record: Mapping[str, Any], turns: list[Any]) -> list[Any]:
    """Put the record's own ``system`` in front."""
    system = record.get("system")
    if system in (None, ""):
        return turns
    if not isinstance(system, str):
        raise RecordError(f"'system' is {describe_json(system)}; expected text")
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if first.get("role", first.get("from")) in ("system", "developer"):
        if first.get("content", first.get("value")) == system:
            return turns
        raise RecordError("both a 'system' key and a system message; use one of them")
    return [_turn("system", system), *turns]


def _read_text(record: Mapping[str, Any], key: str) -> str:
    text = record.get(key)
    if isinstance(text, int | float) and not isinstance(text, bool) and isfinite(text):
        return str(text)  # of a column of numbers
    if not isinstance(text, str) or not text.strip():
        given = describe_json(text) if key in record else "missing"
        several = "it" if isinstance(text, list) else repr(f"{key}s")
        has_several = isinstance(text, list) or says(record.get(f"{key}s"))
        hint = f"; {several} has several, write the one to learn" if has_several else ""
        raise RecordError(f"{key!r} is {given}; expected text{hint}")
    return text


def _read_list(record: Mapping[str, Any], key: str) -> list[Any]:
    entries = decode_structured(record.get(key))
    if not isinstance(entries, list) or not entries:
        given = "empty" if entries == [] else describe_json(entries)
        raise RecordError(f"{key!r} is {given}; expected a list of messages")
    return [*entries]


def _read_turns(record: Mapping[str, Any], key: str, role: str) -> list[Any]:
    """Read a text, a message, or a list of messages."""
    value = record.get(key)
    decoded = decode_structured(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return [_turn(role, _read_text({key: value[0]}, key))]
    if isinstance(decoded, dict) and is_message(decoded):
        return [decoded]
    if isinstance(decoded, list) and decoded and all(map(is_message, decoded)):
        return [*decoded]
    return [_turn(role, _read_text(record, key))]


def _read_question(record: Mapping[str, Any], keys: Mapping[str, str]) -> list[Any]:
    turns = _read_turns(record, keys[QUESTION], "user")
    extra = record.get(keys.get(INPUT, ""))
    if extra in (None, ""):
        return turns
    if not isinstance(extra, str):
        raise RecordError(f"{keys[INPUT]!r} is {describe_json(extra)}; expected text")
    return [_turn("user", f"{_read_text(record, keys[QUESTION])}\n{extra}")]


def _read_history(record: Mapping[str, Any], key: str | None) -> list[Any]:
    history = decode_structured(record.get(key)) if key else None
    if history in (None, "", []):
        return []
    if isinstance(history, list) and all(map(is_message, history)):
        return history
    pairs = isinstance(history, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    )
    if not pairs:
        raise RecordError(f"{key!r} is not a list of [question, answer]; correct it")
    roles = ("user", "assistant")
    return [_turn(role, text) for pair in history for role, text in zip(roles, pair, strict=True)]


def _read_pairs(value: Any, key: str) -> Iterator[dict[str, Any]]:
    """Read questions with their answers: a list of {"user", "assistant"}."""
    entries = decode_structured(value)
    if not isinstance(entries, list) or not entries:
        raise RecordError(f"{key!r} is {describe_json(entries)}; expected questions with answers")
    for entry in entries:
        if not isinstance(entry, dict) or not {"user", "assistant"} <= entry.keys():
            raise RecordError(f"{key!r} contains {describe_json(entry)}; expected user, assistant")
        yield _turn("user", entry["user"])
        yield _turn("assistant", entry["assistant"])


def _split_prompt(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], Any, Any]:
    """Split what two lists of messages share from the one answer in which they differ."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if len(chosen) != shared + 1 or len(rejected) != shared + 1:
        raise RecordError(
            "the chosen and the rejected conversation differ in more than their last answer; "
            "expected the same messages before it"
        )
    return chosen[:shared], chosen[-1], rejected[-1]


def _read_steps(record: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Turn scored steps into the critic's conversation: + for a score above 0, - otherwise.

    Source: the data pipeline of VisualPRM400K.
    """
    steps = decode_structured(record[keys[STEPS]])
    if not isinstance(steps, list) or not steps:
        raise RecordError(f"{keys[STEPS]!r} is {describe_json(steps)}; expected a list of steps")
    yield _turn("system", PRM_SYSTEM_PROMPT)
    question = _read_text(record, keys[QUESTION])
    if "<image>" not in question and (record.get("image") or record.get("images")):
        question = f"<image>\n{question}"
    text = critic_question(question, "")
    for step in steps:
        score = step.get("score") if isinstance(step, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise RecordError(f"{keys[STEPS]!r} contains a step without a score; expected a number")
        yield _turn("user", text + _read_text(step, "step"))
        yield _turn("assistant", CORRECT if score > 0 else INCORRECT)
        text = ""
