"""What the training methods read: conversations, preference pairs, or answers with a label."""

from dataclasses import dataclass, replace

import regex

from internvl3_mlx.metrics.box_scores import NO_BOX, first_box
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.data.schema import ParsedRecord, RecordError


@dataclass(frozen=True)
class RecordKind:
    """What a training method reads: its names, the keys of one, and such a method."""

    singular: str
    plural: str
    keys: str
    method: str


CONVERSATION = RecordKind("a conversation", "conversations", "'messages' or 'conversations'", "sft")
PAIR = RecordKind(
    "a preference pair", "preference pairs", "'question', 'chosen' and 'rejected'", "mpo"
)
UNPAIRED = RecordKind(
    "an answer with a label", "answers with a label", "'prompt', 'completion' and 'label'", "kto"
)


def split_last_answer(record: ParsedRecord) -> ParsedRecord:
    """Take the last answer of a conversation out of it, to sample others in its place."""
    if record.is_text:
        raise RecordError(
            "plain text, but --method grpo answers questions; expected 'messages' or "
            "'conversations', or use --method sft"
        )
    *prompt, last = record.messages
    return replace(record, messages=tuple(prompt), answers=(last.text,))


def check_expected(record: ParsedRecord, reward: str | None) -> None:
    """Raise ``RecordError`` if no answer could be rewarded by comparison with a record's."""
    [expected] = record.answers or [""]
    if reward == "regex":
        try:
            regex.compile(expected, regex.DOTALL)
        except regex.error as error:
            raise RecordError(
                f"the answer is not a regular expression ({error}), and --reward regex uses it as "
                "one; correct it"
            ) from error
    if reward == "iou" and first_box(expected) == NO_BOX:
        raise RecordError(
            "the answer has no box, and --reward iou compares boxes; write "
            "<box>[[x1, y1, x2, y2]]</box>"
        )


def check_kind(record: ParsedRecord, config: TrainConfig) -> None:
    """Raise ``RecordError`` for a record that the training method does not read."""
    given = CONVERSATION if record.answers is None else PAIR if record.label is None else UNPAIRED
    wanted = PAIR if config.reads_pairs else UNPAIRED if config.reads_labels else CONVERSATION
    if given != wanted:
        raise RecordError(
            f"{given.singular}, but --method {config.method} needs {wanted.plural}; expected "
            f"{wanted.keys}, or use --method {given.method}"
        )
