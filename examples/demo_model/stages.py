"""Say what sets the stages of the training apart: rates, losses, and the shapes of pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Grid = tuple[int, int]
ONE: Grid = (1, 1)

# Grid -> share of the batches.
MOSTLY_SQUARE: dict[Grid, float] = {
    ONE: 0.80,
    (2, 1): 0.045,
    (1, 2): 0.045,
    (2, 2): 0.07,
    (3, 1): 0.012,
    (1, 3): 0.012,
    (4, 1): 0.008,
    (1, 4): 0.008,
}
MOSTLY_LONG: dict[Grid, float] = {
    ONE: 0.54,
    (2, 1): 0.08,
    (1, 2): 0.10,
    (2, 2): 0.09,
    (3, 1): 0.11,
    (1, 3): 0.04,
    (4, 1): 0.02,
    (1, 4): 0.02,
}
EVERY_SHAPE: dict[Grid, float] = {
    ONE: 0.66,
    (2, 1): 0.07,
    (1, 2): 0.07,
    (2, 2): 0.11,
    (3, 1): 0.05,
    (1, 3): 0.02,
    (4, 1): 0.01,
    (1, 4): 0.01,
}
TASK_WEIGHT = {
    "where": 1.3,
    "exists": 1.2,
    "at": 0.8,
    "list": 0.6,
    "count_all": 1.0,
    "color": 1.2,
    "shape": 0.6,
}


@dataclass(frozen=True)
class Lessons:
    """Say what a stage draws: shares of grids, and weights of tasks (others: 1).

    ``squashed`` is the share of single tiles that show a long picture whole, as a thumbnail does.
    ``whole`` is the share of rows with delta 1; the others draw evenly from all nine.
    ``boxed`` is the share of scenes with a question for a box.
    ``kinds`` shares the steps among kinds of images.
    """

    grids: dict[Grid, float]
    tasks: dict[str, float]
    squashed: float = 0.0
    whole: float = 0.0
    boxed: float = 0.0
    kinds: Mapping[str, float] = field(default_factory=lambda: {"scenes": 1.0})


@dataclass(frozen=True)
class Stage:
    """Set a stage's learning rates and what its losses weigh.

    ``tower`` is the tower's share of the learning rate (what already sees changes slowly),
    ``seeing`` the weight of the dense labels' loss. ``plateau`` is the share of the steps after
    which the rate starts its way to zero.
    """

    muon: float
    adam: float
    tower: float
    seeing: float
    lessons: Lessons
    plateau: float = 0.6


EVEN = Lessons(MOSTLY_SQUARE, TASK_WEIGHT)
LONG = Lessons(MOSTLY_LONG, {**TASK_WEIGHT, "at": 1.2, "count_all": 2.0}, squashed=0.6, whole=0.25)
BROAD = Lessons(
    EVERY_SHAPE,
    {**TASK_WEIGHT, "at": 1.2, "count": 1.3, "count_all": 1.3, "name": 1.6},
    boxed=0.12,
    squashed=0.35,
    whole=0.3,
    kinds={
        "mosaics": 0.40,
        "letters": 0.08,
        "scenes": 0.28,
        "known": 0.12,
        "follow_ups": 0.025,
        "words": 0.06,
        "charts": 0.01,
        "pairs": 0.025,
    },
)
# Reading: the next character has to be found from the one before, which takes many lines.
READ = Lessons(
    EVERY_SHAPE,
    BROAD.tasks,
    boxed=0.15,
    squashed=0.35,
    whole=0.3,
    kinds={
        "mosaics": 0.10,
        "letters": 0.10,
        "scenes": 0.15,
        "known": 0.12,
        "follow_ups": 0.02,
        "words": 0.45,
        "charts": 0.03,
        "pairs": 0.03,
    },
)
# What the stages before knew, and long images, come back; the rates are low.
SETTLED = Lessons(
    MOSTLY_LONG,
    {**BROAD.tasks, "exists": 1.8, "count": 1.8, "count_all": 1.8, "list": 1.0},
    boxed=0.12,
    squashed=0.45,
    whole=0.3,
    kinds={
        "mosaics": 0.24,
        "letters": 0.05,
        "scenes": 0.27,
        "known": 0.20,
        "follow_ups": 0.03,
        "words": 0.15,
        "charts": 0.03,
        "pairs": 0.03,
    },
)
STAGES = {
    "see": Stage(muon=0.01, adam=2e-3, tower=1.0, seeing=1.0, lessons=EVEN),
    "ask": Stage(muon=0.02, adam=2e-3, tower=0.2, seeing=0.3, lessons=EVEN),
    "widen": Stage(muon=0.009, adam=9e-4, tower=0.8, seeing=0.6, lessons=LONG),
    "broaden": Stage(muon=0.009, adam=9e-4, tower=1.0, seeing=0.6, lessons=BROAD, plateau=0.5),
    "read": Stage(muon=0.009, adam=9e-4, tower=1.0, seeing=0.6, lessons=READ, plateau=1.0),
    "settle": Stage(muon=0.006, adam=6e-4, tower=0.8, seeing=0.5, lessons=SETTLED, plateau=0.25),
}
