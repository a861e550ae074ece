"""A critic's conversation: the question with the first step, then step after step.

The critic replies to each message with ``+`` or ``-``. Where its replies are given, all of them
stand in one prompt, and the positions that predict them are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs, ProcessedImage, Processor
from internvl3_mlx.prompt.messages import (
    IMAGE_PLACEHOLDER,
    Message,
    MessageMedia,
    split_at_answers,
)
from internvl3_mlx.prompt.reasoning import critic_question


@dataclass(frozen=True, eq=False)
class CriticInputs:
    """What a critic reads, and the positions of the tokens after which its replies stand."""

    inputs: ModelInputs
    reply_positions: tuple[int, ...]


def place_images(question: str, count: int, *, always_prepend: bool = False) -> str:
    """Return the question with a placeholder for each of its images.

    Placeholders that are there are kept. always_prepend: put one in front even so, as the published
    code does where it generates its replies; a placeholder too many stays plain text.
    """
    present = question.count(IMAGE_PLACEHOLDER)
    if not count or (present >= count and not always_prepend):
        return question
    if always_prepend and present + 1 >= count:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    if count == 1:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    lines = (f"Image-{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, count + 1))
    return "".join(lines) + question


def critic_messages(
    question: str,
    images: Sequence[ProcessedImage],
    steps: Sequence[str],
    replies: Sequence[Message],
) -> list[Message]:
    """Return the messages up to the last step. question: with placeholders for its images.

    replies: the critic's, to all steps but the last.
    """
    media = tuple(MessageMedia((image.info.tiles,)) for image in images)
    first = Message("user", critic_question(question, steps[0]), media, extra_placeholders=True)
    messages = [first]
    for reply, step in zip(replies, steps[1:], strict=True):
        messages += [reply, Message("user", step)]
    return messages


def build_critic_inputs(
    processor: Processor,
    messages: Sequence[Message],
    images: Sequence[ProcessedImage],
    config: GenerationConfig,
) -> CriticInputs:
    """Build the prompt of a critic. Its replies in ``messages`` are given as token ids."""
    ids: list[int] = []
    positions: list[int] = []
    tokens_per_tile = processor.config.num_image_token
    for part, is_reply in split_at_answers(processor.template.render(messages, config.system)):
        if is_reply:
            positions.append(len(ids) - 1)
        ids += processor.tokenizer.encode(part, tokens_per_tile, bos=not ids)
    places, deltas = processor.compute_positions(ids, config)
    inputs = ModelInputs(ids, tuple(images), places, deltas)
    return CriticInputs(inputs, (*positions, len(ids) - 1))
