"""The question that both programs are asked, and the text in which mlx-vlm has to get it."""

from pathlib import Path

QUESTION = "Describe the picture in detail."


def published_prompt(folder: Path, pictures: int) -> str:
    """Write out the published prompt with ``<image>`` for each picture, which mlx-vlm expands
    itself.

    Left alone, mlx-vlm asks ``User: <image>...`` without system text or turn marks.
    """
    from internvl3_mlx.config import read_config
    from internvl3_mlx.prompt.messages import ImageSegment, Message, MessageMedia
    from internvl3_mlx.prompt.template import load_template

    turn = Message("user", QUESTION, (MessageMedia(tiles=(1,)),) * pictures)
    parts = load_template(read_config(folder), folder).render([turn], None)
    return "".join("<image>" if isinstance(part, ImageSegment) else part.text for part in parts)
