"""How many tokens to draft next: adapts to what was accepted, down to none."""

import math
from dataclasses import dataclass

LEAST_CHANCE = 0.4  # that the last drafted token is accepted; below, verifying it costs more
MEMORY = 0.8  # what an earlier round weighs, per round since
FIRST_PAUSE, LONGEST_PAUSE = 16, 256  # tokens without drafts; doubled while drafts stay wrong
PRIOR_ACCEPTED, PRIOR_TRIED = 1.5, 2.0  # as if that had been seen before the first round
RETRY_ACCEPTED, RETRY_TRIED = 0.5, 1.0  # and before a try after a pause


@dataclass
class DraftLength:
    """Chooses the number of drafted tokens, up to ``most``.

    A drafted token is accepted with a chance that is estimated from the last rounds. The draft is
    as long as its last token is still likely to be reached and accepted; with a chance below
    ``LEAST_CHANCE`` drafting pauses, and is tried again after ``pause`` tokens.
    """

    most: int
    accepted: float = PRIOR_ACCEPTED
    tried: float = PRIOR_TRIED
    pause: int = FIRST_PAUSE
    waiting: int = 0

    @property
    def count(self) -> int:
        """How many tokens to draft now: 0 while drafting pauses."""
        if self.waiting:
            return 0
        chance = self.accepted / self.tried
        if chance >= 1:
            return self.most
        likely = math.log(LEAST_CHANCE) / math.log(chance) if chance > 0 else 0.0
        return min(int(likely), self.most)

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
