"""Several answers to one question: prompt and pictures are read once and stand in memory once.

Every answer goes on from there with its own words and its own chance.

What is done with them is the caller's: choosing the best, or the most frequent, needs a judge.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.answer import Answer
from internvl3_mlx.generation.batch_generate import generate_alone
from internvl3_mlx.generation.engine import (
    CACHE_HEADROOM,
    Engine,
    kv_quantization_for,
    remaining_context,
    supported_row_layout,
)
from internvl3_mlx.generation.generate import Generation, StageTimer
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.sampler import Sampler, make_sampler, needs_history
from internvl3_mlx.generation.stream import TextStream
from internvl3_mlx.generation.structured import is_structured
from internvl3_mlx.models.shared_prefix_cache import SharedPrefixKVCache

if TYPE_CHECKING:
    from internvl3_mlx.generation.vlm import VLM

SEED_RANGE = 2**31  # what a base seed is drawn from when none was given
KEY_WORD_BITS = 32  # MLX's random key is a seed cut in two


def generate_samples(
    vlm: "VLM", inputs: ModelInputs, settings: GenerationConfig, count: int
) -> list[Answer]:
    """Answer prepared inputs ``count`` times, in the order of their seeds.

    Answer i draws what ``ask`` would with the seed ``settings.seed + i``. Sums are taken in another
    order, so where a draw falls on the line between two words, rounding may choose the other one.
    """
    if count < 1:
        raise UserError(f"n is {count}; ask for one answer or more")
    seed = settings.seed
    if seed is None:
        seed = int(mx.random.randint(0, SEED_RANGE).item())  # type: ignore[arg-type]
    memory, seeds = PromptCache(), range(seed, seed + count)
    if count == 1 or not can_sample_together(vlm, settings):
        each = (replace(settings, seed=one) for one in seeds)
        return [generate_alone(vlm, inputs, asked, memory) for asked in each]
    return sample_together(vlm, inputs, settings, memory, seeds)


def can_sample_together(vlm: "VLM", settings: GenerationConfig) -> bool:
    """Tell whether answers can be written side by side: nothing guesses ahead or forces a form,
    and the cache is of a kind that is read in parts. Else each is written alone, the prompt still
    read once."""
    if settings.lookup or settings.draft is not None or is_structured(settings):
        return False
    packing = kv_quantization_for(settings, vlm.config.text.head_dim)
    return packing is None or supported_row_layout(vlm.model, packing) is not None


@dataclass(eq=False)
class Candidate:
    """One of the answers. ``state``: where its random numbers stand, as a seed of MLX's."""

    text: TextStream
    rng_seed: int
    tokens_left: int
    generated_ids: list[int] = field(default_factory=list)

    def sample(
        self, choose: Sampler, ids: list[int], logits: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Choose a token with this answer's own chance: logits (1, vocab) -> (1,), and the random
        key to go on with (2,). ids: the prompt's, empty where nothing looks back."""
        mx.random.seed(self.rng_seed)
        history = [*ids, *self.generated_ids] if ids else []
        token = choose(mx.array(history, dtype=mx.int32), logits)
        state: Any = mx.random.state
        return token, state[0]

    def accept(self, token: int, key: Sequence[int]) -> bool:
        """Take the token that was chosen; False when the answer is complete."""
        self.rng_seed = key[0] << KEY_WORD_BITS | key[1]
        self.generated_ids.append(token)
        for _ in self.text.decode([token]):
            self.tokens_left -= 1
        return self.tokens_left > 0 and self.text.finish_reason != "stop"


def sample_together(
    vlm: "VLM",
    inputs: ModelInputs,
    settings: GenerationConfig,
    memory: PromptCache,
    seeds: Sequence[int],
) -> list[Answer]:
    """Read once, then write a token of every answer at each step."""
    run = Generation(vlm.name, vlm.model, vlm.tokenizer, inputs, settings, memory, vlm.load_seconds)
    clock = StageTimer(time.perf_counter())
    mx.reset_peak_memory()
    engine, features = run.start(clock)
    positions = None if inputs.uses_unit_positions else inputs.positions
    ids, step = inputs.input_ids[None], settings.prefill_step_size
    logits = engine.prefill(ids, features, positions, step)
    left = remaining_context(inputs.next_position, vlm.config.text, ntk=engine.ntk)
    limit = min(settings.max_tokens, max(left, 1))
    candidates = [Candidate(run.make_text_stream(), seed, limit) for seed in seeds]
    answers: dict[int, Answer] = {}
    for ended in decode_samples(engine, candidates, settings, inputs.token_ids, logits):
        clock.mark_token()
        for at in ended:
            text = candidates[at].text
            text.flush()
            answers[at] = run.make_answer(text, clock, kept=len(inputs.token_ids) if at else 0)
    return [answers[at] for at in sorted(answers)]


def decode_samples(
    engine: Engine,
    candidates: Sequence[Candidate],
    settings: GenerationConfig,
    ids: list[int],
    logits: mx.array,
) -> Iterator[list[int]]:
    """Write all answers side by side; at each step yield which of them ended.

    ids: the prompt's; logits: what the model makes of it, (1, vocab).
    """
    choose = make_sampler(replace(settings, seed=None))
    history = ids if needs_history(settings) else []
    layout = (
        None
        if engine.kv_quantization is None
        else supported_row_layout(engine.model, engine.kv_quantization)
    )
    caches = [SharedPrefixKVCache(layer, layout, CACHE_HEADROOM) for layer in engine.cache]
    engine.cache.clear()  # what was laid out anew must not stand twice
    live = dict(enumerate(candidates))
    # an array each: the repetition penalty writes into the one it is given
    rows = list(mx.split(mx.repeat(logits, len(live), axis=0), len(live)))
    while True:
        drawn = [
            one.sample(choose, history, row) for one, row in zip(live.values(), rows, strict=True)
        ]
        tokens = mx.concatenate([token for token, _ in drawn])
        keys = mx.stack([key for _, key in drawn])
        chosen = zip(live.items(), to_host(tokens, keys), strict=True)
        going = {at: one for (at, one), pair in chosen if one.accept(*pair)}
        yield [at for at in live if at not in going]
        if not going:
            return
        if len(going) < len(live):
            places = mx.array([place for place, at in enumerate(live) if at in going])
            tokens = tokens[places]
            for cache in caches:
                cache.select(places)
        live = going
        rows = list(mx.split(sample_step(engine, caches, tokens), len(live)))


def to_host(tokens: mx.array, keys: mx.array) -> Iterator[tuple[int, list[int]]]:
    """Bring tokens (N,) and random keys (N, 2) over from the device in one go."""
    mx.eval(tokens, keys)
    return zip(cast(list[int], tokens.tolist()), cast(list[list[int]], keys.tolist()), strict=True)


def sample_step(
    engine: Engine, caches: Sequence[SharedPrefixKVCache], tokens: mx.array
) -> mx.array:
    """Read a token of every answer, all at one place of the sequence: (N,) -> logits (N, vocab)."""
    length, language = caches[0].offset + 1, engine.model.language_model
    rotary = engine.rotary(int(engine.next_position), length)
    engine.next_position += 1
    states = language.model(engine.model.embed(tokens[:, None]), rotary, caches)
    if engine.kv_quantization is not None and length > engine.kv_quantization.start:
        for cache in caches:
            cache.quantize()
    return language.head(states[:, -1])
