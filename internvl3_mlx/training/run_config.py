"""The settings of how a run goes: memory, reports, validation, checkpoints."""

from dataclasses import dataclass

from internvl3_mlx.option_fields import config_field
from internvl3_mlx.training.config_fields import ANSWER_METRICS, LOGGERS, ON_LOSS_SPIKE


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run reports, validates, saves and protects itself, and what it does about memory."""

    grad_checkpoint: bool = config_field(
        False, "Memory", "Recompute activations in the backward pass to save memory."
    )
    memory_limit: float | None = config_field(
        None,
        "Memory",
        "Save and stop if memory use exceeds this many GB.",
        low=0,
        default_text="the GPU's limit",
    )
    compile: bool = config_field(
        False, "Memory", "Compile the training step; pads samples to a few lengths."
    )
    steps_per_report: int = config_field(10, "Run", "Updates between progress reports.", low=1)
    steps_per_eval: int = config_field(100, "Run", "Updates between validations.", low=1)
    val_batches: int | None = config_field(
        None, "Run", "Number of validation batches.", low=1, default_text="all"
    )
    eval_accuracy: bool = config_field(
        False, "Run", "Measure the exact-match rate of the answers to the validation data."
    )
    eval_metric: str | None = config_field(
        None,
        "Run",
        "Generate answers to validation data before and during the run, scored by this metric.",
        choices=ANSWER_METRICS,
        default_text="none",
    )
    eval_samples: int = config_field(
        8, "Run", "Number of validation records that --eval-metric answers.", low=1
    )
    patience: int | None = config_field(
        None,
        "Run",
        "Stop after this many validations without a lower loss.",
        low=1,
        default_text="never",
    )
    save_every: int = config_field(100, "Run", "Updates between checkpoints.", low=1)
    save_minutes: float = config_field(
        10.0,
        "Run",
        "Minutes between checkpoints; 0 saves by updates alone.",
        low=0,
    )
    on_loss_spike: str = config_field(
        "step-back",
        "Run",
        "If the loss explodes: go back to the last good checkpoint with half the learning rate.",
        choices=ON_LOSS_SPIKE,
    )
    peer_timeout: float = config_field(
        300.0,
        "Run",
        "Save and end if another process does not answer for this many seconds.",
        low=1,
    )
    tensor_parallel: int = config_field(
        1, "Run", "Divide the model among this many processes, and train adapters on it.", low=1
    )
    keep_last: int = config_field(2, "Run", "Number of checkpoints to keep.", low=1)
    report_to: tuple[str, ...] = config_field(
        (),
        "Run",
        f"Loggers besides the CSV: {', '.join(LOGGERS)}, comma-separated.",
        metavar="NAMES",
    )
