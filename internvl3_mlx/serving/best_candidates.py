"""Choose the best of several candidates: by a critic, or by the mean log probability."""

import math
from collections.abc import Generator
from dataclasses import dataclass

from internvl3_mlx.serving.queued_request import QueuedRequest
from internvl3_mlx.serving.requests import AnswerDone
from internvl3_mlx.serving.served_model import ServedModel
from internvl3_mlx.test_time_scaling.critic import open_critic


@dataclass(eq=False)
class ScoringTask:
    """Candidates that a critic reads, one at a time between the decode steps of others."""

    queued: QueuedRequest
    critic: ServedModel

    def __post_init__(self) -> None:
        self.pieces = self.run()

    def run(self) -> Generator[list[float] | None, None, None]:
        """Yield None after each candidate, and the scores of all after the last one."""
        runner = self.critic.load().runner
        queued = self.queued
        session = open_critic(runner).open(
            queued.request.messages[0].text, queued.inputs.processed_images, queued.request.config
        )
        known: dict[str, float] = {}
        for candidate in queued.candidates:
            if candidate.text not in known:
                known[candidate.text] = session.score(candidate.text).score
                yield None
        yield [known[candidate.text] for candidate in queued.candidates]


def log_prob_scores(candidates: list[AnswerDone]) -> list[float]:
    """Return the mean log probability of each candidate's tokens; an empty one loses."""
    return [
        sum(one.logprob for one in done.logprobs) / len(done.logprobs)
        if done.logprobs and done.text.strip()
        else -math.inf
        for done in candidates
    ]
