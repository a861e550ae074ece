"""The benchmark in its order: the limits of the machine, our kernels, the stages of a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import mlx.core as mx

from internvl3_mlx.device import on_gpu
from internvl3_mlx.metal_kernels.registry import KernelSpeedup, add_speedups
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.profiling import kernels, limits
from internvl3_mlx.profiling.kernels import AttentionTrial
from internvl3_mlx.profiling.limits import MachineLimits
from internvl3_mlx.profiling.results import Measurement, MeasurementTask
from internvl3_mlx.profiling.stages import TILE_COUNTS, StageBenchmark
from internvl3_mlx.profiling.timing import RUNS

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
QUICK_CONTEXTS = (1024, 4096, 16384)
CPU_CONTEXTS, QUICK_CPU_CONTEXTS = (1024, 4096), (512,)  # more would take a CPU many seconds
QUICK_RUNS = 3


@dataclass
class BenchmarkSuite:
    """A benchmark run and its results so far. ``contexts``: empty for those that suit the device.

    ``speedups_saved``: whether it could be saved where kernels are faster; None before that.
    """

    model: InternVL
    contexts: Sequence[int] = ()
    quick: bool = False
    limits: MachineLimits | None = None
    measurements: list[Measurement] = field(default_factory=list)
    kernel_measurements: dict[AttentionTrial, list[Measurement]] = field(default_factory=dict)
    speedups_saved: bool | None = None

    def __post_init__(self) -> None:
        suited = (QUICK_CONTEXTS if self.quick else CONTEXTS) if on_gpu() else (
            QUICK_CPU_CONTEXTS if self.quick else CPU_CONTEXTS
        )  # fmt: skip
        self.contexts = sorted({*(self.contexts or suited)})

    def __len__(self) -> int:
        return 1 + len(self.kernel_tasks) + len(self.stage_tasks)

    def run(self) -> Iterator[str]:
        """Take all measurements, yielding the name of each before it starts.

        Results stay in ``measurements`` however this ends.
        """
        yield "the limits of the machine"
        self.limits = limits.measure_limits(quick=self.quick)
        yield from self.run_tasks(self.kernel_tasks)
        if self.speedups:  # now, since the stages decode by it
            self.speedups_saved = add_speedups(self.speedups)
        yield from self.run_tasks(self.stage_tasks)

    def run_tasks(self, tasks: Sequence[MeasurementTask]) -> Iterator[str]:
        for task in tasks:
            yield task.name
            self.measurements.append(task.measure())
            mx.clear_cache()

    @cached_property
    def kernel_tasks(self) -> list[MeasurementTask]:
        return [
            MeasurementTask(
                f"kernels, {trial.name}, {context:,} tokens",
                partial(self.measure_kernel, trial, context),
            )
            for trial in kernels.attention_trials(quick=self.quick)
            for context in self.contexts
        ]

    @cached_property
    def stage_tasks(self) -> list[MeasurementTask]:
        tiles = TILE_COUNTS[:1] if self.quick else TILE_COUNTS
        return StageBenchmark(self.model, self.contexts, tiles, runs=self.runs).tasks()

    @property
    def runs(self) -> int:
        return QUICK_RUNS if self.quick else RUNS

    def measure_kernel(self, trial: AttentionTrial, context: int) -> Measurement:
        figure = kernels.measure_attention(trial, context, self.runs)
        self.kernel_measurements.setdefault(trial, []).append(figure)
        return figure

    @property
    def speedups(self) -> list[KernelSpeedup]:
        """How many times faster our kernels are; empty where none could run."""
        return kernels.kernel_speedups(self.kernel_measurements)
