"""Turn scenes into training batches: tiles, dense labels, and one row of tokens per picture."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.demo_model.broad import BROAD_KINDS, Material
from examples.demo_model.camera import spoil
from examples.demo_model.choosing import choose
from examples.demo_model.drawing_bank import DrawingBank
from examples.demo_model.grids import (
    POLICY,
    THUMBNAIL_ONLY,
    TILE,
    draw_grid,
    picture_size,
    tile_total,
)
from examples.demo_model.labels import Labels, label
from examples.demo_model.questions import ask
from examples.demo_model.rows import Row, RowBuilder
from examples.demo_model.scenes import SEEN, DrawObject, Scene, compose
from examples.demo_model.sprites import SpriteBank
from examples.demo_model.stages import ONE, Grid, Lessons
from examples.demo_model.vocabulary import TRAIN_STYLES
from internvl3_mlx.images.tiling import to_tiles

TRAINING_SEED = 1  # first word of every training seed; evaluation uses another
BANK_STEPS = 300  # steps after which sprites are redrawn


@dataclass(frozen=True)
class Batch:
    """Hold a step's tiles (B, T, S, S, 3) uint8, dense labels, and token rows (stage ask)."""

    tiles: np.ndarray
    labels: Labels
    rows: Row | None


class BatchMaker:
    """Make the batch of any step from its number alone, so that training resumes exactly."""

    def __init__(
        self,
        rows: RowBuilder | None,
        lessons: Lessons,
        *,
        rank: int,
        pictures: int,
        material: Material | None = None,
    ):
        self.rows, self.lessons, self.rank, self.pictures = rows, lessons, rank, pictures
        self.material = material
        self.bank: DrawingBank | None = None
        self.known: SpriteBank | None = None
        self.bank_age = -1

    def make(self, step: int, *, many_tiles: float = 1.0) -> Batch:
        """Make a batch; ``many_tiles`` scales the share of pictures with several tiles."""
        random = np.random.default_rng((TRAINING_SEED, self.rank, step))
        self.renew(step // BANK_STEPS)
        if self.material:
            return self.make_broad(random, np.random.default_rng((TRAINING_SEED, step)))
        grid = draw_grid(random, self.lessons.grids, one=1.0, several=many_tiles)
        count = max(4, round(self.pictures / tile_total(grid) ** 0.8))
        scenes = [
            compose(random, self.size(random, grid), SEEN, self.draw_known) for _ in range(count)
        ]
        policy = THUMBNAIL_ONLY if grid == ONE else POLICY
        tiles = np.stack([to_tiles(Image.fromarray(scene.pixels), policy) for scene in scenes])
        labels = label(scenes, grid, TILE)
        if self.rows is None:
            return Batch(tiles, labels, None)
        asked = [choose(random, ask(s.items, random), self.lessons.tasks) for s in scenes]
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
            random = np.random.default_rng((TRAINING_SEED, self.rank, age, 0))
            if self.material:
                self.bank = DrawingBank(random, self.material.drawings)
            if not self.material or "known" in self.lessons.kinds:
                self.known = SpriteBank(random, TRAIN_STYLES)

    def make_broad(self, random: np.random.Generator, shared: np.random.Generator) -> Batch:
        """Make a batch of one of the kinds of images in ``BROAD_KINDS``."""
        kinds, shares = zip(*self.lessons.kinds.items(), strict=True)
        made = BROAD_KINDS[kinds[shared.choice(len(kinds), p=shares)]](self, random, shared)
        scenes = [scene for asked in made.asked for scene in asked.scenes]
        images = len(made.asked[0].scenes)
        policy = THUMBNAIL_ONLY if made.grid == ONE else POLICY
        cut = [to_tiles(Image.fromarray(spoil(s.pixels, random)), policy) for s in scenes]
        tiles = np.stack(cut).reshape(len(made.asked), -1, TILE, TILE, 3)
        if not any(asked.questions for asked in made.asked):
            return Batch(tiles, label(scenes, made.grid, TILE), None)
        rows = self.rows.build(
            random,
            tiles.shape[1],
            [asked.questions for asked in made.asked],
            whole=self.lessons.whole,
            conversation=made.conversation,
            images=images,
        )
        return Batch(tiles, label(scenes, made.grid, TILE), rows)

    @property
    def draw_object(self) -> DrawObject:
        """Give the function that draws an object in any style."""
        assert self.bank is not None
        return self.bank.draw

    @property
    def draw_known(self) -> DrawObject:
        """Give the function that draws an object as the first stages have it."""
        assert self.known is not None
        return self.known.draw

    def broad_scene(self, random: np.random.Generator, size: tuple[int, int]) -> Scene:
        """Compose a scene from everything that training may draw from."""
        return compose(random, size, self.material.look, self.draw_object)
