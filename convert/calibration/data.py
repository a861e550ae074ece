"""Questions about pictures to measure a model on: what was asked, what the 16-bit model answers."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.checkpoints.build_model import Opened
from internvl3_mlx.errors import UserError
from internvl3_mlx.images.load import open_picture
from internvl3_mlx.images.tiling import TilePolicy, to_tiles
from internvl3_mlx.models.cache import KVCache
from internvl3_mlx.prompt.messages import Media, Turn

QUESTIONS = (  # asked in turn when a folder brings none of its own
    "What is in this picture?",
    "Describe the image in detail.",
    "Read all the text in the image.",
    "How many objects are there, and what colour are they?",
    "请描述这张图片。",
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif"}
MOST_TILES = 4  # a picture's detail matters less here than the number of pictures
ANSWER_TOKENS = 32
SHARE_KEPT = 4  # of the samples, one in this many is kept for measuring and never learned from


@dataclass(frozen=True)
class Sample:
    """One question with its answer. Tokens from ``scored`` on are judged: those after the last
    picture. tiles: (T, S, S, 3) uint8, or None."""

    ids: list[int]
    tiles: np.ndarray | None
    scored: int

    @property
    def row(self) -> mx.array:
        """(1, L) int32."""
        return mx.array(self.ids, dtype=mx.int32)[None]


def read_samples(folder: Path, opened: Opened, *, limit: int | None = None) -> list[Sample]:
    """Ask about every picture of a folder and let the model itself answer.

    A ``*.jsonl`` file in the folder may name pictures and questions: {"image", "question"} a
    line; so may a ``samples.json`` with a list of them.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --calibrate wants a folder of pictures")
    asked = list(questions(folder))[:limit]
    if not asked:
        raise UserError(f"no pictures in {folder}; --calibrate wants at least one")
    samples = []
    for path, question in asked:
        sample = prepared(opened, path, question)
        answer = continuation(opened, sample, ANSWER_TOKENS)
        samples.append(replace(sample, ids=sample.ids + answer))
    return samples


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Part samples into those to learn from and those to measure on; a few serve for both."""
    if len(samples) < 2 * SHARE_KEPT:
        return list(samples), list(samples)
    kept = samples[SHARE_KEPT - 1 :: SHARE_KEPT]
    return [s for i, s in enumerate(samples) if i % SHARE_KEPT != SHARE_KEPT - 1], list(kept)


def questions(folder: Path) -> Iterator[tuple[Path, str]]:
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
        yield from zip(pictures, cycle(QUESTIONS), strict=False)


def prepared(opened: Opened, path: Path, question: str) -> Sample:
    """Turn one question about one picture into ids and tiles."""
    config = opened.config
    policy = TilePolicy(
        tile_size=config.force_image_size,
        min_tiles=config.min_dynamic_patch,
        max_tiles=min(config.max_dynamic_patch, MOST_TILES),
        thumbnail=config.use_thumbnail,
        dynamic=config.dynamic_image_size,
    )
    tiles = to_tiles(open_picture(path).image, policy)
    turns = [Turn("user", question, (Media(tiles=(len(tiles),)),))]
    segments = opened.template.render(turns, None)
    ids = opened.tokenizer.encode(segments, config.num_image_token)
    last = len(ids) - 1 - ids[::-1].index(opened.tokenizer.image_id)
    return Sample(ids, tiles, last + 1)


def continuation(opened: Opened, sample: Sample, limit: int) -> list[int]:
    """Let the model answer: its likeliest tokens, up to its own stop."""
    model, language = opened.model, opened.model.language_model
    features = None if sample.tiles is None else model.see(mx.array(sample.tiles))
    cache = [KVCache(len(sample.ids) + limit) for _ in language.model.layers]
    x, at, answer = model.embed(sample.row, features), 0, []
    for _ in range(limit):
        states = language.model(x, language.rotary(at, at + x.shape[1]), cache)
        token = int(language.head(states[:, -1]).argmax().item())  # type: ignore[arg-type]
        answer.append(token)
        if token in opened.tokenizer.stop_ids:
            break
        at += x.shape[1]
        x = model.embed(mx.array([[token]]))
    return answer
