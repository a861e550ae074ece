"""The result of an evaluation: scores with intervals, and everything they depend on."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from internvl3_mlx.evaluation.eval_settings import EvalSettings
from internvl3_mlx.evaluation.published import PublishedScore, published_score
from internvl3_mlx.evaluation.scoring import METRICS, Score, aggregate, by_category
from internvl3_mlx.files import content_digest
from internvl3_mlx.metrics.group_scores import ScoredItem

LIBRARIES = ("internvl3-mlx", "mlx", "mlx-lm", "numpy", "pillow", "tokenizers")
DECIMALS = 4


@dataclass(eq=False)
class RunCosts:
    """What answering took in this process: a resumed run counts only its own answers."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_memory_gb: float = 0.0

    def add(self, tokens: int, memory_gb: float) -> None:
        self.answers += 1
        self.tokens += tokens
        self.peak_memory_gb = max(self.peak_memory_gb, memory_gb)

    def to_dict(self) -> dict[str, Any]:
        rate = self.tokens / self.seconds if self.seconds else None
        return {
            "answers_in_this_run": self.answers,
            "seconds": round(self.seconds, 2),
            "tokens_per_second": None if rate is None else round(rate, 2),
            "peak_memory_gb": round(self.peak_memory_gb, DECIMALS),
        }


@dataclass(frozen=True, eq=False)
class EvalResult:
    """A result. unread: answers in which nothing was found. cut: ended at the token limit."""

    settings: EvalSettings
    score: Score
    categories: Mapping[str, Score]
    published: PublishedScore | None
    errors: int
    unread: int
    judged: int
    cut: int
    costs: RunCosts

    def to_dict(self) -> dict[str, Any]:
        """Return what ``results.json`` holds."""
        settings, how = self.settings, self.settings.how
        return {
            "task": settings.task,
            "title": settings.title,
            "model": settings.model,
            "adapter": settings.adapter,
            "weights": settings.weights,
            "preset": settings.preset,
            "harness": settings.harness,
            "changed": [*settings.changed],
            "metric": METRICS[how.metric].words,
            "parser": how.parser,
            "judge": settings.judge,
            "best_of": settings.best_of,
            "prompt": how.prompt,
            "cot": how.cot,
            "prompt_digest": content_digest(how.prompt, how.open_prompt or ""),
            "max_tiles": how.max_tiles,
            "max_tokens": how.max_tokens,
            **score_dict(self.score),
            "published": published_dict(self.published),
            "categories": {name: score_dict(score) for name, score in self.categories.items()},
            "errors": self.errors,
            "unread_answers": self.unread,
            "judged_answers": self.judged,
            "cut_answers": self.cut,
            "limit": settings.limit,
            "seed": settings.seed,
            "data": dict(settings.data),
            **self.costs.to_dict(),
            "versions": library_versions(),
        }


def score_dict(score: Score) -> dict[str, Any]:
    interval = score.interval
    return {
        "n": score.n,
        "score": round(score.value, DECIMALS),
        "interval_95": [round(interval.low, DECIMALS), round(interval.high, DECIMALS)],
        "interval_method": interval.method,
    }


def published_dict(published: PublishedScore | None) -> dict[str, Any] | None:
    if published is None:
        return None
    note = {"note": published.note} if published.note else {}
    return {"model": published.model, "score": published.score, **note}


def summarize(
    settings: EvalSettings,
    scored: Sequence[ScoredItem],
    rows: Sequence[Mapping[str, Any]],
    costs: RunCosts,
) -> EvalResult:
    """Aggregate scored items and count what needs the reader's attention."""
    metric = settings.how.metric
    return EvalResult(
        settings=settings,
        score=aggregate(metric, scored, seed=settings.seed),
        categories=by_category(metric, scored),
        published=published_score(settings.task, settings.model),
        errors=sum(row["error"] is not None for row in rows),
        unread=sum(row["extracted"] is None and row["error"] is None for row in rows),
        judged=sum(row["judged"] for row in rows),
        cut=sum(row["finish_reason"] == "length" for row in rows),
        costs=costs,
    )


def library_versions() -> dict[str, str]:
    """Return the versions of Python, the system and the libraries that affect an answer."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{name: _installed(name) for name in LIBRARIES},
    }


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
