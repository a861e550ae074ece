"""The published formats of training records as one table: the keys of each, and what they mean.

Whatever format a record has, it is read as a conversation (``turns``), or as a conversation that
ends with a question and two answers to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from internvl3_mlx.files import nearest_names
from internvl3_mlx.records.json_values import RecordError

# What a key means. Turns are the messages of a conversation; a text stands for one turn.
TURNS, QUESTION, INPUT, HISTORY, ANSWER = "turns", "question", "input", "history", "answer"
CHOSEN, REJECTED, TEXT, STEPS, PAIRS = "chosen", "rejected", "text", "steps", "pairs"
LABEL = "label"  # whether the answer is desirable
OPTIONAL = (INPUT, HISTORY)  # may be absent
SIMILAR_KEY = 0.75  # how alike a key must be to a known one to be taken for a misspelling


@dataclass(frozen=True)
class RecordFormat:
    """A published format. fields: key -> what it means. refused: why it cannot be trained on.

    weak: used only if no other format has its keys in the record.
    """

    name: str
    fields: Mapping[str, str]
    refused: str = ""
    weak: bool = False

    @cached_property
    def required(self) -> frozenset[str]:
        """The keys that make a record one of this format."""
        return frozenset(key for key, role in self.fields.items() if role not in OPTIONAL)

    @property
    def label(self) -> str:
        """The required keys for an error: ``'prompt', 'completion'``."""
        return ", ".join(repr(key) for key in self.fields if key in self.required)


# a question and its answer under keys that no published format has together
QUESTION_KEYS = ("question", "prompt", "query", "instruction", "problem", "input")
ANSWER_KEYS = ("answer", "completion", "response", "output", "solution")
PUBLISHED_PAIRS = (
    *(("question", "answer"), ("prompt", "completion"), ("query", "response")),
    ("instruction", "output"),
)
OTHER_PAIRS = tuple(
    (question, answer)
    for question in QUESTION_KEYS
    for answer in ANSWER_KEYS
    if (question, answer) not in PUBLISHED_PAIRS and (question != "input" or answer == "output")
)
INPUT_OF = {"instruction": {"input": INPUT}}

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
    *(
        RecordFormat(
            "other question/answer keys",
            {question: QUESTION, **INPUT_OF.get(question, {}), answer: ANSWER},
            weak=True,
        )
        for question, answer in OTHER_PAIRS
    ),
    RecordFormat(
        "prompt only",
        {"prompt": QUESTION},
        refused="a prompt without an answer; add 'completion', or 'chosen' and 'rejected'",
        weak=True,
    ),
)  # fmt: skip
MEDIA_KEYS = ("image", "images", "video", "videos", "clip")
COMMON_KEYS = (*MEDIA_KEYS, "file_name", "system", "objects")
# of a message: whether its answer is trained on, in the words of ms-swift, OpenAI and axolotl
LOSS_KEYS = ("loss", "weight", "loss_scale", "train", "training")
MESSAGE_KEYS = (
    *("role", "from", "content", "value", *LOSS_KEYS),
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
        f"the record has {given}; {_similar_keys(record)}expected 'messages', 'conversations', or "
        "'question' with 'answer', or with 'chosen' and 'rejected'; the guide to training lists "
        "all formats"
    )


def _similar_keys(record: Mapping[str, Any]) -> str:
    """Suggest the keys of formats that those of a record are like, or the list inside it."""
    known = dict.fromkeys(key for form in FORMATS for key in form.required)
    similar = {
        str(key): near[0]
        for key in record
        if str(key) not in MEDIA_KEYS
        and (near := nearest_names(str(key).lower(), known, cutoff=SIMILAR_KEY))
    }
    hints = [f"{new!r} for {old!r}" for old, new in similar.items() if old != new]
    if hints:
        return f"write {', '.join(hints)}; "
    for key, value in record.items():
        first = value[0] if isinstance(value, list) and value else None
        if is_message(first):
            return f"write 'messages' for {key!r}; "
        if format_name(first):
            return f"the records are in {key!r}, save that list alone; "
    return ""


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
    found = {str(key): None for key, value in record.items() if key not in known and says(value)}
    for key in form.fields:
        entries = record[key] if isinstance(record.get(key), list) else []
        for entry in filter(is_message, entries):
            unknown = (name for name, x in entry.items() if says(x) and name not in MESSAGE_KEYS)
            found |= {f"message.{name}": None for name in unknown}
    return tuple(found)


def says(value: Any) -> bool:
    """Whether the value of a key says something; False and 0 do."""
    return value is not None and not (isinstance(value, str | bytes | list | dict) and not value)


def is_message(value: Any) -> bool:
    """Whether a value of a record is a message of a conversation."""
    return isinstance(value, dict) and ("role" in value or "from" in value)
