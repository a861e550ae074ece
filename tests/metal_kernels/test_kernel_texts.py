"""Every text that an answer can use was compiled and tested before it.

MLX writes the text of a kernel anew at each call, from template values, dtypes and the sizes of the
inputs: fewer than 8 elements are passed in another kind of memory. Here only texts are made.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import mlx.core as mx
import pytest
from fixtures.attention_cases import Ragged
from metal_emulator.mlx_source import Call, Definition, generate

from internvl3_mlx.metal_kernels import dispatch, launch_plan, registry, self_test
from internvl3_mlx.metal_kernels.decode_kernels import (
    AddNormVariant,
    HeadRotation,
    HeadRotationVariant,
    add_norm_kernel,
    head_rotation_kernel,
    should_use,
)
from internvl3_mlx.metal_kernels.flash_decode import (
    MAX_DRAFT_TOKENS,
    FlashVariant,
    attend_fastest,
    batch_to_queries,
    flash_decode,
    flash_decode_kernel,
)
from internvl3_mlx.metal_kernels.flash_reference import kernel_lengths
from internvl3_mlx.metal_kernels.kv_append import RopeParams, kv_append
from internvl3_mlx.metal_kernels.kv_layout import KVRowLayout
from internvl3_mlx.metal_kernels.launch_plan import PLAN_SCALES, SPLIT_PLANS, split_plan
from internvl3_mlx.metal_kernels.registry import KernelSpeedup
from internvl3_mlx.metal_kernels.self_test import SelfTestResult

MAX_ANSWERS = 16
DEMO, LARGE = {"sharing": 3, "dim": 32}, {"sharing": 7, "dim": 64}
BITS = (16, 4)


class Texts:
    """The texts made so far: by self-tests, and by others."""

    def __init__(self) -> None:
        self.tried: dict[str, set[str]] = {}
        self.used: set[str] = set()
        self.testing = ""

    def kernel(self, **definition):
        def launch(*, inputs, **call):
            made = generate(Definition(**definition), Call(inputs, **call)).text
            (self.tried[self.testing] if self.testing else self.used).add(made)
            shapes = zip(call["output_shapes"], call["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in shapes]

        return launch

    def run_self_test(self, variant) -> SelfTestResult:
        assert variant.name not in self.tried
        self.testing, self.tried[variant.name] = variant.name, set()
        list(variant.self_test_pairs())
        self.testing = ""
        return SelfTestResult(variant.name, True, "")


@pytest.fixture
def texts(a_mac, monkeypatch) -> Iterator[Texts]:
    monkeypatch.setenv(dispatch.MODE_VARIABLE, "force")
    made = Texts()
    monkeypatch.setattr(mx.fast, "metal_kernel", made.kernel)
    monkeypatch.setattr(self_test, "run_self_test", made.run_self_test)
    dispatch.build_kernel.cache_clear()
    yield made
    dispatch.build_kernel.cache_clear()
    assert made.used
    assert made.used <= set().union(*made.tried.values())
    mains = [{text for text in tried if "flash_join" not in text} for tried in made.tried.values()]
    assert len(set().union(*mains)) == sum(map(len, mains))  # none is tried twice


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("heads", [DEMO, LARGE], ids=["demo", "large"])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_one_token_and_drafts(texts, bits, heads, kv_heads):
    for draft in range(1, MAX_DRAFT_TOKENS + 1):
        for tokens in (draft, 600):
            shape = Ragged((tokens,), bits=bits, draft=draft, kv_heads=kv_heads, **heads)
            q, store = shape.made(mx.bfloat16)
            attend_fastest(q, store, tokens, causal=draft > 1)


@pytest.mark.parametrize("letter", SPLIT_PLANS)
@pytest.mark.parametrize("sharing", [1, 3, 7])
def test_every_plan_of_splits(texts, monkeypatch, letter, sharing):
    """Even where few partial results remain, which MLX would pass in other memory."""
    monkeypatch.setattr(launch_plan, "default_split_plan", lambda: SPLIT_PLANS[letter])
    split_plan.cache_clear()
    for plan, kv_heads, tokens in product(PLAN_SCALES, (1, 2, 8), (3, 300, 5000)):
        q, store = Ragged((tokens,), sharing, 32, kv_heads=kv_heads).made(mx.float16)
        variant = FlashVariant.from_inputs(q, store)
        registry.add_speedups([KernelSpeedup(variant.registry_key, 1, 2.0, plan)])
        attend_fastest(q, store, tokens)
    split_plan.cache_clear()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("heads", [DEMO, LARGE], ids=["demo", "large"])
def test_answers_to_one_prompt(texts, bits, heads):
    prompt = Ragged((20,), bits=bits, **heads).made(mx.float16)[1]
    for answers in range(1, MAX_ANSWERS + 1):
        q, suffix = Ragged((4,) * answers, bits=bits, **heads).made(mx.float16)
        flash_decode(batch_to_queries(q), prompt, 20)
        flash_decode(q, suffix, 4)


@pytest.mark.parametrize("bits", BITS)
def test_batches_of_conversations(texts, bits):
    for batch in range(1, 10):
        lengths = tuple(range(3, 3 + batch))
        q, store = Ragged(lengths, bits=bits, **LARGE).made(mx.float16)
        flash_decode(q, store, mx.array(lengths, mx.int32))
        flash_decode(q, store, mx.array(7))


def test_one_self_test_covers_all_that_share_a_text(texts):
    """Five to eight rows, drafts, with and without a causal mask; and equal uses of two rows."""
    single = FlashVariant(mx.bfloat16, 8, 64, 64, 7)
    uses = [
        single,
        *(replace(single, rows=rows) for rows in (4, 5, 8)),
        *(replace(single, rows=2, draft=3, causal=causal) for causal in (True, False)),
        *(replace(single, rows=2), replace(single, rows=1, draft=2, causal=True)),
    ]
    for use in uses:
        shape = Ragged((40,), use.rows, 64, 8, 64, use.draft, use.causal)
        q, store = shape.made(mx.bfloat16)
        assert FlashVariant.from_inputs(q, store, use.causal).name == use.name
        attend_fastest(q, store, 40, causal=use.causal)
        assert use.tested_uses == replace(single, rows=use.rows * use.draft).tested_uses
    assert [*texts.tried] == [single.name, uses[-1].name]
    assert all(len(tried) == 2 for tried in texts.tried.values())


def test_appended_tokens(texts):
    layout = KVRowLayout(32, 8, 32, mx.float16)
    for batch in range(1, MAX_ANSWERS + 1):
        for length in range(1, MAX_DRAFT_TOKENS + 1):
            keys = mx.zeros((batch, length, 2, 32), mx.float16)
            turn = RopeParams.from_base(mx.zeros((batch, length)), 32, 1e4)
            kv_append(keys, keys, layout, turn)


def test_the_decode_step(texts):
    """Any number of sequences, widths and heads."""
    for batch in range(1, MAX_ANSWERS + 1):
        for width in (8, 96, 1025):
            x = mx.zeros((batch, 1, width), mx.float16)
            assert should_use(AddNormVariant(mx.float16, width))
            add_norm_kernel(x, x, mx.ones(width, mx.float16), 1e-6)
        for heads, kv_heads in ((3, 1), (14, 2)):
            count = heads + 2 * kv_heads
            assert should_use(HeadRotationVariant(mx.float16, 32, True, False, count))
            rope = RopeParams.from_base(mx.zeros((batch, 1)), 32, 1e4)
            given = HeadRotation(rope, heads, kv_heads, mx.zeros(count * 32, mx.float16))
            head_rotation_kernel(mx.zeros((batch, 1, count, 32), mx.float16), given)


def test_lengths_are_padded_once(texts):
    q, store = Ragged((3, 5), **LARGE).made(mx.float16)
    padded = kernel_lengths(mx.array([3, 5]), 2)
    assert padded.tolist()[:2] == [3, 5]
    assert padded.size == dispatch.MIN_DEVICE_ELEMENTS
    assert kernel_lengths(padded, 2) is padded
    assert kernel_lengths(5, 9).tolist() == [5] * 9
    assert self_test.is_usable(FlashVariant.from_inputs(q, store))
    flash_decode_kernel(q, store, padded)
