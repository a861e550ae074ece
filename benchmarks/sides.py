"""The two programs behind one protocol; each method uses the program's own public API."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from benchmarks.prompt import QUESTION, published_prompt

OURS, PEER = "internvl3-mlx", "mlx-vlm"
LONG_STRING = {"type": "string", "minLength": 4096}  # a form that no measured answer completes
WAYS: dict[str, dict[str, Any]] = {  # of decoding, as both programs name them
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_p": 0.9},
    "structured": {"json_schema": LONG_STRING},
    "keys and values of 8 bits": {"kv_bits": 8},
}
BATCH, BATCH_WAYS = 4, ("greedy", "sampled")


class Program(Protocol):
    """One program with a checkpoint loaded. ways: those of WAYS that it has on this machine."""

    ways: tuple[str, ...]

    def process(self, photos: Sequence[Path]) -> Any:
        """Turn images and the question into model inputs."""

    def input_facts(self, inputs: Any) -> dict[str, Any]:
        """Return the ids and the sum of the normalized pixels."""

    def encode(self, inputs: Any) -> None:
        """Run vision tower and projector, and merge the features into the embeddings."""

    def answer(self, photos: Sequence[Path], count: int) -> Iterator[int]:
        """Yield ``count`` tokens about some images."""

    def continue_text(self, ids: list[int], count: int, way: str = "greedy") -> Iterator[int]:
        """Yield ``count`` tokens after the text ``ids``, decoded in one of WAYS."""

    def batch(self, count: int, way: str = "greedy") -> None:
        """Answer BATCH questions of unequal length together, with ``count`` tokens each."""

    def each(self, photos: Sequence[Path], count: int, together: int) -> None:
        """Answer about one photo after another, ``together`` at a time where that is possible."""

    def bare_loop(self, ids: list[int], count: int) -> Iterator[int]:
        """Do the same with only the model, its cache and an argmax."""


class OurProgram:
    ways = tuple(WAYS)

    def __init__(self, folder: Path):
        from internvl3_mlx import load

        self.vlm = load(str(folder))
        self.stop_ids = self.vlm.tokenizer.stop_ids
        self.vlm.tokenizer.stop_ids = frozenset()  # random weights must not end an answer early

    def process(self, photos: Sequence[Path]) -> Any:
        return self.vlm.prepare_inputs(QUESTION, photos)

    def input_facts(self, inputs: Any) -> dict[str, Any]:
        return {"ids": inputs.token_ids, "pixels": pixel_sum(inputs.pixel_values)}

    def encode(self, inputs: Any) -> None:
        features = self.vlm.model.get_image_features(mx.array(inputs.tiles))
        mx.eval(self.vlm.model.embed(inputs.input_ids[None], features))

    def answer(self, photos: Sequence[Path], count: int) -> Iterator[int]:
        return token_ids(self.vlm.stream(QUESTION, photos, max_tokens=count))

    def continue_text(self, ids: list[int], count: int, way: str = "greedy") -> Iterator[int]:
        from internvl3_mlx.generation.generation_config import GenerationConfig

        has_form = "json_schema" in WAYS[way]  # which allows no end before the last token
        self.vlm.tokenizer.stop_ids = self.stop_ids if has_form else frozenset()
        config = GenerationConfig(max_tokens=count, **WAYS[way])
        return token_ids(self.vlm.runner.stream(self.text_inputs(ids), config))

    def batch(self, count: int, way: str = "greedy") -> None:
        from internvl3_mlx.generation.batch_generate import batch_generate
        from internvl3_mlx.generation.generation_config import GenerationConfig

        encode = self.vlm.tokenizer.encode_text
        prompts = batch_prompts(self.vlm.loaded.folder)
        inputs = [self.text_inputs(encode(text, specials=True)) for text in prompts]
        self.vlm.tokenizer.stop_ids = frozenset()
        config = GenerationConfig(max_tokens=count, **WAYS[way])
        answers = batch_generate(self.vlm.runner, inputs, config, BATCH)
        assert [len(answer.token_ids) for answer in answers] == [count] * BATCH

    def each(self, photos: Sequence[Path], count: int, together: int) -> None:
        answers = self.vlm.ask_each(QUESTION, photos, batch_size=together, max_tokens=count)
        assert all(len(answer.token_ids) == count for answer in answers)

    def bare_loop(self, ids: list[int], count: int) -> Iterator[int]:
        from internvl3_mlx.models.cache import KVCache

        language = self.vlm.model.language_model
        cache = [KVCache(len(ids) + count) for _ in language.model.layers]

        def step(y: mx.array) -> mx.array:
            rotary = language.rotary(cache[0].offset, cache[0].offset + y.size)
            states = language.model(language.model.embed_tokens(y[None]), rotary, cache)
            return language.head(states[:, -1])

        return argmax_loop(step, ids, count)

    def text_inputs(self, ids: list[int]) -> Any:
        import numpy as np

        positions = np.arange(len(ids), dtype=np.float32)
        return replace(self.vlm.prepare_inputs(QUESTION), token_ids=ids, positions=positions)


class PeerProgram:
    # its constraints need a Metal kernel
    ways = tuple(way for way in WAYS if way != "structured" or mx.metal.is_available())

    def __init__(self, folder: Path):
        from mlx_vlm import load

        self.folder = folder
        self.model, self.processor = load(str(folder))
        self.processor.tokenizer.stopping_criteria.eos_token_ids = []

    def process(self, photos: Sequence[Path]) -> Any:
        from mlx_vlm.utils import prepare_inputs

        inputs = prepare_inputs(
            self.processor,
            images=[str(photo) for photo in photos],
            prompts=published_prompt(self.folder, len(photos)),
            image_token_index=self.model.config.image_token_index,
        )
        mx.eval(inputs["pixel_values"])
        return inputs

    def input_facts(self, inputs: Any) -> dict[str, Any]:
        pixels = pixel_sum(inputs["pixel_values"])
        return {"ids": inputs["input_ids"].flatten().tolist(), "pixels": pixels}

    def encode(self, inputs: Any) -> None:
        named = {"image_token_index": inputs["image_token_index"]}
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        mx.eval(self.model.get_input_embeddings(ids, pixels, **named).inputs_embeds)

    def answer(self, photos: Sequence[Path], count: int) -> Iterator[int]:
        from mlx_vlm import stream_generate

        text, names = published_prompt(self.folder, len(photos)), [str(photo) for photo in photos]
        stream = stream_generate(self.model, self.processor, text, names, max_tokens=count)
        return islice(token_ids(stream), count)

    def continue_text(self, ids: list[int], count: int, way: str = "greedy") -> Iterator[int]:
        from mlx_vlm import stream_generate
        from mlx_vlm.structured import build_json_schema_logits_processor

        options = {"temperature": 0.0, **WAYS[way]}
        schema = options.pop("json_schema", None)
        if schema is not None:
            processor = build_json_schema_logits_processor(self.processor.tokenizer, schema)
            options["logits_processors"] = [processor]
        given = mx.array([ids])
        stream = stream_generate(
            self.model, self.processor, "", input_ids=given, max_tokens=count, **options
        )
        return islice(token_ids(stream), count)  # mlx-vlm names the last token twice

    def batch(self, count: int, way: str = "greedy") -> None:
        from mlx_lm.sample_utils import make_sampler
        from mlx_vlm import batch_generate

        names = {"temperature": "temp"}
        options = {names.get(name, name): value for name, value in WAYS[way].items()}
        sampling = {"sampler": make_sampler(**options)} if options else {"greedy_sampling": True}
        prompts = batch_prompts(self.folder)
        response = batch_generate(
            self.model, self.processor, None, None, prompts, max_tokens=count, **sampling
        )
        assert len(response.texts) == BATCH

    def each(self, photos: Sequence[Path], count: int, together: int) -> None:
        for photo in photos:  # mlx-vlm decodes several images together in its server alone
            assert sum(1 for _ in self.answer([photo], count)) == count

    def bare_loop(self, ids: list[int], count: int) -> Iterator[int]:
        from mlx_vlm.models import cache as caches

        language = self.model.language_model
        cache = caches.make_prompt_cache(language)
        return argmax_loop(lambda y: language(y[None], cache=cache).logits[:, -1], ids, count)


SIDES = {OURS: OurProgram, PEER: PeerProgram}


def batch_prompts(folder: Path) -> list[str]:
    """Return prompts of unequal length about no image."""
    return [published_prompt(folder, 0) + "word " * 9 * n for n in range(BATCH)]


def token_ids(stream: Any) -> Iterator[int]:
    """Yield the token of each chunk that has one."""
    for piece in stream:
        token = getattr(piece, "token_id", None)
        token = getattr(piece, "token", None) if token is None else token
        if token is not None:
            yield int(token)


def pixel_sum(pixels: mx.array) -> float:
    """Add up the sorted pixels, so that the order of the axes does not matter."""
    import numpy as np

    return float(np.sort(np.array(pixels).ravel()).astype(np.float64).sum())


def argmax_loop(step: Any, ids: list[int], count: int) -> Iterator[int]:
    """Decode with as little as possible: the next token is computed while one is read."""
    token = mx.argmax(step(mx.array(ids)), axis=-1)
    mx.async_eval(token)
    for left in range(count - 1, -1, -1):
        following = token
        if left:
            following = mx.argmax(step(token), axis=-1)
            mx.async_eval(following)
        yield int(token.item())
        token = following
