"""Compare ways to choose among candidates on held-out questions, and plot accuracy against N.

    python -m examples.best_of_demo.measure best-of/test.jsonl --critic best-of/critic/best

For every seed, eight candidates of each question are written once: the greedy answer and sampled
ones. Each way chooses among the first N of them.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.best_of_demo.candidates import candidates, question_seed
from examples.best_of_demo.plot import draw_plot
from examples.best_of_demo.rows import read_rows
from internvl3_mlx import VLM, Critic, load, load_critic
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.metrics.answers import vote_key
from internvl3_mlx.metrics.statistics import mean_interval, paired_difference
from internvl3_mlx.records.json_values import write_json
from internvl3_mlx.test_time_scaling.correctness import is_correct
from internvl3_mlx.test_time_scaling.rollout_questions import KnownQuestion, read_questions
from internvl3_mlx.test_time_scaling.vote import first_best, vote_shares

COUNTS = (1, 2, 4, 8)
LONGEST = 24  # tokens of an answer


@dataclass(frozen=True)
class Candidates:
    """The candidates of one question: whether each is right, and its score by each way."""

    right: tuple[bool, ...]
    texts: tuple[str, ...]
    log_probs: tuple[float, ...]
    critic: tuple[float, ...]

    def chosen(self, way: str, count: int) -> float:
        """Return the share of right answers when ``way`` chooses among the first ``count``."""
        right = self.right[:count]
        if way == "greedy":
            return float(right[0])
        if way == "random":
            return sum(right) / count
        if way == "any right":
            return float(any(right))
        scores: Mapping[str, Sequence[float]] = {
            "critic": self.critic[:count],
            "majority": vote_shares(self.texts[:count]),
            "log-probability": self.log_probs[:count],
            "votes weighted by the critic": self.weighted_votes(count),
        }
        return float(right[first_best(scores[way])])

    def weighted_votes(self, count: int) -> list[float]:
        """Add up the critic's scores of equal answers."""
        keys = [vote_key(text) for text in self.texts[:count]]
        scores = [*zip(keys, self.critic, strict=False)]
        return [sum(score for other, score in scores if other == key) for key in keys]


WAYS = (
    *("greedy", "random", "log-probability", "majority", "critic"),
    *("votes weighted by the critic", "any right"),
)


def main() -> None:
    """Print a table, and write figures and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--critic", required=True, help="the folder of a critic")
    parser.add_argument("--critic-system", default="", help="as in internvl3 generate")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--temp", type=float, default=0.6)
    parser.add_argument("--out", type=Path, default=Path("best-of"))
    options = parser.parse_args()
    vlm, critic = load(options.model), load_critic(options.critic, system=options.critic_system)
    known = read_questions(options.questions)
    runs: list[list[Candidates]] = []
    for seed in range(options.seeds):
        runs.append([])
        for question in known:
            drawn = question_seed(seed, question.number, len(known))
            config = GenerationConfig(temperature=options.temp, max_tokens=LONGEST, seed=drawn)
            runs[-1].append(judged(vlm, critic, question, config))
        print(f"seed {seed} done", flush=True)
    figures = summarize(runs)
    figures["tasks"] = by_task(runs, options.questions)
    write_json(options.out / "figures.json", figures)
    (options.out / "best_of.svg").write_text(draw_plot(figures, COUNTS), "utf-8")
    print(table(figures))


def judged(
    vlm: VLM, critic: Critic, question: KnownQuestion, config: GenerationConfig
) -> Candidates:
    """Write the candidates of one question and score them in every way."""
    texts, log_probs = candidates(vlm, question.question, question.images, config, max(COUNTS))
    session = critic.open(question.question, question.images)
    scores = {text: session.score(text).score for text in dict.fromkeys(texts)}
    return Candidates(
        right=tuple(is_correct(text, question.answers) for text in texts),
        texts=tuple(texts),
        log_probs=tuple(log_probs),
        critic=tuple(scores[text] for text in texts),
    )


def summarize(runs: Sequence[Sequence[Candidates]]) -> dict:
    """Return for each way and N the accuracy of each seed, its mean and the interval of all."""
    figures: dict = {"questions": len(runs[0]), "seeds": len(runs), "ways": {}}
    for way in WAYS:
        figures["ways"][way] = {}
        for count in COUNTS:
            per_seed = [[one.chosen(way, count) for one in run] for run in runs]
            per_question = [*np.mean(per_seed, axis=0)]
            interval = mean_interval(per_question)
            figures["ways"][way][count] = {
                "seeds": [float(np.mean(scores)) for scores in per_seed],
                "mean": float(np.mean(per_question)),
                "low": interval.low,
                "high": interval.high,
            }
    greedy, critic = (
        [*np.mean([[one.chosen(way, max(COUNTS)) for one in run] for run in runs], axis=0)]
        for way in ("greedy", "critic")
    )
    difference = paired_difference(greedy, critic)
    figures["critic against greedy"] = {
        "mean": difference.mean,
        "low": difference.interval.low,
        "high": difference.interval.high,
    }
    pairs = [
        (one.critic[a] > one.critic[b], one.right[a])
        for run in runs
        for one in run
        for a in range(len(one.right))
        for b in range(len(one.right))
        if one.right[a] != one.right[b] and one.critic[a] != one.critic[b]
    ]
    agreed = [ranked == right for ranked, right in pairs]
    figures["right ranked above wrong"] = float(np.mean(agreed)) if agreed else math.nan
    figures["different wrong answers"] = float(
        np.mean(
            [
                len({text for text, right in zip(one.texts, one.right, strict=True) if not right})
                for run in runs
                for one in run
                if not all(one.right)
            ]
        )
    )
    return figures


def by_task(runs: Sequence[Sequence[Candidates]], questions: Path) -> dict:
    """Return the accuracy at the largest N for each task."""
    tasks = [row["task"] for row in read_rows(questions)]
    most = max(COUNTS)
    return {
        task: {
            way: float(
                np.mean(
                    [
                        one.chosen(way, most)
                        for run in runs
                        for one, name in zip(run, tasks, strict=True)
                        if name == task
                    ]
                )
            )
            for way in WAYS
        }
        for task in sorted({*tasks})
    }


def table(figures: dict) -> str:
    lines = ["| way | " + " | ".join(f"N = {count}" for count in COUNTS) + " |"]
    lines.append("|---|" + "---:|" * len(COUNTS))
    for way, row in figures["ways"].items():
        cells = [f"{100 * row[count]['mean']:.1f}" for count in COUNTS]
        last = row[COUNTS[-1]]
        cells[-1] += f" ({100 * last['low']:.1f}–{100 * last['high']:.1f})"
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
