"""One question with what it showed, and what was answered."""

from dataclasses import dataclass, replace

from internvl3_mlx.generation.processor import ProcessedImage, ProcessedVideo, make_user_message
from internvl3_mlx.prompt.messages import IMAGE_PLACEHOLDER, Message


@dataclass(frozen=True, eq=False)
class Exchange:
    """A question, its pictures and videos, and the answer.

    ``token_ids``: the answer as it was generated; empty where its text was cut by a stop string.
    ``complete``: False when the listener broke off.
    """

    question: str
    images: tuple[ProcessedImage, ...] = ()
    videos: tuple[ProcessedVideo, ...] = ()
    answer: str = ""
    token_ids: tuple[int, ...] = ()
    complete: bool = True

    @property
    def user_message(self) -> Message:
        return make_user_message(self.question, self.images, self.videos)[0]

    @property
    def processed_images(self) -> list[ProcessedImage]:
        """Pictures and frames in the order of the prompt."""
        return make_user_message(self.question, self.images, self.videos)[1]

    def messages(self) -> tuple[Message, Message]:
        return self.user_message, Message("assistant", self.answer, token_ids=self.token_ids)

    def without_token_ids(self) -> "Exchange":
        """Forget the ids of the answer: its words are cut anew."""
        return replace(self, token_ids=())

    def without_image(self, index: int) -> "Exchange":
        """Leave one picture out, and its mark where the question placed the pictures itself."""
        question = self.question
        if question.count(IMAGE_PLACEHOLDER) == len(self.images):
            parts = question.split(IMAGE_PLACEHOLDER)
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
            question = IMAGE_PLACEHOLDER.join(parts)
        pictures = self.images[:index] + self.images[index + 1 :]
        return replace(self, question=question, images=pictures)
