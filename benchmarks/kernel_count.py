"""How many kernels a GPU launches for one token, counted in the graph of a decode step.

MLX's fused operations are one kernel each on a GPU, and many operations on a CPU. So they are
replaced by one operation each (a cumulative sum, which MLX fuses with nothing) while the graph is
built; what only changes a view is not counted.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import mlx.core as mx

VIEWS = {
    "AsStrided", "Broadcast", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
COPIES = {"Concatenate": 2}  # kernels of operations that launch more than one: one for each part
NODE = re.compile(r'label ="([^"]+)", shape=rectangle')
CACHED, CAPACITY = 40, 256  # tokens
LENGTHS = (CACHED, CACHED + 13, CACHED - 9)  # of a batch


def count_kernels(model: Any, *, compiled: bool, own: bool = False) -> Counter[str]:
    """Count the operations of one token of one sequence that are kernels, by name.

    own: with our kernels of the decode step, which are used where they are faster.
    """
    from internvl3_mlx.generation.compiled_step import StepRunner
    from internvl3_mlx.models.cache import KVCache
    from internvl3_mlx.models.static_cache import StaticSequence

    language = model.language_model
    caches = [KVCache(CAPACITY) for _ in language.model.layers]
    prompt = mx.zeros((1, CACHED), dtype=mx.int32)
    mx.eval(language.model(model.embed(prompt), language.rotary(0, CACHED), caches))
    token = mx.array([[1]], dtype=mx.int32)
    with fused_operations(own=own):
        if compiled:
            ready = StaticSequence.prepare(caches, 1)
            assert ready is not None
            logits, _ = StepRunner(model, "on").run(ready, token, [CACHED])
        else:
            rotary = language.rotary(CACHED, CACHED + 1)
            logits = language.head(language.model(model.embed(token), rotary, caches))
        return kernels_of(mx.argmax(logits[:, -1], axis=-1))


def count_batch_kernels(model: Any, *, compiled: bool) -> Counter[str]:
    """Count the same of one token of each of three sequences of unequal length."""
    batch = read_batch(model)
    with fused_operations():
        return kernels_of(batch_step(model, batch, compiled=compiled))


def count_batch_nodes(model: Any, *, compiled: bool) -> Counter[str]:
    """Count all nodes of that step's graph on this device, views too: each costs the host."""
    return nodes_of(batch_step(model, read_batch(model), compiled=compiled))


def read_batch(model: Any, lengths: Sequence[int] = LENGTHS) -> Any:
    """Return a batch that has read prompts of so many tokens."""
    from internvl3_mlx.models.cache import KVCache
    from internvl3_mlx.models.ragged_cache import RaggedBatch

    language = model.language_model
    batch = RaggedBatch(len(language.model.layers))
    for length in lengths:
        caches = [KVCache(CAPACITY) for _ in language.model.layers]
        prompt = mx.arange(length)[None]
        mx.eval(language.model(model.embed(prompt), language.rotary(0, length), caches))
        batch.insert(caches)
    mx.eval(batch.state)
    return batch


def batch_step(model: Any, batch: Any, *, compiled: bool) -> mx.array:
    """Return the next token of each sequence, still to be computed."""
    from internvl3_mlx.generation.compiled_step import StepRunner
    from internvl3_mlx.models.static_batch import StaticBatch

    language, tokens = model.language_model, mx.array([[1]] * len(LENGTHS), dtype=mx.int32)
    if compiled:
        ready = StaticBatch.prepare(batch)
        assert ready is not None
        mx.eval(ready.buffers)  # which may have grown
        logits, _ = StepRunner(model, "on").run(ready, tokens, LENGTHS)
    else:
        batch.begin_step()
        rotary = language.ragged_rotary(LENGTHS, [length + 1 for length in LENGTHS])
        logits = language.head(language.model(model.embed(tokens), rotary, batch.layers))
    return mx.argmax(logits[:, -1], axis=-1)


def kernels_of(array: mx.array) -> Counter[str]:
    """Count the nodes of an array's graph that are kernels, by name."""
    return Counter(
        {
            name: count * COPIES.get(name, 1)
            for name, count in nodes_of(array).items()
            if name not in VIEWS
        }
    )


def nodes_of(array: mx.array) -> Counter[str]:
    """Count the nodes of an array's graph by name."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), array)
        return Counter(NODE.findall(path.read_text("utf-8")))


@contextmanager
def fused_operations(*, own: bool = False) -> Iterator[None]:
    """Build graphs as on a GPU, with one operation in the place of each fused one.

    own: of each of our kernels of the decode step, too.
    """

    def single(x: mx.array, *others: Any, **options: Any) -> mx.array:
        given = [*others, *options.values()]
        inputs = [other for other in given if isinstance(other, mx.array)]
        return mx.depends(mx.cumsum(x, axis=-1), inputs) if inputs else mx.cumsum(x, axis=-1)

    def launch(_: Any, inputs: Sequence[mx.array], config: Any) -> list[mx.array]:
        node = single(inputs[0].reshape(-1), *inputs[1:])
        return [node.reshape(shape) for shape in config.shapes]

    devices = ("models.attention", "models.decoder", "models.layers", "generation.compiled_step")
    with ExitStack() as stack:
        for name in ("rms_norm", "rope", "scaled_dot_product_attention"):
            stack.enter_context(patch.object(mx.fast, name, single))
        for module in devices:
            stack.enter_context(patch(f"internvl3_mlx.{module}.on_gpu", lambda: True))
        if own:
            step = "internvl3_mlx.models.step_kernels"
            stack.enter_context(patch(f"{step}.kernels_enabled", lambda: True))
            stack.enter_context(patch(f"{step}.should_use", lambda variant: variant.is_supported))
            stack.enter_context(patch("internvl3_mlx.metal_kernels.dispatch.launch_kernel", launch))
        yield


def kernels_per_layer(
    model: Any, *, compiled: bool, count: Callable[..., Counter[str]] = count_kernels
) -> float:
    """Return how many kernels each further layer adds to a token. count: of one step."""
    decoder = model.language_model.model
    layers = list(decoder.layers)
    whole = count(model, compiled=compiled).total()
    decoder.layers = layers[:1]
    try:
        one = count(model, compiled=compiled).total()
    finally:
        decoder.layers = layers
    return (whole - one) / (len(layers) - 1)
