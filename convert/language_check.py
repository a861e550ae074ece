"""Compare a language model that was written for mlx-lm, as mlx-lm computes it, with its source."""

import time
from math import inf
from pathlib import Path

import mlx.core as mx
import numpy as np

from internvl3_mlx.checkpoints.build_model import LoadedModel, assemble_model
from internvl3_mlx.checkpoints.reader import open_checkpoint
from internvl3_mlx.convert.calibration.calibrate import MAX_COPY_KL, MEMORY_SHARE, machine_memory
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.convert.calibration.metrics import OutputCheck, compare_log_probs, log_softmax
from internvl3_mlx.convert.calibration.passage import passage_sample
from internvl3_mlx.convert.calibration.streaming import dequantize_on_cpu, stream_log_probs
from internvl3_mlx.errors import CheckpointError

PROBE_TOKENS, PROBE_SEED = 24, 7


def compare_language_part(
    source: Path, target: Path, *, same: bool, seconds: float = inf
) -> OutputCheck | None:
    """Run the source by our model and the target by mlx-lm on random tokens and on a passage.

    None where the target does not fit in memory, or where the source alone takes ``seconds``.
    Raises CheckpointError where mlx-lm does not load the target, and with ``same`` where its
    outputs differ.
    """
    nbytes = sum(info.nbytes for info in open_checkpoint(target).tensors.values())
    if nbytes > MEMORY_SHARE * machine_memory():
        return None
    started = time.monotonic()
    loaded = assemble_model(source)
    loaded.model.eval()
    samples = [random_sample(loaded), passage_sample(loaded)]
    reference = stream_log_probs(loaded, samples, lambda: None)
    del loaded
    if time.monotonic() - started > seconds:
        return None
    actual = mlx_lm_log_probs(target, samples)
    probe, text = (
        compare_log_probs([sample], [expected], [found])
        for sample, expected, found in zip(samples, reference, actual, strict=True)
    )
    differing = max(probe.kl, text.kl)
    if not differing <= (MAX_COPY_KL if same else inf):
        raise CheckpointError(
            f"mlx-lm answers differently from {source} (KL {differing:.4f}); nothing was written; "
            "update mlx-lm (pip install -U mlx-lm), or convert the whole model (drop --part)"
        )
    return OutputCheck(probe, text)


def random_sample(loaded: LoadedModel) -> CalibrationSample:
    """Make a sample of random tokens of text, all but the first scored."""
    rng = np.random.default_rng(PROBE_SEED)
    vocabulary = min(loaded.tokenizer.image_id, loaded.config.text.vocab_size)
    return CalibrationSample(rng.integers(0, vocabulary, size=PROBE_TOKENS).tolist(), None, 0)


def mlx_lm_log_probs(folder: Path, samples: list[CalibrationSample]) -> list[mx.array]:
    """Return what mlx-lm computes after each scored token of each sample: (K, vocab) float32.

    Raises CheckpointError where it does not load the folder.
    """
    from mlx_lm.utils import load_model

    try:
        model, _ = load_model(folder, lazy=True)
    except Exception as error:  # noqa: BLE001  mlx-lm and its libraries raise whatever they like
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"mlx-lm does not load what was written: {reason}; nothing was written; update mlx-lm "
            "(pip install -U mlx-lm)"
        ) from error
    dequantize_on_cpu(model)
    found = []
    for sample in samples:
        logits = model(mx.array([sample.token_ids]))[0, sample.first_scored : -1]
        found.append(log_softmax(logits))
        mx.eval(found[-1])
    return found
