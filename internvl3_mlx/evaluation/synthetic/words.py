"""Words, a page of text, and a table of numbers."""

from random import Random

from PIL import Image, ImageDraw

from internvl3_mlx.evaluation.synthetic.canvas import INKS, MARGIN, paper, text_size, write
from internvl3_mlx.evaluation.synthetic.fonts import Font, FontFace
from internvl3_mlx.evaluation.synthetic.question import RenderedQuestion

_WORDS = (
    "anchor basket bridge candle carpet castle cherry circle cloud coffee copper corner cotton "
    "dinner doctor engine family farmer finger flower forest garden guitar hammer harbor island "
    "jacket kettle kitchen ladder lantern lemon letter library market meadow mirror morning "
    "mountain needle number orange packet paper pencil pepper picture pillow planet pocket "
    "potato pumpkin rabbit ribbon river rocket saddle salmon school season shadow silver sister "
    "spring station summer sunset table teacher temple ticket tiger timber tunnel valley velvet "
    "village violin wallet water window winter wizard yellow zebra "
)
WORDS = tuple(_WORDS.split())
NAMES = ("Anna", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas")
COLUMNS = ("Apples", "Bread", "Coffee", "Eggs", "Flour", "Milk", "Rice", "Salt", "Tea")
LINES, WORDS_A_LINE = 12, 5


def render_word(random: Random, fonts: tuple[FontFace, ...]) -> RenderedQuestion:
    """Write one word in a random font, size and place."""
    word = random.choice(WORDS)
    font = random.choice(fonts).at(random.randint(26, 72))
    width, height = text_size(font, word)
    image = paper(random, width + random.randint(30, 320), height + random.randint(30, 260))
    x = random.randint(MARGIN, image.width - width - MARGIN)
    y = random.randint(MARGIN, image.height - height - MARGIN)
    write(ImageDraw.Draw(image), x, y, word, font, random.choice(INKS))
    return RenderedQuestion("What word is written in the image?", (word,), (image,))


def render_page(random: Random, fonts: tuple[FontFace, ...]) -> RenderedQuestion:
    """Write numbered lines of words on a tall page and ask for one of them."""
    font = random.choice(fonts).at(random.randint(24, 30))
    lines = [" ".join(random.choices(WORDS, k=WORDS_A_LINE)) for _ in range(LINES)]
    numbered = [f"{number}. {line}" for number, line in enumerate(lines, start=1)]
    step = max(text_size(font, line)[1] for line in numbered) + 24
    width = max(text_size(font, line)[0] for line in numbered) + 6 * MARGIN
    image = paper(random, width, step * LINES + 6 * MARGIN)
    draw, ink = ImageDraw.Draw(image), random.choice(INKS)
    for number, line in enumerate(numbered):
        write(draw, 3 * MARGIN, 3 * MARGIN + number * step, line, font, ink)
    asked = random.randrange(LINES)
    question = f"What is written in line {asked + 1}, after the number?"
    return RenderedQuestion(question, (lines[asked],), (image,), "anls")


def render_table(random: Random, fonts: tuple[FontFace, ...]) -> RenderedQuestion:
    """Draw a table of whole numbers and ask for one cell."""
    rows = random.sample(NAMES, random.randint(3, 7))
    columns = random.sample(COLUMNS, random.randint(2, 5))
    cells = [[random.randint(2, 980) for _ in columns] for _ in rows]
    font = random.choice(fonts).at(random.randint(20, 30))
    lines = [
        ["", *columns],
        *([row, *map(str, values)] for row, values in zip(rows, cells, strict=True)),
    ]
    image = draw_table(random, lines, font)
    row, column = random.randrange(len(rows)), random.randrange(len(columns))
    question = f"In the table, what is the number for {rows[row]} in the column {columns[column]}?"
    return RenderedQuestion(question, (str(cells[row][column]),), (image,))


def draw_table(random: Random, lines: list[list[str]], font: Font) -> Image.Image:
    """Draw rows of cells with lines between them."""
    widths = [
        max(text_size(font, line[at] or "x")[0] for line in lines) + 30
        for at in range(len(lines[0]))
    ]
    step = max(text_size(font, cell)[1] for line in lines for cell in line if cell) + 22
    image = paper(random, sum(widths) + 2 * MARGIN, step * len(lines) + 2 * MARGIN)
    draw, ink = ImageDraw.Draw(image), random.choice(INKS)
    for number, line in enumerate(lines):
        x, y = float(MARGIN), MARGIN + number * step
        draw.line((MARGIN, y, image.width - MARGIN, y), fill=ink)
        for cell, width in zip(line, widths, strict=True):
            if cell:
                write(draw, x + 12, y + 10, cell, font, ink)
            x += width
    draw.line(
        (MARGIN, image.height - MARGIN, image.width - MARGIN, image.height - MARGIN), fill=ink
    )
    return image
