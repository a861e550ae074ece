"""Rows to what is trained on: ids, which of them are learned, positions, and the pictures' tiles.

Learned are the assistant's words and the <|im_end|> behind them, in every turn; nothing else. The
ids are those that generation reads for the same talk.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from internvl3_mlx.errors import DataError, PromptError, UserError
from internvl3_mlx.generation.processor import ProcessedImage, Processor
from internvl3_mlx.prompt.messages import (
    GeneratedAnswer,
    Message,
    MessageMedia,
    Segment,
    TextSegment,
)
from internvl3_mlx.prompt.template import MESSAGE_START
from internvl3_mlx.prompt.tokenizer import IM_END
from internvl3_mlx.prompt.v2pe import DELTAS, image_spans, visual_positions
from internvl3_mlx.training.config import RANDOM, DataSettings
from internvl3_mlx.training.data.dataset import Record
from internvl3_mlx.training.data.media import MediaLoader, MediaShape
from internvl3_mlx.training.data.schema import ParsedRecord, RecordError, parse_record


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """One conversation. ids: (L,) int32. supervised: (L,) bool, True on what is learned.

    positions: (L,) float32. seen: the pictures in the order of their tokens. place: file and line.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    images: tuple[ProcessedImage, ...]
    location: str


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """A question and two answers. ``prompt`` ends with the opened assistant turn; each answer with
    <|im_end|>: (A,) int32."""

    prompt: TrainingSample
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def location(self) -> str:
        return self.prompt.location


@dataclass(frozen=True)
class RecordSize:
    """What a row takes: tokens, tiles, tokens that are learned; ``cut``: those over the limit."""

    tokens: int
    tiles: int
    loss_tokens: int
    truncated_tokens: int


class SampleTooLongError(Exception):
    """A sample that cannot be cut to the limit, and why."""


@dataclass(frozen=True)
class RecordEncoder:
    """Writes rows as one model reads them. ``system``: in the place of the model's own text."""

    processor: Processor
    system: str | None = None

    def encode_conversation(
        self, record: ParsedRecord, media: MediaShape
    ) -> tuple[np.ndarray, np.ndarray]:
        """Write a whole talk: ids (L,) int32, ending with <|im_end|>; learned (L,) bool."""
        turns = self.build_messages(record, media)
        segments = self.render(turns[:-1], record)
        answer = GeneratedAnswer(turns[-1].token_ids)
        return self.encode_segments([*segments, answer, TextSegment(IM_END)])

    def encode_preference(
        self, record: ParsedRecord, media: MediaShape
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Write a question, up to the opened turn, and the answers, each with its <|im_end|>."""
        ids, _ = self.encode_segments(self.render(self.build_messages(record, media), record))
        end = self.processor.tokenizer.im_end_id
        answers = [[*self.encode_answer(text), end] for text in record.answers or ()]
        return ids, [np.array(answer, np.int32) for answer in answers]

    def render(self, messages: Sequence[Message], record: ParsedRecord) -> list[Segment]:
        system = self.system if record.system is None else record.system
        return self.processor.template.render(messages, system)

    def build_messages(self, record: ParsedRecord, media: MediaShape) -> list[Message]:
        """Give the turns as the prompt rooms take them, answers in the ids they are learned in."""
        tiles, frames = iter(media.image_tiles), iter(media.video_frames)
        turns = []
        for said in record.messages:
            if said.role == "assistant":
                turns.append(
                    Message("assistant", said.text, (), tuple(self.encode_answer(said.text)))
                )
                continue
            shown = [MessageMedia((next(tiles),)) for _ in range(said.num_images)]
            shown += [MessageMedia((1,) * next(frames), "video") for _ in range(said.num_videos)]
            turns.append(Message("user", said.text, tuple(shown)))
        return turns

    def encode_answer(self, text: str) -> list[int]:
        """Cut an answer as it reads behind the opened turn.

        Where its first letters would melt into the turn's opening, as a newline does, it is cut
        alone: generation never finds them melted.
        """
        encode = self.processor.tokenizer.encode
        opened = encode([ASSISTANT_START], 0, bos=False)
        together = encode([ASSISTANT_START, TextSegment(text, untrusted=True)], 0, bos=False)
        if together[: len(opened)] == opened and len(together) > len(opened):
            return together[len(opened) :]
        return encode([TextSegment(text, untrusted=True)], 0, bos=False)

    def encode_segments(self, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Turn segments into ids, and mark each answer with the <|im_end|> that follows it."""
        tokenizer, per_tile = self.processor.tokenizer, self.processor.config.num_image_token
        ids: list[int] = []
        learned: list[bool] = []
        for part, answer in split_at_answers(segments):
            new = tokenizer.encode(part, per_tile, bos=not ids)
            ends = bool(learned) and learned[-1]
            if ends and new[:1] != [tokenizer.im_end_id]:
                raise PromptError(
                    f"the chat template does not end an answer with {IM_END}; "
                    'put "template": "internvl2_5" into config.json'
                )
            ids += new
            learned += [answer] * len(new)
            if ends:
                learned[len(ids) - len(new)] = True
        return np.array(ids, np.int32), np.array(learned, bool)


@dataclass(frozen=True)
class Preprocessor:
    """Makes samples for one model."""

    processor: Processor
    config: DataSettings

    @cached_property
    def media_loader(self) -> MediaLoader:
        return MediaLoader(self.processor, self.config)

    @cached_property
    def encoder(self) -> RecordEncoder:
        return RecordEncoder(self.processor, self.config.system)

    def build_sample(self, record: Record, epoch: int = 0) -> TrainingSample:
        """Make the sample of a row, as it is drawn in this epoch; raises ``DataError``."""
        with error_location(record.location):
            row, draw = self.parse(record), self.random_generator(record, epoch)
            looked = self.media_loader.load(row, record.file, draw)
            ids, learned = self.encoder.encode_conversation(row, looked.shape)
            length = self.truncated_length(ids, learned)
            ids, learned = ids[:length], learned[:length]
            seen = tuple(looked.in_token_order(row))
            return TrainingSample(
                ids, learned, self.build_positions(ids, draw), seen, record.location
            )

    def build_pair(self, record: Record, epoch: int = 0) -> PreferencePair:
        """Make the pair of a preference row; raises ``DataError``."""
        with error_location(record.location):
            row, draw = self.parse(record), self.random_generator(record, epoch)
            looked = self.media_loader.load(row, record.file, draw)
            ids, answers = self.encoder.encode_preference(row, looked.shape)
            chosen, rejected = (a[: self.answer_limit(ids)] for a in answers)
            seen = tuple(looked.in_token_order(row))
            nothing = np.zeros(len(ids), bool)
            prompt = TrainingSample(
                ids, nothing, self.build_positions(ids, draw), seen, record.location
            )
            return PreferencePair(prompt, chosen, rejected)

    def measure(self, record: Record) -> RecordSize:
        """Count what a row takes without reading its pixels.

        Raises ``RowFault`` or ``DataError`` for what is wrong, ``TooLong`` for what cannot be cut.
        """
        row = self.parse(record)
        shape = self.media_loader.measure(row, record.file)
        if row.answers is None:
            ids, learned = self.encoder.encode_conversation(row, shape)
            kept = self.truncated_length(ids, learned)
            return RecordSize(kept, shape.num_tiles, int(learned[:kept].sum()), len(ids) - kept)
        ids, answers = self.encoder.encode_preference(row, shape)
        room = self.answer_limit(ids)
        lengths = [min(len(answer), room) for answer in answers]
        lost = sum(len(answer) for answer in answers) - sum(lengths)
        return RecordSize(len(ids) + sum(lengths), shape.num_tiles, sum(lengths), lost)

    def parse(self, record: Record) -> ParsedRecord:
        """Read a row and see that it is of the kind that the method learns from."""
        row = parse_record(record.value)
        if self.config.reads_pairs and row.answers is None:
            raise RecordError(
                "a conversation, but --method mpo compares answers; wanted 'question', 'chosen' "
                "and 'rejected', or --method sft"
            )
        if not self.config.reads_pairs and row.answers is not None:
            raise RecordError(
                f"two answers to compare, but --method {self.config.method} learns from "
                "conversations; wanted 'messages' or 'conversations', or --method mpo"
            )
        return row

    def random_generator(self, record: Record, epoch: int) -> np.random.Generator:
        """Give a row its own chance, whatever was read before it."""
        return np.random.default_rng((self.config.seed, epoch, record.index))

    def truncated_length(self, input_ids: np.ndarray, loss_mask: np.ndarray) -> int:
        """Say how many ids are kept: as many as the limit, but no picture is ever cut."""
        limit = self.config.max_seq_length
        if len(input_ids) <= limit:
            return len(input_ids)
        if self.truncates_image(input_ids, limit):
            raise SampleTooLongError(
                f"{len(input_ids):,} tokens, and a picture lies beyond {limit:,}"
            )
        if not loss_mask[:limit].any():
            raise SampleTooLongError(
                f"{len(input_ids):,} tokens, and no answer begins within {limit:,}"
            )
        return limit

    def answer_limit(self, prompt_ids: np.ndarray) -> int:
        """Say how many tokens an answer behind this prompt may have."""
        room = self.config.max_seq_length - len(prompt_ids)
        if room < 1:
            raise SampleTooLongError(
                f"a prompt of {len(prompt_ids):,} tokens, and no answer begins within "
                f"{self.config.max_seq_length:,}"
            )
        return room

    def truncates_image(self, input_ids: np.ndarray, limit: int) -> bool:
        tokenizer = self.processor.tokenizer
        return bool(np.isin(input_ids[limit:], (tokenizer.image_id, tokenizer.image_end_id)).any())

    def build_positions(self, input_ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Place every token; a random step is drawn anew for each picture or frame."""
        image_id, delta = self.processor.tokenizer.image_id, self.config.position_delta
        if delta != RANDOM:
            return visual_positions(input_ids, image_id, float(delta))
        runs = len(image_spans(input_ids, image_id))
        steps = generator.choice(DELTAS, size=runs).tolist()
        return visual_positions(input_ids, image_id, steps if runs else 1.0)


@contextmanager
def error_location(location: str) -> Iterator[None]:
    """Say where in the data something went wrong."""
    try:
        yield
    except DataError:
        raise
    except (RecordError, UserError) as error:
        raise DataError(f"{location}: {error}") from error
    except SampleTooLongError as error:
        raise DataError(
            f"{location}: {error}; raise --max-seq-length or lower --max-tiles"
        ) from error


ASSISTANT_START = TextSegment(MESSAGE_START.format(role="assistant"))


def split_at_answers(segments: Sequence[Segment]) -> Iterator[tuple[list[Segment], bool]]:
    """Split segments at the answers, and say which part is one."""
    waiting: list[Segment] = []
    for segment in segments:
        if isinstance(segment, GeneratedAnswer):
            yield waiting, False
            yield [segment], True
            waiting = []
        else:
            waiting.append(segment)
    yield waiting, False
