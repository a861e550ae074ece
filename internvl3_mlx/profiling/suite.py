"""The whole measurement in its order: the machine's limits, our kernels, a model's stages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import mlx.core as mx

from internvl3_mlx.device import on_gpu
from internvl3_mlx.metal_kernels import dispatch
from internvl3_mlx.metal_kernels.registry import Entry, write_table
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.profiling import kernels, limits
from internvl3_mlx.profiling.kernels import Trial
from internvl3_mlx.profiling.limits import Limits
from internvl3_mlx.profiling.results import Figure, Task
from internvl3_mlx.profiling.stages import TILES, Stages
from internvl3_mlx.profiling.timing import RUNS

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
QUICK_CONTEXTS = (1024, 4096, 16384)
CPU_CONTEXTS, QUICK_CPU_CONTEXTS = (1024, 4096), (512,)  # a processor needs seconds for more
QUICK_RUNS = 3


@dataclass
class Bench:
    """What is to be measured, and what has been so far. ``contexts``: none for what suits.

    ``kept``: whether where kernels pay could be written down, None as long as it was not tried.
    """

    model: InternVL
    contexts: Sequence[int] = ()
    quick: bool = False
    limits: Limits | None = None
    figures: list[Figure] = field(default_factory=list)
    kernels: dict[Trial, list[Figure]] = field(default_factory=dict)
    is_whole: bool = False
    kept: bool | None = None

    def __post_init__(self) -> None:
        self.is_whole = not (self.contexts or self.quick)
        suited = (QUICK_CONTEXTS if self.quick else CONTEXTS) if on_gpu() else (
            QUICK_CPU_CONTEXTS if self.quick else CPU_CONTEXTS
        )  # fmt: skip
        self.contexts = sorted({*(self.contexts or suited)})

    def __len__(self) -> int:
        return 1 + len(self.kernel_tasks) + len(self.stage_tasks)

    def run(self) -> Iterator[str]:
        """Measure one thing after another, naming each before it is begun. What was measured
        stays, however this ends."""
        yield "the machine's own limits"
        self.limits = limits.measure(quick=self.quick)
        yield from self.measure(self.kernel_tasks)
        if self.is_whole and self.entries:  # at once: the stages already decode by it
            self.kept = write_table(self.entries)
        yield from self.measure(self.stage_tasks)

    def measure(self, tasks: Sequence[Task]) -> Iterator[str]:
        for task in tasks:
            yield task.name
            self.figures.append(task.measure())
            mx.clear_cache()

    @cached_property
    def kernel_tasks(self) -> list[Task]:
        return [
            Task(f"kernels, {trial.name}, {context:,} tokens", partial(self.kernel, trial, context))
            for trial in kernels.trials(quick=self.quick)
            for context in self.contexts
        ]

    @cached_property
    def stage_tasks(self) -> list[Task]:
        tiles = TILES[:1] if self.quick else TILES
        return Stages(self.model, self.contexts, tiles, runs=self.runs).tasks()

    @property
    def runs(self) -> int:
        return QUICK_RUNS if self.quick else RUNS

    def kernel(self, trial: Trial, context: int) -> Figure:
        figure = kernels.measured(trial, context, self.runs)
        self.kernels.setdefault(trial, []).append(figure)
        return figure

    @property
    def entries(self) -> list[Entry]:
        """Say where our kernels pay, from the trials whose contexts were all measured.

        Nothing where none could run: that says nothing of them.
        """
        if not dispatch.metal_available() or dispatch.setting() == dispatch.OFF:
            return []
        whole = {t: found for t, found in self.kernels.items() if len(found) == len(self.contexts)}
        return kernels.entries(whole)
