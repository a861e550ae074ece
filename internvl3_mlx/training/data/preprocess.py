"""Turn a record into a training sample: token ids, loss mask, V2PE positions and image tiles.

Loss is computed on the assistant's tokens and the <|im_end|> after them, in every turn, and on
nothing else. The ids are those that generation reads for the same conversation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from internvl3_mlx.errors import DataError, PromptError, UserError
from internvl3_mlx.generation.processor import ProcessedImage, Processor
from internvl3_mlx.prompt.answer_tokens import encode_answer
from internvl3_mlx.prompt.messages import (
    GeneratedAnswer,
    Message,
    MessageMedia,
    Segment,
    TextSegment,
    message_segments,
    split_at_answers,
)
from internvl3_mlx.prompt.reasoning import CORRECT, INCORRECT
from internvl3_mlx.prompt.template import Template
from internvl3_mlx.prompt.tokenizer import IM_END, Tokenizer
from internvl3_mlx.prompt.v2pe import DELTAS, image_spans, visual_positions
from internvl3_mlx.training.batch import Prompt
from internvl3_mlx.training.config import TrainConfig
from internvl3_mlx.training.config_fields import RANDOM
from internvl3_mlx.training.data.media import MediaLoader, MediaShape
from internvl3_mlx.training.data.record_files import Record
from internvl3_mlx.training.data.record_kinds import check_expected, check_kind, split_last_answer
from internvl3_mlx.training.data.schema import ParsedRecord, RecordError, fill_boxes, parse_record


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """One conversation of L tokens.

    input_ids: (L,) int32. loss_mask: (L,) bool, True on the tokens whose loss counts.
    positions: (L,) float32. images: images and video frames, in the order of their tokens.
    location: file and line of the record.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    images: tuple[ProcessedImage, ...]
    location: str


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """A prompt and two answers to it.

    prompt: ends with the opening of the assistant's turn. chosen, rejected: (A,) int32, each ends
    with <|im_end|>.
    """

    prompt: TrainingSample
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def location(self) -> str:
        return self.prompt.location


@dataclass(frozen=True, eq=False)
class UnpairedPreference:
    """A prompt and an answer to it that is desirable or not.

    prompt, answer: as those of a ``PreferencePair``. answer_limit: the most tokens that any answer
    to this prompt may have.
    """

    prompt: TrainingSample
    answer: np.ndarray
    desirable: bool
    answer_limit: int

    @property
    def location(self) -> str:
        return self.prompt.location


Sample = TrainingSample | PreferencePair | UnpairedPreference | Prompt


@dataclass(frozen=True)
class RecordSize:
    """Tokens, tiles and loss tokens of a record; ``truncated_tokens`` do not fit the limit."""

    tokens: int
    tiles: int
    loss_tokens: int
    truncated_tokens: int


class SampleTooLongError(Exception):
    """A sample that cannot be truncated to the limit, and why."""


@dataclass(frozen=True)
class Preprocessor:
    """Builds the training samples of one model."""

    processor: Processor
    config: TrainConfig

    @cached_property
    def media_loader(self) -> MediaLoader:
        return MediaLoader(self.processor, self.config)

    @cached_property
    def encoder(self) -> "RecordEncoder":
        processor = self.processor
        per_tile = processor.config.num_image_token
        return RecordEncoder(self.tokenizer, processor.template, per_tile, self.config.system)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer

    def build(self, record: Record, epoch: int = 0) -> Sample:
        """Build what the training method reads of a record; raises ``DataError``."""
        splits_answers = self.config.reads_preferences or self.config.samples_answers
        return (self.build_preference if splits_answers else self.build_sample)(record, epoch)

    def build_sample(self, record: Record, epoch: int = 0) -> TrainingSample:
        """Build the sample of a record with the random draws of ``epoch``; raises ``DataError``."""
        with error_location(record.location):
            parsed, generator = self.parse(record), self.random_generator(record, epoch)
            media = self.media_loader.load(parsed, record.file, generator)
            input_ids, loss_mask = self.encoder.encode_conversation(parsed, media.shape)
            length = self.truncated_length(input_ids, loss_mask)
            input_ids, loss_mask = input_ids[:length], loss_mask[:length]
            return TrainingSample(
                input_ids,
                loss_mask,
                self.build_positions(input_ids, generator),
                tuple(media.in_token_order(parsed)),
                record.location,
            )

    def build_preference(
        self, record: Record, epoch: int = 0
    ) -> PreferencePair | UnpairedPreference | Prompt:
        """Build the preference or the prompt of a record; raises ``DataError``."""
        with error_location(record.location):
            parsed, generator = self.parse(record), self.random_generator(record, epoch)
            media = self.media_loader.load(parsed, record.file, generator)
            input_ids, answers = self.encoder.encode_preference(parsed, media.shape)
            limit = self.answer_limit(input_ids)
            kept = [answer[:limit] for answer in answers]
            prompt = TrainingSample(
                input_ids,
                np.zeros(len(input_ids), bool),
                self.build_positions(input_ids, generator),
                tuple(media.in_token_order(parsed)),
                record.location,
            )
            if self.config.samples_answers:
                assert parsed.answers is not None
                return Prompt(
                    prompt.input_ids, prompt.positions, prompt.images, prompt.location,
                    parsed.answers[0], limit,
                )  # fmt: skip
            if parsed.label is None:
                return PreferencePair(prompt, *kept)
            return UnpairedPreference(prompt, kept[0], parsed.label, limit)

    def measure(self, record: Record, parsed: ParsedRecord | None = None) -> RecordSize:
        """Measure a record without decoding its images. parsed: what ``parse`` returned for it.

        Raises ``RecordError`` or ``DataError`` for a bad record, ``SampleTooLongError`` for one
        that cannot be truncated.
        """
        parsed = parsed or self.parse(record)
        media = self.media_loader.measure(parsed, record.file)
        if parsed.answers is None:
            input_ids, loss_mask = self.encoder.encode_conversation(parsed, media)
            length = self.truncated_length(input_ids, loss_mask)
            loss_tokens = int(loss_mask[:length].sum())
            return RecordSize(length, media.num_tiles, loss_tokens, len(input_ids) - length)
        input_ids, answers = self.encoder.encode_preference(parsed, media)
        limit = self.answer_limit(input_ids)
        if self.config.samples_answers:
            longest = min(self.config.max_completion_length, limit)
            sampled = self.config.num_generations * longest
            return RecordSize(len(input_ids) + sampled, media.num_tiles, sampled, 0)
        answer_tokens = sum(min(len(answer), limit) for answer in answers)
        truncated = sum(len(answer) for answer in answers) - answer_tokens
        # an unpaired preference is read with the answer of another record, about as long
        read = answer_tokens if parsed.label is None else 2 * answer_tokens
        return RecordSize(len(input_ids) + read, media.num_tiles, answer_tokens, truncated)

    def parse(self, record: Record) -> ParsedRecord:
        """Parse a record and check that its format fits the training method."""
        parsed = parse_record(record.value)
        check_kind(parsed, self.config)
        if self.config.trains_critic:
            check_replies(parsed)
        if self.config.samples_answers:
            parsed = split_last_answer(parsed)
        if parsed.objects is not None:
            sizes = self.media_loader.image_sizes(parsed, record.file)
            parsed = fill_boxes(parsed, sizes)
        if self.config.samples_answers:
            check_expected(parsed, self.config.reward)
        return parsed

    def has_all_files(self, record: Record) -> bool:
        """Whether the files of a record's images and videos are there, damaged or not."""
        try:
            parsed = parse_record(record.value)
        except RecordError:
            return True
        return self.media_loader.has_all_files(parsed, record.file)

    def random_generator(self, record: Record, epoch: int) -> np.random.Generator:
        """Return a generator that depends on the record and epoch, not on what was read before."""
        return np.random.default_rng((self.config.seed, epoch, record.index))

    def truncated_length(self, input_ids: np.ndarray, loss_mask: np.ndarray) -> int:
        """Return how many ids to keep: up to the limit, but never part of an image."""
        limit = self.config.max_seq_length
        if len(input_ids) <= limit:
            return len(input_ids)
        if self.truncates_image(input_ids, limit):
            raise SampleTooLongError(
                f"{len(input_ids):,} tokens, and an image extends past the limit of {limit:,}"
            )
        if not loss_mask[:limit].any():
            raise SampleTooLongError(
                f"{len(input_ids):,} tokens, and no answer begins within the limit of {limit:,}"
            )
        return limit

    def answer_limit(self, prompt_ids: np.ndarray) -> int:
        """Return how many tokens an answer to this prompt may have."""
        limit = self.config.max_seq_length
        if len(prompt_ids) >= limit:
            raise SampleTooLongError(
                f"a prompt of {len(prompt_ids):,} tokens, and no answer begins within the limit of "
                f"{limit:,}"
            )
        return limit - len(prompt_ids)

    def truncates_image(self, input_ids: np.ndarray, limit: int) -> bool:
        image_tokens = (self.tokenizer.image_id, self.tokenizer.image_end_id)
        return bool(np.isin(input_ids[limit:], image_tokens).any())

    def build_positions(self, input_ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Compute V2PE positions: (L,) ids -> (L,) float32. A random delta is drawn per image."""
        image_id, delta = self.tokenizer.image_id, self.config.position_delta
        if delta != RANDOM:
            return visual_positions(input_ids, image_id, float(delta))
        num_images = len(image_spans(input_ids, image_id))
        deltas = generator.choice(DELTAS, size=num_images).tolist()
        return visual_positions(input_ids, image_id, deltas if num_images else 1.0)


def check_replies(record: ParsedRecord) -> None:
    """Raise ``RecordError`` for a conversation that is not a critic's."""
    for number, message in enumerate(record.messages, start=1):
        reply = message.text.strip()
        if message.role == "assistant" and reply not in (CORRECT, INCORRECT):
            raise RecordError(
                f"answer {number // 2} is {reply[:20]!r}, but --method prm trains a critic, which "
                "answers + or -; expected 'question' with 'steps_with_score', or such a "
                "conversation"
            )


@contextmanager
def error_location(location: str) -> Iterator[None]:
    """Raise what goes wrong inside as a ``DataError`` that begins with the file and line."""
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


@dataclass(frozen=True)
class RecordEncoder:
    """Encodes records as one model reads them.

    tokens_per_tile: image tokens of a tile. system: replaces the model's own system prompt.
    """

    tokenizer: Tokenizer
    template: Template
    tokens_per_tile: int
    system: str | None = None

    def encode_conversation(
        self, record: ParsedRecord, media: MediaShape
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode a conversation up to its last <|im_end|>: ids (L,) int32, loss mask (L,) bool."""
        messages = self.build_messages(record, media)
        if record.is_text:
            return self.encode_text(messages[0])
        segments = self.render(messages[:-1], record)
        answer = GeneratedAnswer(messages[-1].token_ids)
        in_loss = [message.in_loss for message in record.messages if message.role == "assistant"]
        return self.encode_segments([*segments, answer, TextSegment(IM_END)], in_loss)

    def encode_text(self, message: Message) -> tuple[np.ndarray, np.ndarray]:
        """Encode plain text without a chat template; all but image tokens carry loss.

        Special tokens in the text count as such, as in mlx-lm, and <|im_end|> is added at its end.
        """
        segments = [
            TextSegment(segment.text) if isinstance(segment, TextSegment) else segment
            for segment in message_segments(message)
        ]
        found = self.tokenizer.encode(segments, self.tokens_per_tile)
        if found[-1:] != [self.tokenizer.im_end_id]:
            found.append(self.tokenizer.im_end_id)
        input_ids, tokenizer = np.array(found, np.int32), self.tokenizer
        expected = sum(sum(medium.tiles) for medium in message.media) * self.tokens_per_tile
        if int((input_ids == tokenizer.image_id).sum()) != expected:
            raise RecordError("the text contains image tokens; write <image> where images belong")
        image_tokens = (tokenizer.image_start_id, tokenizer.image_id, tokenizer.image_end_id)
        return input_ids, ~np.isin(input_ids, image_tokens)

    def encode_preference(
        self, record: ParsedRecord, media: MediaShape
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Encode the prompt, up to the opening of the assistant's turn, and both answers.

        Returns ids (L,) int32, and for each answer (A,) int32 with its <|im_end|>.
        """
        messages = self.build_messages(record, media)
        prompt_ids, _ = self.encode_segments(self.render(messages, record))
        end = self.tokenizer.im_end_id
        answers = [[*encode_answer(self.tokenizer, text), end] for text in record.answers or ()]
        return prompt_ids, [np.array(answer, np.int32) for answer in answers]

    def render(self, messages: Sequence[Message], record: ParsedRecord) -> list[Segment]:
        system = self.system if record.system is None else record.system
        return self.template.render(messages, system)

    def build_messages(self, record: ParsedRecord, media: MediaShape) -> list[Message]:
        """Build the template's messages; answers carry the ids that are trained on."""
        tiles, frames = iter(media.image_tiles), iter(media.video_frames)
        messages = []
        for message in record.messages:
            if message.role == "assistant":
                token_ids = tuple(encode_answer(self.tokenizer, message.text))
                messages.append(Message("assistant", message.text, (), token_ids))
                continue
            shown = [MessageMedia((next(tiles),)) for _ in range(message.num_images)]
            shown += [MessageMedia((1,) * next(frames), "video") for _ in range(message.num_videos)]
            messages.append(Message("user", message.text, tuple(shown)))
        return messages

    def encode_segments(
        self, segments: Sequence[Segment], in_loss: Sequence[bool] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode segments: ids (L,) int32, and (L,) bool on each answer and its <|im_end|>.

        in_loss: whether each answer is trained on; by default all are.
        """
        input_ids: list[int] = []
        loss_mask: list[bool] = []
        flags = iter(in_loss)
        after_answer: bool | None = None  # whether the answer that ends here is trained on
        for part, is_answer in split_at_answers(segments):
            new_ids = self.tokenizer.encode(part, self.tokens_per_tile, bos=not input_ids)
            if after_answer is not None and new_ids[:1] != [self.tokenizer.im_end_id]:
                raise PromptError(
                    f"the chat template does not end an answer with {IM_END}; "
                    'put "template": "internvl2_5" into config.json'
                )
            trained = is_answer and next(flags, True)
            input_ids += new_ids
            loss_mask += [trained] * len(new_ids)
            if after_answer:
                loss_mask[len(input_ids) - len(new_ids)] = True
            after_answer = trained if is_answer else None
        return np.array(input_ids, np.int32), np.array(loss_mask, bool)
