"""Questions about pictures to measure a model on: what was asked, what the 16-bit model answers."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.checkpoints.build_model import LoadedModel
from internvl3_mlx.errors import UserError
from internvl3_mlx.images.load import open_image
from internvl3_mlx.images.tiling import TilePolicy, to_tiles
from internvl3_mlx.models.cache import KVCache
from internvl3_mlx.prompt.messages import Message, MessageMedia

DEFAULT_QUESTIONS = (  # asked in turn when a folder brings none of its own
    "What is in this picture?",
    "Describe the image in detail.",
    "Read all the text in the image.",
    "How many objects are there, and what colour are they?",
    "请描述这张图片。",
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif"}
MAX_TILES = 4  # a picture's detail matters less here than the number of pictures
ANSWER_TOKENS = 32
HELD_OUT_EVERY = 4  # of the samples, one in this many is kept for measuring and never learned from


@dataclass(frozen=True)
class CalibrationSample:
    """One question with its answer. Tokens from ``scored`` on are judged: those after the last
    picture. tiles: (T, S, S, 3) uint8, or None."""

    token_ids: list[int]
    tiles: np.ndarray | None
    first_scored: int

    @property
    def input_ids(self) -> mx.array:
        """(1, L) int32."""
        return mx.array(self.token_ids, dtype=mx.int32)[None]


def load_samples(
    folder: Path, opened: LoadedModel, *, limit: int | None = None
) -> list[CalibrationSample]:
    """Ask about every picture of a folder and let the model itself answer.

    A ``*.jsonl`` file in the folder may name pictures and questions: {"image", "question"} a
    line; so may a ``samples.json`` with a list of them.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --calibrate wants a folder of pictures")
    asked = list(read_questions(folder))[:limit]
    if not asked:
        raise UserError(f"no pictures in {folder}; --calibrate wants at least one")
    samples = []
    for path, question in asked:
        sample = build_sample(opened, path, question)
        answer = greedy_answer(opened, sample, ANSWER_TOKENS)
        samples.append(replace(sample, token_ids=sample.token_ids + answer))
    return samples


def split_samples(
    samples: Sequence[CalibrationSample],
) -> tuple[list[CalibrationSample], list[CalibrationSample]]:
    """Part samples into those to learn from and those to measure on; a few serve for both."""
    if len(samples) < 2 * HELD_OUT_EVERY:
        return list(samples), list(samples)
    kept = samples[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [s for i, s in enumerate(samples) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1], list(
        kept
    )


def read_questions(folder: Path) -> Iterator[tuple[Path, str]]:
    """List a folder's pictures with what is asked of them."""
    files = sorted([*folder.glob("*.jsonl"), *folder.glob("samples.json")])
    for file in files:
        text = file.read_text(encoding="utf-8")
        rows = text.splitlines() if file.suffix == ".jsonl" else map(json.dumps, json.loads(text))
        for number, line in enumerate(rows, start=1):
            try:
                row = json.loads(line)
                yield folder / (row.get("image") or row["file"]), str(row["question"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f'{file}:{number}: wanted {{"image": …, "question": …}}, not {line[:60]!r}'
                ) from error
    if not files:
        pictures = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
        yield from zip(pictures, cycle(DEFAULT_QUESTIONS), strict=False)


def build_sample(opened: LoadedModel, path: Path, question: str) -> CalibrationSample:
    """Turn one question about one picture into ids and tiles."""
    config = opened.config
    policy = TilePolicy(
        tile_size=config.force_image_size,
        min_tiles=config.min_dynamic_patch,
        max_tiles=min(config.max_dynamic_patch, MAX_TILES),
        thumbnail=config.use_thumbnail,
        dynamic=config.dynamic_image_size,
    )
    tiles = to_tiles(open_image(path).image, policy)
    turns = [Message("user", question, (MessageMedia(tiles=(len(tiles),)),))]
    segments = opened.template.render(turns, None)
    ids = opened.tokenizer.encode(segments, config.num_image_token)
    last = len(ids) - 1 - ids[::-1].index(opened.tokenizer.image_id)
    return CalibrationSample(ids, tiles, last + 1)


def greedy_answer(opened: LoadedModel, sample: CalibrationSample, limit: int) -> list[int]:
    """Let the model answer: its likeliest tokens, up to its own stop."""
    model, language = opened.model, opened.model.language_model
    features = None if sample.tiles is None else model.get_image_features(mx.array(sample.tiles))
    cache = [KVCache(len(sample.token_ids) + limit) for _ in language.model.layers]
    x, at, answer = model.embed(sample.input_ids, features), 0, []
    for _ in range(limit):
        states = language.model(x, language.rotary(at, at + x.shape[1]), cache)
        token = int(language.head(states[:, -1]).argmax().item())  # type: ignore[arg-type]
        answer.append(token)
        if token in opened.tokenizer.stop_ids:
            break
        at += x.shape[1]
        x = model.embed(mx.array([[token]]))
    return answer
