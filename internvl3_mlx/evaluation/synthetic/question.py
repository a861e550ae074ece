"""What a renderer returns: images, a question about them, and its true answers."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, eq=False)
class RenderedQuestion:
    """kind: how the answer is scored, ``exact``, ``relaxed`` or ``anls``."""

    question: str
    answers: tuple[str, ...]
    images: tuple[Image.Image, ...]
    kind: str = "exact"
