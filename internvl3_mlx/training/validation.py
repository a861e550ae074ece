"""Validate and test the model of a run as it is."""

import math
from dataclasses import replace

from internvl3_mlx.training.answer_samples import sample_answers
from internvl3_mlx.training.evaluate import evaluate
from internvl3_mlx.training.events import TestEvaluated, ValidationDone
from internvl3_mlx.training.export import save_best
from internvl3_mlx.training.session import TrainSession


def run_validation(session: TrainSession) -> ValidationDone:
    """Evaluate on the validation data, and save the result as the best if it is."""
    state, progress = session.state, session.progress
    tokenizer = session.setup.preprocessor.tokenizer
    loss, metrics, exact_match = evaluate(state, tokenizer, session.validation_batches)
    score = sample_answers(session)
    if score is not None:
        metrics = {**metrics, f"answer_{session.config.eval_metric}": score}
    best = math.inf if progress.best_loss is None else progress.best_loss
    is_best = loss < best  # never true for NaN
    if is_best:
        session.progress = replace(
            progress, best_loss=loss, best_update=state.update, validations_since_best=0
        )
        if state.ranks.is_main:
            save_best(session)
    else:
        since_best = progress.validations_since_best + 1
        session.progress = replace(progress, validations_since_best=since_best)
    return ValidationDone(state.update, loss, metrics, exact_match, is_best)


def run_test(session: TrainSession) -> TestEvaluated:
    """Evaluate on the test data with the final weights."""
    tokenizer = session.setup.preprocessor.tokenizer
    return TestEvaluated(*evaluate(session.state, tokenizer, session.test_batches))
