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
from internvl3_mlx.generation.processor import Preparer, Seen
from internvl3_mlx.prompt.messages import Media, Segment, Spoken, Text, Turn
from internvl3_mlx.prompt.template import TURN_START
from internvl3_mlx.prompt.tokenizer import TURN_END
from internvl3_mlx.prompt.v2pe import DELTAS, image_runs, visual_positions
from internvl3_mlx.training.config import RANDOM, DataSettings
from internvl3_mlx.training.data.dataset import Entry
from internvl3_mlx.training.data.media import Looker, Shape
from internvl3_mlx.training.data.schema import Row, RowFault, read_row


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation. ids: (L,) int32. supervised: (L,) bool, True on what is learned.

    positions: (L,) float32. seen: the pictures in the order of their tokens. place: file and line.
    """

    ids: np.ndarray
    supervised: np.ndarray
    positions: np.ndarray
    seen: tuple[Seen, ...]
    place: str


@dataclass(frozen=True, eq=False)
class Pair:
    """A question and two answers. ``prompt`` ends with the opened assistant turn; each answer with
    <|im_end|>: (A,) int32."""

    prompt: Sample
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def place(self) -> str:
        return self.prompt.place


@dataclass(frozen=True)
class Measure:
    """What a row takes: tokens, tiles, tokens that are learned; ``cut``: those over the limit."""

    tokens: int
    tiles: int
    learned: int
    cut: int


class TooLong(Exception):
    """A sample that cannot be cut to the limit, and why."""


@dataclass(frozen=True)
class Labels:
    """Writes rows as one model reads them. ``system``: in the place of the model's own text."""

    preparer: Preparer
    system: str | None = None

    def conversation(self, row: Row, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """Write a whole talk: ids (L,) int32, ending with <|im_end|>; learned (L,) bool."""
        turns = self.turns(row, shape)
        segments = self.render(turns[:-1], row)
        answer = Spoken(turns[-1].token_ids)
        return self.encode([*segments, answer, Text(TURN_END)])

    def preference(self, row: Row, shape: Shape) -> tuple[np.ndarray, list[np.ndarray]]:
        """Write a question, up to the opened turn, and the answers, each with its <|im_end|>."""
        ids, _ = self.encode(self.render(self.turns(row, shape), row))
        end = self.preparer.tokenizer.im_end_id
        answers = [[*self.answer_ids(text), end] for text in row.answers or ()]
        return ids, [np.array(answer, np.int32) for answer in answers]

    def render(self, turns: Sequence[Turn], row: Row) -> list[Segment]:
        system = self.system if row.system is None else row.system
        return self.preparer.template.render(turns, system)

    def turns(self, row: Row, shape: Shape) -> list[Turn]:
        """Give the turns as the prompt rooms take them, answers in the ids they are learned in."""
        tiles, frames = iter(shape.images), iter(shape.films)
        turns = []
        for said in row.turns:
            if said.role == "assistant":
                turns.append(Turn("assistant", said.text, (), tuple(self.answer_ids(said.text))))
                continue
            media = [Media((next(tiles),)) for _ in range(said.images)]
            media += [Media((1,) * next(frames), "video") for _ in range(said.videos)]
            turns.append(Turn("user", said.text, tuple(media)))
        return turns

    def answer_ids(self, text: str) -> list[int]:
        """Cut an answer as it reads behind the opened turn.

        Where its first letters would melt into the turn's opening, as a newline does, it is cut
        alone: generation never finds them melted.
        """
        encode = self.preparer.tokenizer.encode
        opened = encode([OPENED], 0, bos=False)
        together = encode([OPENED, Text(text, typed=True)], 0, bos=False)
        if together[: len(opened)] == opened and len(together) > len(opened):
            return together[len(opened) :]
        return encode([Text(text, typed=True)], 0, bos=False)

    def encode(self, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Turn segments into ids, and mark each answer with the <|im_end|> that follows it."""
        tokenizer, per_tile = self.preparer.tokenizer, self.preparer.config.num_image_token
        ids: list[int] = []
        learned: list[bool] = []
        for part, answer in apart(segments):
            new = tokenizer.encode(part, per_tile, bos=not ids)
            ends = bool(learned) and learned[-1]
            if ends and new[:1] != [tokenizer.im_end_id]:
                raise PromptError(
                    f"the chat template does not end an answer with {TURN_END}; "
                    'put "template": "internvl2_5" into config.json'
                )
            ids += new
            learned += [answer] * len(new)
            if ends:
                learned[len(ids) - len(new)] = True
        return np.array(ids, np.int32), np.array(learned, bool)


@dataclass(frozen=True)
class Maker:
    """Makes samples for one model."""

    preparer: Preparer
    settings: DataSettings

    @cached_property
    def looker(self) -> Looker:
        return Looker(self.preparer, self.settings)

    @cached_property
    def labels(self) -> Labels:
        return Labels(self.preparer, self.settings.system)

    def sample(self, entry: Entry, epoch: int = 0) -> Sample:
        """Make the sample of a row, as it is drawn in this epoch; raises ``DataError``."""
        with told_at(entry.place):
            row, draw = self.row(entry), self.draw(entry, epoch)
            looked = self.looker.look(row, entry.source, draw)
            ids, learned = self.labels.conversation(row, looked.shape)
            length = self.kept(ids, learned)
            ids, learned = ids[:length], learned[:length]
            seen = tuple(looked.in_order(row))
            return Sample(ids, learned, self.positions(ids, draw), seen, entry.place)

    def pair(self, entry: Entry, epoch: int = 0) -> Pair:
        """Make the pair of a preference row; raises ``DataError``."""
        with told_at(entry.place):
            row, draw = self.row(entry), self.draw(entry, epoch)
            looked = self.looker.look(row, entry.source, draw)
            ids, answers = self.labels.preference(row, looked.shape)
            chosen, rejected = (a[: self.kept_answer(ids)] for a in answers)
            seen = tuple(looked.in_order(row))
            nothing = np.zeros(len(ids), bool)
            prompt = Sample(ids, nothing, self.positions(ids, draw), seen, entry.place)
            return Pair(prompt, chosen, rejected)

    def measure(self, entry: Entry) -> Measure:
        """Count what a row takes without reading its pixels.

        Raises ``RowFault`` or ``DataError`` for what is wrong, ``TooLong`` for what cannot be cut.
        """
        row = self.row(entry)
        shape = self.looker.measure(row, entry.source)
        if row.answers is None:
            ids, learned = self.labels.conversation(row, shape)
            kept = self.kept(ids, learned)
            return Measure(kept, shape.tiles, int(learned[:kept].sum()), len(ids) - kept)
        ids, answers = self.labels.preference(row, shape)
        room = self.kept_answer(ids)
        lengths = [min(len(answer), room) for answer in answers]
        lost = sum(len(answer) for answer in answers) - sum(lengths)
        return Measure(len(ids) + sum(lengths), shape.tiles, sum(lengths), lost)

    def row(self, entry: Entry) -> Row:
        """Read a row and see that it is of the kind that the method learns from."""
        row = read_row(entry.value)
        if self.settings.pairs and row.answers is None:
            raise RowFault(
                "a conversation, but --method mpo compares answers; wanted 'question', 'chosen' "
                "and 'rejected', or --method sft"
            )
        if not self.settings.pairs and row.answers is not None:
            raise RowFault(
                f"two answers to compare, but --method {self.settings.method} learns from "
                "conversations; wanted 'messages' or 'conversations', or --method mpo"
            )
        return row

    def draw(self, entry: Entry, epoch: int) -> np.random.Generator:
        """Give a row its own chance, whatever was read before it."""
        return np.random.default_rng((self.settings.seed, epoch, entry.number))

    def kept(self, ids: np.ndarray, learned: np.ndarray) -> int:
        """Say how many ids are kept: as many as the limit, but no picture is ever cut."""
        limit = self.settings.max_seq_length
        if len(ids) <= limit:
            return len(ids)
        if self.cuts_picture(ids, limit):
            raise TooLong(f"{len(ids):,} tokens, and a picture lies beyond {limit:,}")
        if not learned[:limit].any():
            raise TooLong(f"{len(ids):,} tokens, and no answer begins within {limit:,}")
        return limit

    def kept_answer(self, ids: np.ndarray) -> int:
        """Say how many tokens an answer behind this prompt may have."""
        room = self.settings.max_seq_length - len(ids)
        if room < 1:
            raise TooLong(
                f"a prompt of {len(ids):,} tokens, and no answer begins within "
                f"{self.settings.max_seq_length:,}"
            )
        return room

    def cuts_picture(self, ids: np.ndarray, limit: int) -> bool:
        tokenizer = self.preparer.tokenizer
        return bool(np.isin(ids[limit:], (tokenizer.image_id, tokenizer.image_end_id)).any())

    def positions(self, ids: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Place every token; a random step is drawn anew for each picture or frame."""
        image_id, delta = self.preparer.tokenizer.image_id, self.settings.delta
        if delta != RANDOM:
            return visual_positions(ids, image_id, float(delta))
        runs = len(image_runs(ids, image_id))
        steps = draw.choice(DELTAS, size=runs).tolist()
        return visual_positions(ids, image_id, steps if runs else 1.0)


@contextmanager
def told_at(place: str) -> Iterator[None]:
    """Say where in the data something went wrong."""
    try:
        yield
    except DataError:
        raise
    except (RowFault, UserError) as error:
        raise DataError(f"{place}: {error}") from error
    except TooLong as error:
        raise DataError(f"{place}: {error}; raise --max-seq-length or lower --max-tiles") from error


OPENED = Text(TURN_START.format(role="assistant"))


def apart(segments: Sequence[Segment]) -> Iterator[tuple[list[Segment], bool]]:
    """Split segments at the answers, and say which part is one."""
    waiting: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Spoken):
            yield waiting, False
            yield [segment], True
            waiting = []
        else:
            waiting.append(segment)
    yield waiting, False
