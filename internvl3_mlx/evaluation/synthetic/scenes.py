"""Shapes on a grid: counting, positions, and what two images have not in common."""

from random import Random

from PIL import Image

from internvl3_mlx.evaluation.synthetic.canvas import COLORS, SHAPES, Shape, draw_shape, paper
from internvl3_mlx.evaluation.synthetic.fonts import FontFace
from internvl3_mlx.evaluation.synthetic.question import RenderedQuestion

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# wide, tall and square images: tiles in other orders show at once
SIZES = ((640, 640), (1120, 480), (480, 1060), (900, 600), (448, 448))
CORNERS = {
    "top left": (0, 0),
    "top right": (0, -1),
    "bottom left": (-1, 0),
    "bottom right": (-1, -1),
}
Grid = list[list[Shape | None]]


def render_counting(random: Random, _: tuple[FontFace, ...]) -> RenderedQuestion:
    """Count one kind of shape among others."""
    asked, *others = random.sample(SHAPES, 3)
    wanted, more = random.randint(1, 7), random.randint(0, 4)
    kinds = [asked] * wanted + [random.choice(others) for _ in range(more)]
    cells = random.sample([(r, c) for r in range(3) for c in range(4)], len(kinds))
    grid: Grid = [[None] * 4 for _ in range(3)]
    for (row, column), kind in zip(cells, kinds, strict=True):
        grid[row][column] = Shape(kind, random.choice([*COLORS]))
    plural = {"cross": "crosses"}.get(asked, f"{asked}s")
    image = draw_grid(random, grid)
    answers = (str(wanted), NUMBER_WORDS[wanted])
    return RenderedQuestion(
        f"How many {plural} are there? Answer with a number.", answers, (image,)
    )


def render_position(random: Random, _: tuple[FontFace, ...]) -> RenderedQuestion:
    """Ask which shape, or which color, is in a corner."""
    grid = four_corners(random)
    place = random.choice([*CORNERS])
    row, column = CORNERS[place]
    shape = grid[row][column]
    assert shape is not None
    image = draw_grid(random, grid)
    if random.random() < 0.5:
        question = f"What color is the shape at the {place}?"
        return RenderedQuestion(question, (shape.color,), (image,))
    question = f"Which shape is at the {place}: {', '.join(SHAPES)}?"
    return RenderedQuestion(question, (shape.kind,), (image,))


def render_difference(random: Random, _: tuple[FontFace, ...]) -> RenderedQuestion:
    """Show two images that differ in one corner and ask what changed there."""
    first = four_corners(random)
    used = {shape.kind for row in first for shape in row if shape is not None}
    new = random.choice([kind for kind in SHAPES if kind not in used])
    row, column = CORNERS[random.choice([*CORNERS])]
    second: Grid = [[*line] for line in first]
    old = first[row][column]
    assert old is not None
    second[row][column] = Shape(new, old.color)
    size = random.choice(SIZES)
    ground = random.getrandbits(32)
    images = tuple(draw_grid(Random(ground), grid, size) for grid in (first, second))
    question = f"Which shape is only in the second image: {', '.join(SHAPES)}?"
    return RenderedQuestion(question, (new,), images)


def four_corners(random: Random) -> Grid:
    """Return a grid of 2 × 2 with four kinds of shapes in four colors."""
    kinds, colors = random.sample(SHAPES, 4), random.sample([*COLORS], 4)
    a, b, c, d = (Shape(kind, color) for kind, color in zip(kinds, colors, strict=True))
    return [[a, b], [c, d]]


def draw_grid(random: Random, grid: Grid, size: tuple[int, int] | None = None) -> Image.Image:
    """Draw each shape somewhere in its cell, at a random size."""
    width, height = size or random.choice(SIZES)
    image = paper(random, width, height)
    cell_width, cell_height = width / len(grid[0]), height / len(grid)
    room = min(cell_width, cell_height)
    for row, line in enumerate(grid):
        for column, shape in enumerate(line):
            side = room * random.uniform(0.5, 0.75)
            x = column * cell_width + random.uniform(0.1, 0.9) * (cell_width - side)
            y = row * cell_height + random.uniform(0.1, 0.9) * (cell_height - side)
            if shape is not None:
                draw_shape(image, shape, x, y, side)
    return image
