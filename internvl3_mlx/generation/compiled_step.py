"""A decode step compiled by MLX: a pure function from arrays to arrays (ADR 16).

Python builds the graph of a step once, and MLX replays it for every token after it. Weights and
buffers are arguments, so that a trace keeps none of them alive, and an adapter that is swapped in
needs another trace only if it changes the structure of the modules.
"""

import copy
import os
import shutil
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from internvl3_mlx.device import on_gpu
from internvl3_mlx.distributed.agreement import from_rank_0
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.sampler import Sampler, SamplerState, SamplingParams
from internvl3_mlx.metal_kernels import dispatch
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.static_cache import StaticContext

MODE_VARIABLE = "INTERNVL3_COMPILE"
OFF, ON, AUTO = MODES = ("off", "on", "auto")
CPU_COMPILER = "g++"  # that MLX calls on a CPU, once for each elementwise operation of the step
# tokens that a model decodes before ``auto`` compiles its step (docs/performance.md)
GPU_TOKENS_BEFORE, CPU_TOKENS_BEFORE = 32, 4096
MAX_TRACES = 32  # of one model; the one that was not used for longest is dropped
STEADY_STEPS = 8  # that a composition of a batch lasts before it is traced
NOT_FINITE = -1  # in place of a token that was chosen from logits that are not numbers


def compile_mode() -> str:
    """Read INTERNVL3_COMPILE: off, on, or auto (where it pays). Raises UserError."""
    given = os.environ.get(MODE_VARIABLE, AUTO).strip().lower() or AUTO
    if given not in MODES:
        raise UserError(
            f"{MODE_VARIABLE}={given} is not a mode; choose from {', '.join(MODES)}, or unset it"
        )
    return given


@cache
def can_compile() -> bool:
    """Return whether MLX can compile here: on a CPU it calls a C++ compiler, which may be missing.

    A compiler that is there but does not work is found by compiling one operation.
    """
    if on_gpu():
        return True
    if shutil.which(CPU_COMPILER) is None:
        return False
    try:
        mx.eval(mx.compile(lambda x: x * 2 + 1)(mx.zeros(1)))
    except RuntimeError:
        return False
    return True


def tokens_before_compiling() -> int:
    """Return how many tokens a model decodes before ``auto`` compiles its step.

    On a CPU every elementwise operation of the step starts a C++ compiler, about 20 seconds in all.
    """
    return GPU_TOKENS_BEFORE if on_gpu() else CPU_TOKENS_BEFORE


def describe_use() -> str:
    """Say in a few words whether decode steps are compiled on this machine, and from when on."""
    mode = compile_mode()
    if mode == OFF:
        return "nowhere"
    if not can_compile():
        return f"nowhere: MLX needs a C++ compiler on a CPU, and {CPU_COMPILER} does not work"
    if mode == ON:
        return "from the first token"
    return f"once a model has decoded {tokens_before_compiling():,} tokens"


def mark_not_finite(tokens: mx.array, logits: mx.array) -> mx.array:
    """Replace a token by NOT_FINITE where its logits are not finite. tokens: (B,), logits: (B, V).

    A part of the graph, so that nothing waits for the host.
    """
    signed = tokens.astype(mx.int32)
    finite = mx.all(mx.isfinite(logits), axis=-1)
    return mx.where(finite, signed, mx.array(NOT_FINITE, mx.int32))


class Layout(Protocol):
    """The caches of a step as it sees them. Hashable; equal layouts share a trace."""

    def contexts(
        self, plan: Sequence[mx.array], buffers: list[mx.array]
    ) -> Sequence[StaticContext]:
        """Return the context of each layer, with these buffers."""
        ...


class StaticCaches(Protocol):
    """Caches that are ready for a step. plan: the arrays that say where it reads and writes."""

    @property
    def layout(self) -> Layout: ...
    @property
    def plan(self) -> list[mx.array]: ...
    @property
    def buffers(self) -> list[mx.array]: ...

    def take(self, buffers: list[mx.array]) -> None:
        """Take the buffers back after a step, and count its tokens."""
        ...


@dataclass(frozen=True)
class TraceKey:
    """All that a trace depends on beside the shapes of its arguments.

    structure: the number of the modules' structure. sampling: of each row; None for a step that
    ends with the logits.
    """

    structure: int
    layout: Layout
    sampling: tuple[SamplingParams, ...] | None
    on_gpu: bool


@dataclass(eq=False)
class CompiledSteps:
    """The traced steps of one model, and how many tokens it has decoded without them."""

    traces: dict[TraceKey, Callable[..., Any]] = field(
        default_factory=dict[TraceKey, Callable[..., Any]]
    )
    structures: dict[Hashable, int] = field(default_factory=dict[Hashable, int])
    tokens_before: int = 0

    @classmethod
    def of(cls, model: InternVL) -> "CompiledSteps":
        """Return those of a model; they end with it."""
        steps: CompiledSteps | None = model.__dict__.get("compiled_steps")
        if steps is None:
            steps = model.__dict__["compiled_steps"] = cls()
        return steps

    def number(self, structure: Hashable) -> int:
        """Return a number in place of a structure, which would be hashed for every token."""
        return self.structures.setdefault(structure, len(self.structures))

    def get(self, key: TraceKey, model: InternVL) -> Callable[..., Any]:
        """Return the step for a key; it is traced at its first call."""
        step = self.traces.pop(key, None) or trace_step(weakref.ref(model), key)
        self.traces[key] = step  # the last one used comes last
        if len(self.traces) > MAX_TRACES:
            self.traces.pop(next(iter(self.traces)), None)  # unless another thread was faster
        return step

    def is_due(self, mode: str, tokens: int) -> bool:
        """Return whether to compile now. Counts the tokens that are decoded without."""
        if mode == AUTO and self.tokens_before < tokens_before_compiling():
            self.tokens_before += tokens
            return False
        return mode != OFF and can_compile()


@dataclass(eq=False)
class StepRunner:
    """Reads tokens by compiled steps, wherever one can be used.

    The caches are at any time what they would be without: steps may alternate with plain ones.
    """

    model: InternVL
    mode: str = field(default_factory=compile_mode)
    steady: tuple[TraceKey | None, int] = (None, 0)  # the last one, and how often it was asked for

    @cached_property
    def slots(self) -> list[tuple[nn.Module, str]]:
        return list(weight_slots(self.model.language_model))

    @cached_property
    def structure(self) -> int:
        structure = module_structure(self.model.language_model), dispatch.kernel_mode()
        return CompiledSteps.of(self.model).number(structure)

    def is_due(self, tokens: int = 1) -> bool:
        """Return whether the next tokens are to be read by a compiled step."""
        return CompiledSteps.of(self.model).is_due(self.mode, tokens)

    def is_steady(self, layout: Layout, sampler: Sampler | None = None) -> bool:
        """Return whether a layout that changes at times has stayed long enough to be traced."""
        key, (last, times) = self.key(layout, sampler), self.steady
        times = times + 1 if key == last else 1
        self.steady = (key, times)
        has_lasted = self.mode == ON or times >= STEADY_STEPS
        return has_lasted or key in CompiledSteps.of(self.model).traces

    def key(self, layout: Layout, sampler: Sampler | None) -> TraceKey:
        params = None if sampler is None else sampler.params
        return TraceKey(self.structure, layout, params, on_gpu())

    def run(
        self,
        caches: StaticCaches,
        tokens: mx.array,
        positions: Sequence[int],
        sampler: Sampler | None = None,
        state: SamplerState | None = None,
    ) -> tuple[mx.array, SamplerState | None]:
        """Read L tokens of each sequence, (B, L), whose positions begin at ``positions``.

        Returns the next tokens, (B,) int32, and the sampler's state; without a sampler the logits
        after each token, (B, L, vocab).
        """
        key = self.key(caches.layout, sampler)
        step = CompiledSteps.of(self.model).get(key, self.model)
        weights = [module[name] for module, name in self.slots]
        first = mx.array([*positions], dtype=mx.int32)
        out, buffers, after = step(
            weights, tokens, first, caches.plan, caches.buffers, list(state or ())
        )
        caches.take(buffers)
        return out, SamplerState(*after) if after else None


def trace_step(model: Callable[[], InternVL | None], key: TraceKey) -> Callable[..., Any]:
    """Return the compiled step of ``StepRunner.run``, as a function of arrays alone.

    ``model``, which is not kept alive, is only needed while the step is traced.
    """
    sampler = None if key.sampling is None else Sampler(key.sampling)

    def step(
        weights: list[mx.array],
        tokens: mx.array,
        positions: mx.array,
        plan: list[mx.array],
        buffers: list[mx.array],
        state: list[mx.array],
    ) -> tuple[mx.array, list[mx.array], list[mx.array]]:
        loaded = model()
        assert loaded is not None
        traced = twin_modules(loaded)  # other threads go on with the model itself
        language = traced.language_model
        contexts = key.layout.contexts(plan, buffers)
        fill_slots(list(weight_slots(language)), weights)
        rotary = language.step_rotary(positions, tokens.shape[1])
        is_single = tokens.shape[1] == 1  # then without the axis of tokens (``has_one_token``)
        states = language.model(
            traced.embed(tokens[:, 0] if is_single else tokens), rotary, contexts
        )
        logits = language.head(states if is_single or sampler is None else states[:, -1])
        written = [array for context in contexts for array in context.arrays]
        if sampler is None:
            return logits[:, None] if is_single else logits, written, []
        chosen, after = sampler(logits, SamplerState(*state))
        token = from_rank_0(traced.shard, mark_not_finite(chosen, logits))
        return token, written, [*after]

    compiled: Callable[..., Any] = mx.compile(step)
    return compiled


def twin_modules(model: InternVL) -> InternVL:
    """Return the model with a language model of its own, whose arrays can be replaced."""
    twin = copy.copy(model)
    twin.language_model = copy_modules(model.language_model)
    return twin


def copy_modules(module: nn.Module) -> Any:
    """Copy a tree of modules, but no array."""
    twin = copy.copy(module)
    for name, value in module.items():
        twin[name] = tree_map(
            lambda part: copy_modules(part) if isinstance(part, nn.Module) else part,
            value,
            is_leaf=lambda part: isinstance(part, nn.Module),
        )
    return twin


def weight_slots(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield where each array of a module is: its owner and its name there."""
    for owner in module.modules():
        for name, value in owner.items():
            if isinstance(value, mx.array):
                yield owner, name


def fill_slots(slots: Sequence[tuple[nn.Module, str]], arrays: Sequence[mx.array]) -> None:
    for (owner, name), array in zip(slots, arrays, strict=True):
        owner[name] = array


def module_structure(module: nn.Module) -> Hashable:
    """Return what the graph of a module depends on beside the shapes of its arrays.

    The types of all modules, which arrays they have, and their settings: bits, scales, switches.
    """
    return tuple(
        (
            type(owner),
            *(name for name, value in owner.items() if isinstance(value, mx.array)),
            *((k, v) for k, v in vars(owner).items() if isinstance(v, bool | int | float | str)),
        )
        for owner in module.modules()
    )
