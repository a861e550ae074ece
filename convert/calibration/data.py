"""Calibration samples: questions about images with the answers of the 16-bit model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.checkpoints.build_model import LoadedModel
from internvl3_mlx.config.foreign import APPLE_DOUBLE, visible_files
from internvl3_mlx.errors import UserError
from internvl3_mlx.images.load import IMAGE_SUFFIXES, open_image
from internvl3_mlx.images.tiling import TilePolicy, to_tiles
from internvl3_mlx.json_files import parse_json, read_json_value
from internvl3_mlx.models.cache import KVCache
from internvl3_mlx.prompt.messages import Message, MessageMedia

DEFAULT_QUESTIONS = (  # asked in turn when the folder has no questions of its own
    "What is in this picture?",
    "Describe the image in detail.",
    "Read all the text in the image.",
    "How many objects are there, and what colour are they?",
    "请描述这张图片。",
)
MAX_TILES = 4  # more images matter more here than detail in each
ANSWER_TOKENS = 32
TEXT_TOKENS, MIN_TEXT_TOKENS = 256, 16  # of one sample of a text file
QUESTION_FILES = ("*.jsonl", "samples.json")
HELD_OUT_EVERY = 4  # one sample in this many is held out from calibration, to measure on


@dataclass(frozen=True)
class CalibrationSample:
    """One question with its answer.

    Tokens from ``first_scored`` on are scored: those after the last image. tiles: (T, S, S, 3)
    uint8, or None.
    """

    token_ids: list[int]
    tiles: np.ndarray | None
    first_scored: int

    @property
    def input_ids(self) -> mx.array:
        """Return the token ids as an array: (1, L) int32."""
        return mx.array(self.token_ids, dtype=mx.int32)[None]


def load_samples(
    folder: Path, loaded: LoadedModel, *, limit: int | None = None
) -> list[CalibrationSample]:
    """Ask about every image in a folder and let the model itself answer; add its texts.

    The folder may hold its own questions: a ``*.jsonl`` file with {"image", "question"} on each
    line, or a ``samples.json`` with a list of them. Of ``*.txt`` files every token is scored.
    Raises UserError when there are neither images nor texts.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; give a folder of images to calibrate or measure on"
        )
    questions = list(read_questions(folder))[:limit]
    samples = list(text_samples(folder, loaded))[:limit]
    if not questions and not samples:
        raise UserError(
            f"there are no images in {folder}; add at least one, or a .txt file, to calibrate or "
            "measure on"
        )
    for path, question in questions:
        sample = build_sample(loaded, path, question)
        answer = greedy_answer(loaded, sample, ANSWER_TOKENS)
        samples.append(replace(sample, token_ids=sample.token_ids + answer))
    return samples


def text_samples(folder: Path, loaded: LoadedModel) -> Iterator[CalibrationSample]:
    """Cut the text files of a folder into samples of ``TEXT_TOKENS`` tokens, all of them scored."""
    for path in visible_files(folder, "*.txt"):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
        token_ids = list(loaded.tokenizer.encode_text(text))
        for start in range(0, len(token_ids), TEXT_TOKENS):
            chunk = token_ids[start : start + TEXT_TOKENS]
            if len(chunk) >= MIN_TEXT_TOKENS:
                yield CalibrationSample(chunk, None, 0)


def split_samples(
    samples: Sequence[CalibrationSample],
) -> tuple[list[CalibrationSample], list[CalibrationSample]]:
    """Split samples into those to calibrate on and those held out to measure on.

    Fewer than twice ``HELD_OUT_EVERY`` serve for both.
    """
    if len(samples) < 2 * HELD_OUT_EVERY:
        return list(samples), list(samples)
    last = HELD_OUT_EVERY - 1
    calibration = [s for i, s in enumerate(samples) if i % HELD_OUT_EVERY != last]
    return calibration, list(samples[last::HELD_OUT_EVERY])


def read_questions(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the images of a folder, each with a question about it. Raises UserError for a line that
    is not a question, CheckpointError for a file that is not JSON."""
    files = [path for name in QUESTION_FILES for path in visible_files(folder, name)]
    for file in files:
        lines = file.suffix == ".jsonl"
        entries = file.read_bytes().splitlines() if lines else read_json_value(file)
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
            try:
                record = parse_json(entry) if lines else entry
                yield folder / (record.get("image") or record["file"]), str(record["question"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                shown = entry.decode(errors="replace") if lines else str(entry)
                raise UserError(
                    f"{file}:{number}: {shown[:60]!r} is not a question; "
                    'write {"image": "a.png", "question": "..."}'
                ) from error
    if not files:
        images = [
            path
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(APPLE_DOUBLE)
        ]
        yield from zip(images, cycle(DEFAULT_QUESTIONS), strict=False)


def build_sample(loaded: LoadedModel, path: Path, question: str) -> CalibrationSample:
    """Turn one question about one image into token ids and tiles."""
    config = loaded.config
    policy = TilePolicy(
        tile_size=config.force_image_size,
        min_tiles=config.min_dynamic_patch,
        max_tiles=min(config.max_dynamic_patch, MAX_TILES),
        thumbnail=config.use_thumbnail,
        dynamic=config.dynamic_image_size,
    )
    tiles = to_tiles(open_image(path).image, policy)
    messages = [Message("user", question, (MessageMedia(tiles=(len(tiles),)),))]
    segments = loaded.template.render(messages, None)
    token_ids = loaded.tokenizer.encode(segments, config.num_image_token)
    last_image = len(token_ids) - 1 - token_ids[::-1].index(loaded.tokenizer.image_id)
    return CalibrationSample(token_ids, tiles, last_image + 1)


def greedy_answer(loaded: LoadedModel, sample: CalibrationSample, limit: int) -> list[int]:
    """Decode greedily until a stop token or ``limit``; return the token ids of the answer."""
    model, language = loaded.model, loaded.model.language_model
    features = None if sample.tiles is None else model.get_image_features(mx.array(sample.tiles))
    cache = [KVCache(len(sample.token_ids) + limit) for _ in language.model.layers]
    x, offset, answer = model.embed(sample.input_ids, features), 0, []
    for _ in range(limit):
        states = language.model(x, language.rotary(offset, offset + x.shape[1]), cache)
        token = int(language.head(states[:, -1]).argmax().item())  # type: ignore[arg-type]
        answer.append(token)
        if token in loaded.tokenizer.stop_ids:
            break
        offset += x.shape[1]
        x = model.embed(mx.array([[token]]))
    return answer
