"""From an item and a harness's settings to what the model is asked: text, images and options."""

import re
from dataclasses import dataclass, replace

import numpy as np

from internvl3_mlx.evaluation.items import EvalItem
from internvl3_mlx.evaluation.tasks import CHINESE_LETTER, LETTER, TaskSettings
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import (
    ImageInfo,
    InputImage,
    ProcessedImage,
    Processor,
)
from internvl3_mlx.images.load import LoadedImage, enlarge, open_image
from internvl3_mlx.prompt.messages import IMAGE_PLACEHOLDER

CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked about one item. images: in the order of their places in the text."""

    text: str
    images: tuple[InputImage, ...]
    max_tiles: int | None


def render_prompt(item: EvalItem, settings: TaskSettings) -> str:
    """Fill a harness's prompt with an item's question, hint and options.

    As in VLMEvalKit, a multiple-choice question with Chinese characters is asked in Chinese.
    """
    template = settings.prompt
    if not item.options and settings.open_prompt is not None:
        template = settings.open_prompt
    question = item.question.replace(settings.drop, "") if settings.drop else item.question
    fields = {
        "question": question,
        "capitalized": question.capitalize(),
        "hint": f"{item.hint}\n" if item.hint else "",
        "context": f"Context: {item.hint}\n" if item.hint else "",
        "options": "".join(f"\n{letter}. {text}" for letter, text in item.options.items()),
        "options_in_brackets": "".join(f"\n({key}) {text}" for key, text in item.options.items()),
    }
    text = re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)
    if template.endswith(f"\n{LETTER}") and item.options and CHINESE.search(text):
        text = text.removesuffix(LETTER) + CHINESE_LETTER
    return text


def place_images(text: str, count: int, placement: str) -> str:
    """Write where several images stand, as a harness does.

    "numbered" leaves it to the chat template (``Image-1: <image>``); "spaced" puts all of them
    before the text, joined by blanks. Placeholders in the text are kept if there is one an image.
    """
    if placement != "spaced" or count < 2 or text.count(IMAGE_PLACEHOLDER) == count:
        return text
    return " ".join([IMAGE_PLACEHOLDER] * count) + f"\n{text}"


def make_request(item: EvalItem, settings: TaskSettings) -> Request:
    """Open what an item shows and write its question; raises ImageError for unreadable files."""
    text = render_prompt(item, settings)
    if item.videos:
        return video_request(item, settings, text)
    images: list[InputImage] = [*item.images]
    if settings.upscale > 1 and images:
        images[0] = enlarge(open_image(item.images[0]), settings.upscale)
    if settings.joined and len(images) > 1:
        return Request(text, tuple(images), settings.max_tiles)
    limit = settings.max_tiles
    if settings.shared_tiles and images:
        limit = max(1, min(limit or settings.shared_tiles, settings.shared_tiles // len(images)))
    return Request(place_images(text, len(images), settings.placement), tuple(images), limit)


def video_request(item: EvalItem, settings: TaskSettings, text: str) -> Request:
    """Read frames of the videos; each is one tile, on a line of its own."""
    from internvl3_mlx.images.video import read_frames

    frames: list[LoadedImage] = []
    for video in item.videos:
        found = read_frames(video, settings.num_frames, bound=item.clip)
        frames += [frame.loaded_image for frame in found]
    lines = [
        f"{settings.frame_label.format(n)}{IMAGE_PLACEHOLDER}" for n in range(1, len(frames) + 1)
    ]
    return Request("\n".join([*lines, text]), tuple(frames), 1)


def build_request(
    request: Request, settings: TaskSettings, processor: Processor, config: GenerationConfig
) -> tuple[str, list[InputImage]]:
    """Return the text and images for the processor; joined images become one run of tokens."""
    if not settings.joined or len(request.images) < 2:
        return request.text, [*request.images]
    first = processor.process_image(request.images[0], config)
    single = replace(config, max_tiles=1, min_tiles=None)
    others = [processor.process_image(image, single) for image in request.images[1:]]
    return request.text, [join_images([first, *others])]


def join_images(images: list[ProcessedImage]) -> ProcessedImage:
    """Put the tiles of several images into one run of image tokens."""
    info = images[0].info
    joined = ImageInfo(
        info.source,
        info.width,
        info.height,
        sum(image.info.tiles for image in images),
        sum(image.info.tokens for image in images),
    )
    return ProcessedImage(np.concatenate([image.tiles for image in images]), joined)
