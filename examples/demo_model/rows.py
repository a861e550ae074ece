"""Write pictures and questions as token rows in the library's prompt form, with V2PE positions."""

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
from tokenizers import Tokenizer

from examples.demo_model.questions import Question
from examples.demo_model.tokenizer import SYSTEM

IGNORE = -100
DELTAS = tuple(2.0**-power for power in range(9))
CONVERSATIONS = 0.1  # share of rows written as one conversation rather than as separate questions


@dataclass(frozen=True)
class Row:
    """Hold ids, targets and positions (B, L), and which token sees which (B, L, L) bool."""

    ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    visible: np.ndarray


class RowBuilder:
    """Build rows: a picture once, then several questions.

    As a rule the questions do not see each other and each starts at the same position: every one is
    trained
    exactly as if it were asked alone, at a fraction of the cost. The other rows are ordinary
    conversations.
    """

    def __init__(self, tokenizer: Tokenizer, tokens_per_tile: int):
        self.tokenizer, self.tokens_per_tile = tokenizer, tokens_per_tile
        self.image_id = tokenizer.token_to_id("<IMG_CONTEXT>")
        self.known: dict[str, list[int]] = {}

    @cached_property
    def opening(self) -> list[int]:
        """Give the ids before the picture."""
        return self.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<img>")

    def encode(self, text: str) -> list[int]:
        """Encode and remember a piece of the prompt."""
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def prefix(self, tiles: int) -> list[int]:
        """Give the ids from the start to the question of a prompt with one picture."""
        return [
            *self.opening,
            *[self.image_id] * (tiles * self.tokens_per_tile),
            *self.encode("</img>\n"),
        ]

    def prefix_of_several(self, images: int) -> list[int]:
        """Give the ids from the start to the question of a prompt with images of one tile each."""
        ids = self.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
        for number in range(1, images + 1):
            context = [self.image_id] * self.tokens_per_tile
            opening = self.encode(f"Image-{number}: <img>")
            ids = [*ids, *opening, *context, *self.encode("</img>\n")]
        return ids

    def question(self, text: str) -> list[int]:
        """Give the ids from the question to the open answer."""
        return self.encode(f"{text}<|im_end|>\n<|im_start|>assistant\n")

    def build(
        self,
        random: np.random.Generator,
        tiles: int,
        asked: list[list[Question]],
        *,
        whole: float = 0.0,
        conversation: bool | None = None,
        images: int = 1,
    ) -> Row:
        """Build the rows of pictures with the same number of tiles; each gets its own delta.

        ``whole`` is the share of rows whose delta is 1; the others draw from all nine.
        ``conversation`` makes every row one conversation (by chance unless given). Several
        ``images`` have one tile each.
        """
        conversation = random.random() < CONVERSATIONS if conversation is None else conversation
        made = [
            self.row(tiles, questions, draw_delta(random, whole), conversation, images)
            for questions in asked
        ]
        length = max(len(ids) for ids, *_ in made)
        ids, targets, positions, owners = (
            np.stack(
                [
                    np.pad(row[part], (0, length - len(row[part])), constant_values=fill)
                    for row in made
                ]
            )
            for part, fill in enumerate((0, IGNORE, 0, 0))
        )
        past = np.tril(np.ones((length, length), bool))
        same = (owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None])
        return Row(ids, targets, positions.astype(np.float32), past & same)

    def row(
        self,
        tiles: int,
        questions: list[Question],
        delta: float,
        conversation: bool,
        images: int = 1,
    ) -> tuple[np.ndarray, ...]:
        """Build one row: ids, targets, positions, and the question that each token belongs to."""
        ids = list(self.prefix(tiles) if images == 1 else self.prefix_of_several(images))
        positions = visual_positions(ids, self.image_id, delta)
        targets, owners = [IGNORE] * len(ids), [0] * len(ids)
        start = positions[-1] + 1
        for number, question in enumerate(questions, start=1):
            prompt = self.question(question.text)
            if conversation and number > 1:
                prompt = [*self.encode("\n<|im_start|>user\n"), *prompt]
            answer = self.encode(question.answer + "<|im_end|>")
            ids += prompt + answer
            targets += [IGNORE] * (len(prompt) - 1) + answer + [IGNORE]
            positions += [start + step for step in range(len(prompt) + len(answer))]
            owners += [0 if conversation else number] * (len(prompt) + len(answer))
            start = positions[-1] + 1 if conversation else start
        return np.array(ids), np.array(targets), np.array(positions), np.array(owners)


def draw_delta(random: np.random.Generator, whole: float) -> float:
    """Draw one of the nine deltas, with an extra share for 1."""
    if whole and random.random() < whole:
        return 1.0
    return DELTAS[random.integers(len(DELTAS))]


def visual_positions(ids: list[int], image_id: int, delta: float) -> list[float]:
    """Count positions: 1 per text token, ``delta`` per visual one, whole again after a picture."""
    positions: list[float] = []
    last, after_image = -1.0, False
    for token in ids:
        if token == image_id:
            last, after_image = last + delta, True
        else:
            last, after_image = (ceil(last) if after_image else last) + 1.0, False
        positions.append(last)
    return positions
