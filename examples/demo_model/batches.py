"""Turn scenes into training batches: tiles, dense labels, and one row of tokens per picture."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.demo_model.labels import Labels, label
from examples.demo_model.questions import Question, ask
from examples.demo_model.rows import Row, RowBuilder
from examples.demo_model.scenes import SEEN, Scene, compose
from examples.demo_model.sprites import SpriteBank
from examples.demo_model.stages import ONE, Grid, Lessons
from examples.demo_model.vocabulary import TRAIN_STYLES
from internvl3_mlx.images.tiling import TilePolicy, to_tiles

TRAINING_SEED = 1  # first word of every training seed; evaluation uses another
BANK_STEPS = 300  # steps after which sprites are drawn anew
TILE = 112
POLICY = TilePolicy(tile_size=TILE, max_tiles=4)
THUMBNAIL_ONLY = TilePolicy(tile_size=TILE, max_tiles=1)
ONLY_ONE = 0.25  # weight of a count whose answer is 1: most things in most pictures come once
QUESTIONS = 6  # asked about each picture


@dataclass(frozen=True)
class Batch:
    """Hold a step's tiles (B, T, S, S, 3) uint8, dense labels, and token rows (stage ask)."""

    tiles: np.ndarray
    labels: Labels
    rows: Row | None


class BatchMaker:
    """Make the batch of any step from its number alone, so that training resumes exactly."""

    def __init__(self, rows: RowBuilder | None, lessons: Lessons, *, rank: int, pictures: int):
        self.rows, self.lessons, self.rank, self.pictures = rows, lessons, rank, pictures
        self.bank: SpriteBank | None = None
        self.bank_age = -1

    def make(self, step: int, *, many_tiles: float = 1.0) -> Batch:
        """Make a batch; ``many_tiles`` scales the share of pictures with several tiles."""
        random = np.random.default_rng((TRAINING_SEED, self.rank, step))
        self.renew(step // BANK_STEPS)
        grid = draw_grid(random, self.lessons.grids, one=1.0, several=many_tiles)
        count = max(4, round(self.pictures / tile_total(grid) ** 0.8))
        scenes = [
            compose(random, self.size(random, grid), SEEN, self.bank.draw) for _ in range(count)
        ]
        policy = THUMBNAIL_ONLY if grid == ONE else POLICY
        tiles = np.stack([to_tiles(Image.fromarray(scene.pixels), policy) for scene in scenes])
        labels = label(scenes, grid, TILE)
        if self.rows is None:
            return Batch(tiles, labels, None)
        asked = choose(random, scenes, self.lessons.tasks)
        return Batch(
            tiles,
            labels,
            self.rows.build(random, tiles.shape[1], asked, whole=self.lessons.whole),
        )

    def size(self, random: np.random.Generator, grid: Grid) -> tuple[int, int]:
        """Draw a size for a grid; a share of the single tiles show a long picture whole."""
        squashed = self.lessons.squashed
        if grid == ONE and squashed and random.random() < squashed:
            return picture_size(random, draw_grid(random, self.lessons.grids, one=0.0, several=1.0))
        return picture_size(random, grid)

    def renew(self, age: int) -> None:
        """Draw new sprite variations when the old ones have served long enough."""
        if age != self.bank_age:
            self.bank_age = age
            self.bank = SpriteBank(
                np.random.default_rng((TRAINING_SEED, self.rank, age, 0)), TRAIN_STYLES
            )


def draw_grid(
    random: np.random.Generator, shares: dict[Grid, float], *, one: float, several: float
) -> Grid:
    """Draw a grid by shares, those of one tile and of several scaled."""
    grids = list(shares)
    wanted = np.array([shares[grid] * (one if grid == ONE else several) for grid in grids])
    return grids[random.choice(len(grids), p=wanted / wanted.sum())]


def tile_total(grid: Grid) -> int:
    """Count a grid's tiles with the thumbnail."""
    return 1 if grid == ONE else grid[0] * grid[1] + 1


def picture_size(random: np.random.Generator, grid: Grid) -> tuple[int, int]:
    """Draw a (width, height) that the tiling rule cuts into this grid."""
    if grid == ONE and random.random() < 0.6:
        return TILE, TILE
    while True:
        aspect = grid[0] / grid[1] * np.exp(random.uniform(-0.35, 0.35))
        area = grid[0] * grid[1] * TILE**2 * random.uniform(0.55, 1.3)
        size = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if POLICY.grid(*size) == grid:
            return size


def choose(
    random: np.random.Generator, scenes: list[Scene], tasks: dict[str, float]
) -> list[list[Question]]:
    """Pick a few questions about each scene, the weighty tasks more often."""
    chosen = []
    for scene in scenes:
        questions = ask(scene.items, random)
        weights = np.array([weight(question, tasks) for question in questions])
        # Exponential races: the smallest times are a weighted sample without replacement.
        order = np.argsort(random.exponential(size=len(questions)) / weights)[:QUESTIONS]
        chosen.append([questions[index] for index in order])
    return chosen


def weight(question: Question, tasks: dict[str, float]) -> float:
    """Say how much a question is wanted."""
    if question.task in ("count", "count_all") and question.answer == "1":
        return ONLY_ONE
    return tasks.get(question.task, 1.0)
