"""The question that both programs are asked, and the prompt that mlx-vlm is given."""

from pathlib import Path

QUESTION = "Describe the image in detail."


def published_prompt(folder: Path, num_images: int) -> str:
    """Return the published prompt with ``<image>`` for each image, which mlx-vlm expands itself.

    By default mlx-vlm asks ``User: <image>...`` without a system prompt or chat markers.
    """
    from internvl3_mlx.config import read_config
    from internvl3_mlx.prompt.messages import ImageSegment, Message, MessageMedia
    from internvl3_mlx.prompt.template import load_template

    message = Message("user", QUESTION, (MessageMedia(tiles=(1,)),) * num_images)
    parts = load_template(read_config(folder), folder).render([message], None)
    return "".join("<image>" if isinstance(part, ImageSegment) else part.text for part in parts)
