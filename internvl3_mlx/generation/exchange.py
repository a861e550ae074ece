"""One question with what it showed, and what was answered."""

from dataclasses import dataclass, replace

from internvl3_mlx.generation.processor import Film, Seen, asked
from internvl3_mlx.prompt.messages import IMAGE_MARK, Turn


@dataclass(frozen=True, eq=False)
class Exchange:
    """A question, its pictures and videos, and the answer.

    ``token_ids``: the answer as it was generated; empty where its text was cut by a stop string.
    ``complete``: False when the listener broke off.
    """

    question: str
    pictures: tuple[Seen, ...] = ()
    films: tuple[Film, ...] = ()
    answer: str = ""
    token_ids: tuple[int, ...] = ()
    complete: bool = True

    @property
    def turn(self) -> Turn:
        return asked(self.question, self.pictures, self.films)[0]

    @property
    def seen(self) -> list[Seen]:
        """Pictures and frames in the order of the prompt."""
        return asked(self.question, self.pictures, self.films)[1]

    def turns(self) -> tuple[Turn, Turn]:
        return self.turn, Turn("assistant", self.answer, token_ids=self.token_ids)

    def as_text(self) -> "Exchange":
        """Forget the ids of the answer: its words are cut anew."""
        return replace(self, token_ids=())

    def without(self, index: int) -> "Exchange":
        """Leave one picture out, and its mark where the question placed the pictures itself."""
        question = self.question
        if question.count(IMAGE_MARK) == len(self.pictures):
            parts = question.split(IMAGE_MARK)
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
            question = IMAGE_MARK.join(parts)
        pictures = self.pictures[:index] + self.pictures[index + 1 :]
        return replace(self, question=question, pictures=pictures)
