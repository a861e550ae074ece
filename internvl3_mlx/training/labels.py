"""The ids of a row, and which of them are learned."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from internvl3_mlx.errors import PromptError
from internvl3_mlx.generation.processor import Preparer
from internvl3_mlx.prompt.template import TURN_START
from internvl3_mlx.prompt.tokenizer import TURN_END
from internvl3_mlx.prompt.messages import Media, Segment, Spoken, Text, Turn
from internvl3_mlx.training.data.media import Shape
from internvl3_mlx.training.data.schema import Row

OPENED = Text(TURN_START.format(role="assistant"))


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
