"""The published formats of training records as one table: the keys of each, and what they mean.

Whatever format a record has, it is read as a conversation (``turns``), or as a conversation that
ends with a question and two answers to it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

# What a key means. Turns are the messages of a conversation; a text stands for one turn.
TURNS, QUESTION, INPUT, HISTORY, ANSWER = "turns", "question", "input", "history", "answer"
CHOSEN, REJECTED, TEXT, STEPS, PAIRS = "chosen", "rejected", "text", "steps", "pairs"
LABEL = "label"  # whether the answer is desirable
OPTIONAL = (INPUT, HISTORY)  # may be absent


@dataclass(frozen=True)
class RecordFormat:
    """A published format. fields: key -> what it means. refused: why it cannot be trained on.

    weak: used only if no other format has its keys in the record.
    """

    name: str
    fields: Mapping[str, str]
    refused: str = ""
    weak: bool = False

    @property
    def required(self) -> frozenset[str]:
        """The keys that make a record one of this format."""
        return frozenset(key for key, role in self.fields.items() if role not in OPTIONAL)

    @property
    def label(self) -> str:
        """The required keys for an error: ``'prompt', 'completion'``."""
        return ", ".join(repr(key) for key in self.fields if key in self.required)


FORMATS = (
    RecordFormat("OpenAI messages", {"messages": TURNS}),
    RecordFormat("LLaVA / ShareGPT conversations", {"conversations": TURNS}),
    RecordFormat(
        "MMPR pair", {"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}
    ),
    RecordFormat("TRL pair", {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}),
    RecordFormat("TRL pair with implicit prompt", {"chosen": CHOSEN, "rejected": REJECTED}),
    RecordFormat(
        "LLaMA-Factory Alpaca pair",
        {"instruction": QUESTION, "input": INPUT, "history": HISTORY, "chosen": CHOSEN,
         "rejected": REJECTED},
    ),
    RecordFormat(
        "LLaMA-Factory ShareGPT pair",
        {"conversations": TURNS, "chosen": CHOSEN, "rejected": REJECTED},
    ),
    RecordFormat("messages pair", {"messages": TURNS, "chosen": CHOSEN, "rejected": REJECTED}),
    RecordFormat("ms-swift RLHF", {"messages": TURNS, "rejected_response": REJECTED}),
    RecordFormat("ms-swift RLHF", {"messages": TURNS, "rejected_messages": REJECTED}),
    RecordFormat(
        "ms-swift RLHF query/response",
        {"query": QUESTION, "history": HISTORY, "response": CHOSEN, "rejected_response": REJECTED},
    ),
    RecordFormat(
        "ms-swift query/response", {"query": QUESTION, "history": HISTORY, "response": ANSWER}
    ),
    RecordFormat("prompt/completion", {"prompt": QUESTION, "completion": ANSWER}),
    RecordFormat("question/answer", {"question": QUESTION, "answer": ANSWER}),
    RecordFormat(
        "Alpaca",
        {"instruction": QUESTION, "input": INPUT, "history": HISTORY, "output": ANSWER},
    ),
    RecordFormat("Cauldron texts", {"texts": PAIRS}),
    RecordFormat("VisualPRM steps", {"question": QUESTION, "steps_with_score": STEPS}),
    RecordFormat("plain text", {"text": TEXT}, weak=True),
    RecordFormat(
        "TRL unpaired preference",
        {"prompt": QUESTION, "completion": ANSWER, "label": LABEL},
    ),
    RecordFormat(
        "unpaired question/answer", {"question": QUESTION, "answer": ANSWER, "label": LABEL}
    ),
    RecordFormat("unpaired messages", {"messages": TURNS, "label": LABEL}),
    RecordFormat("unpaired messages", {"messages": TURNS, "kto_tag": LABEL}),
    RecordFormat("unpaired conversations", {"conversations": TURNS, "label": LABEL}),
    RecordFormat("LLaMA-Factory KTO", {"conversations": TURNS, "kto_tag": LABEL}),
    RecordFormat(
        "LLaMA-Factory Alpaca KTO",
        {"instruction": QUESTION, "input": INPUT, "history": HISTORY, "output": ANSWER,
         "kto_tag": LABEL},
    ),
    RecordFormat(
        "prompt only",
        {"prompt": QUESTION},
        refused="a prompt without an answer; add 'completion', or 'chosen' and 'rejected'",
        weak=True,
    ),
)  # fmt: skip
MEDIA_KEYS = ("image", "images", "video", "videos", "clip")
COMMON_KEYS = (*MEDIA_KEYS, "system", "objects")
MESSAGE_KEYS = (
    *("role", "from", "content", "value", "loss", "weight", "loss_scale"),
    *("image", "images", "video", "videos"),
)
# keys that change what is learned and that no format here has: refused rather than ignored
REFUSED_KEYS = {
    "tools": "tool use is not supported; drop the key",
    "functions": "tool use is not supported; drop the key",
    "audio": "audio is not supported",
    "audios": "audio is not supported",
    "rejected_images": "a pair has the same images for both answers",
    "loss_scale": "expected 'loss' or 'weight' in a message",
    "weight": "expected 'loss' or 'weight' in a message, or a meta JSON with repeat_time",
    "margin": "margins between answers are not supported",
    "label": "expected 'prompt', 'completion' and 'label', or 'messages' and 'label'",
    "kto_tag": "expected 'messages' or 'conversations' and 'kto_tag'",
}


def find_format(record: Mapping[str, Any]) -> RecordFormat:
    """Return the format of a record; raises ``RecordError`` if there is none, or more than one."""
    present = {key for key, value in record.items() if value is not None}
    found = [form for form in FORMATS if form.required <= present]
    found = [form for form in found if not any(form.required < o.required for o in found)]
    strong = [form for form in found if not form.weak]
    found = strong or found
    if len(found) > 1:
        names = " and ".join(form.label for form in found)
        raise RecordError(f"both {names}; use one format per record")
    return found[0] if found else _nearest_format(record)


def format_name(record: Any) -> str | None:
    """Return the name of a record's format, or None if it has none."""
    try:
        return find_format(record).name if isinstance(record, dict) else None
    except RecordError:
        return None


def _nearest_format(record: Mapping[str, Any]) -> RecordFormat:
    """Return the format that most of the keys belong to, so that its missing keys are named."""
    shares = [len(form.required & record.keys()) / len(form.required) for form in FORMATS]
    if max(shares) > 0:
        return FORMATS[shares.index(max(shares))]
    given = f"only {', '.join(map(repr, record))}" if record else "no keys"
    raise RecordError(
        f"the record has {given}; expected 'messages', 'conversations', or 'question' with "
        "'chosen' and 'rejected'; the guide to training lists all formats"
    )


def check_refused_keys(record: Mapping[str, Any], form: RecordFormat) -> None:
    """Raise ``RecordError`` for a key that would change what is learned."""
    if form.refused:
        raise RecordError(f"{form.name}: {form.refused}")
    for key, advice in REFUSED_KEYS.items():
        if key not in form.fields and record.get(key) not in (None, "", [], {}):
            raise RecordError(f"the record has {key!r}, which training does not read: {advice}")


def unused_keys(record: Mapping[str, Any], form: RecordFormat) -> tuple[str, ...]:
    """List the keys that nothing reads; those of messages as ``message.KEY``."""
    known = {*form.fields, *COMMON_KEYS}
    found = {str(key): None for key, value in record.items() if key not in known and value}
    for key in form.fields:
        entries = record[key] if isinstance(record.get(key), list) else []
        for entry in filter(_is_message, entries):
            unknown = (name for name, value in entry.items() if value and name not in MESSAGE_KEYS)
            found |= {f"message.{name}": None for name in unknown}
    return tuple(found)


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
    if not isinstance(text, str) or not text.strip():
        given = describe_json(text) if key in record else "missing"
        raise RecordError(f"{key!r} is {given}; expected text")
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
    if isinstance(decoded, dict) and _is_message(decoded):
        return [decoded]
    if isinstance(decoded, list) and decoded and all(map(_is_message, decoded)):
        return [*decoded]
    return [_turn(role, _read_text(record, key))]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


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
