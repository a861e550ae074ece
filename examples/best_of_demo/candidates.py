"""Write the candidates to a question, for every demo that chooses among several."""

from collections.abc import Sequence
from pathlib import Path

from internvl3_mlx import VLM
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.test_time_scaling.best_of import log_prob_score
from internvl3_mlx.test_time_scaling.candidates import write_candidates

SEED_STEP = 1000  # more than the candidates of a question


def question_seed(seed: int, number: int, questions: int) -> int:
    """Return other random numbers for each question: equal draws would go astray together."""
    return (seed * questions + number) * SEED_STEP


def candidates(
    vlm: VLM, question: str, images: Sequence[str | Path], config: GenerationConfig, count: int
) -> tuple[list[str], list[float]]:
    """Write answers, the first greedily; return them with their mean log-probabilities."""
    inputs = vlm.runner.build_inputs(question, images, config)
    written = dict(write_candidates(vlm.runner, inputs, config, count, log_probs=True))
    answers = [written[number] for number in range(count)]
    return [answer.text.strip() for answer in answers], [log_prob_score(a) for a in answers]
