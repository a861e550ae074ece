"""How many tokens to draft next: adapts to what was accepted and to what drafting costs."""

from dataclasses import dataclass

VERIFY_COST = 0.1  # of one more token in a step, in steps of one token (docs/performance.md)
LEAST_GAIN = 1.05  # expected tokens for the time of one; below, nothing is drafted
MEMORY = 0.8  # what an earlier round weighs, per round since
FIRST_PAUSE, LONGEST_PAUSE = 16, 256  # tokens without drafts; doubled while drafts stay wrong
PRIOR_ACCEPTED, PRIOR_TRIED = 1.2, 2.0  # as if that had been seen before the first round
RETRY_ACCEPTED, RETRY_TRIED = 0.5, 1.0  # and before a try after a pause


@dataclass
class DraftLength:
    """Chooses the number of drafted tokens, up to ``most``.

    cost: of drafting and verifying one token, in plain steps. A drafted token is accepted with a
    chance that is estimated from the last rounds; the length is the one that gives the most tokens
    for the time. Where none gains anything, drafting pauses, and is tried again after ``pause``
    tokens.
    """

    most: int
    cost: float = VERIFY_COST
    accepted: float = PRIOR_ACCEPTED
    tried: float = PRIOR_TRIED
    pause: int = FIRST_PAUSE
    waiting: int = 0

    @property
    def count(self) -> int:
        """How many tokens to draft now: 0 while drafting pauses."""
        if self.waiting:
            return 0
        best = max(range(1, self.most + 1), key=self.gain)
        return best if self.gain(best) >= LEAST_GAIN else 0

    def gain(self, count: int) -> float:
        """Return the expected tokens of a round, for the time of a plain one (arXiv 2211.17192)."""
        chance = self.accepted / self.tried
        tokens = sum(chance**n for n in range(count + 1))
        return tokens / (1 + self.cost * count)

    def wait(self) -> None:
        """Count a token that was decoded without drafts."""
        if self.waiting:
            self.waiting -= 1
            if not self.waiting:
                self.accepted, self.tried = RETRY_ACCEPTED, RETRY_TRIED

    def record(self, drafted: int, accepted: int) -> None:
        """Take in a round: the first wrong token ends it, those after it are not tried."""
        self.accepted = MEMORY * self.accepted + accepted
        self.tried = MEMORY * self.tried + min(accepted + 1, drafted)
        if self.count:
            self.pause = FIRST_PAUSE if accepted else self.pause
        else:
            self.waiting, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
