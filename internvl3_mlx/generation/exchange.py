"""One question of a conversation with its images and its answer."""

from dataclasses import dataclass, replace

from internvl3_mlx.generation.processor import ProcessedImage, ProcessedVideo, make_user_message
from internvl3_mlx.prompt.messages import IMAGE_PLACEHOLDER, Message


@dataclass(frozen=True, eq=False)
class Exchange:
    """A question, its images and videos, and the answer.

    ``token_ids``: the generated ids of the answer; empty where a stop string cut its text.
    ``complete``: False when generation was interrupted.
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
        """List images and video frames in the order of the prompt."""
        return make_user_message(self.question, self.images, self.videos)[1]

    def messages(self) -> tuple[Message, Message]:
        """Return the user's message and the assistant's."""
        return self.user_message, Message("assistant", self.answer, token_ids=self.token_ids)

    def without_token_ids(self) -> "Exchange":
        """Return a copy whose answer is text only, to be tokenized again."""
        return replace(self, token_ids=())

    def without_image(self, index: int) -> "Exchange":
        """Return a copy without one image, and without its placeholder if the question has one."""
        question = self.question
        if question.count(IMAGE_PLACEHOLDER) == len(self.images):
            parts = question.split(IMAGE_PLACEHOLDER)
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
            question = IMAGE_PLACEHOLDER.join(parts)
        images = self.images[:index] + self.images[index + 1 :]
        return replace(self, question=question, images=images)
