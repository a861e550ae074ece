"""Plan images that hold one word or number of up to eight characters."""

import numpy as np

from examples.demo_model.scenes import Cell, Thing
from examples.demo_model.stages import ONE, Grid
from examples.demo_model.vocabulary import COLORS, DIGITS, LETTERS, WORDS

Random = np.random.Generator
LONGEST = 8
ROOM = 24  # pixels of width that a character needs to be read
SPELLED = 0.4  # share of words that are random letters
GRIDS: dict[Grid, float] = {ONE: 0.42, (2, 1): 0.20, (3, 1): 0.14, (4, 1): 0.16, (2, 2): 0.08}
BOTH = 0.4  # share of images with a word and a number, one below the other
# Five to eight letters; words of evaluation are others.
LONG_WORDS = [
    "ABOUT", "ACTION", "ADVICE", "AGREE", "ALARM", "ALBUM", "ANGEL", "ANIMAL", "ANSWER",
    "APPLE", "ARTIST", "AUTUMN", "BAKERY", "BANANA", "BASKET", "BEACH", "BEFORE", "BETTER",
    "BICYCLE", "BLANKET", "BOTTLE", "BOUNCE", "BRANCH", "BREAD", "BRIDGE", "BRIGHT", "BROTHER",
    "BUCKET", "BUTTER", "BUTTON", "CAMERA", "CANDLE", "CARPET", "CASTLE", "CENTER", "CHAIR",
    "CHANGE", "CHEESE", "CHERRY", "CHICKEN", "CIRCLE", "CLOSED", "COFFEE", "COLOR", "CORNER",
    "COTTON", "COUNTRY", "CREAM", "CURTAIN", "DANCE", "DANGER", "DELIVERY", "DESERT", "DINNER",
    "DOCTOR", "DOLLAR", "DRAGON", "DRIVER", "EAGLE", "EARTH", "EASTERN", "ELEPHANT", "ENGINE",
    "ENTRANCE", "EVENING", "EXAMPLE", "EXIT", "FAMILY", "FARMER", "FATHER", "FEATHER", "FINGER",
    "FLOWER", "FOREST", "FRIDAY", "FRIEND", "FROZEN", "GARDEN", "GENTLE", "GHOST", "GINGER",
    "GLASS", "GRAVEL", "GREEN", "GROUND", "GUITAR", "HAMMER", "HARBOR", "HEALTH", "HEAVY",
    "HISTORY", "HOLIDAY", "HONEY", "HORSE", "HOTEL", "HOUSE", "HUNGRY", "ISLAND", "JACKET",
    "JOURNEY", "JUICE", "JUNGLE", "KITCHEN", "KNIGHT", "LADDER", "LEATHER", "LEMON", "LETTER",
    "LIBRARY", "LIGHT", "LITTLE", "LONDON", "LUNCH", "MACHINE", "MAGNET", "MARKET", "MEDICINE",
    "MELON", "MESSAGE", "METAL", "MIDDLE", "MINUTE", "MIRROR", "MONDAY", "MONEY", "MONKEY",
    "MORNING", "MOTHER", "MOUNTAIN", "MUSEUM", "MUSIC", "NATURE", "NEEDLE", "NIGHT", "NORTH",
    "NUMBER", "OCEAN", "OFFICE", "ORANGE", "ORDER", "PAINT", "PALACE", "PAPER", "PARENT",
    "PARTY", "PEACE", "PENCIL", "PEOPLE", "PEPPER", "PHONE", "PIANO", "PICTURE", "PILLOW",
    "PLANET", "PLASTIC", "PLATE", "POCKET", "POLICE", "POTATO", "PRESENT", "PRICE", "PRINCE",
    "PUBLIC", "PURPLE", "QUEEN", "QUESTION", "QUIET", "RABBIT", "RADIO", "RAINBOW", "RECORD",
    "RIVER", "ROBOT", "ROCKET", "SALAD", "SATURDAY", "SCHOOL", "SCIENCE", "SEASON", "SECRET",
    "SHADOW", "SHEEP", "SHIRT", "SILVER", "SISTER", "SMILE", "SNAKE", "SOLDIER", "SOUTH",
    "SPIDER", "SPRING", "SQUARE", "STABLE", "STATION", "STONE", "STORM", "STREET", "STUDENT",
    "SUGAR", "SUMMER", "SUNDAY", "SWIMMING", "TABLE", "TEACHER", "TENNIS", "THUNDER", "TICKET",
    "TIGER", "TOMATO", "TOWER", "TRAFFIC", "TRAVEL", "TREASURE", "TUESDAY", "UMBRELLA", "UNCLE",
    "VALLEY", "VIOLET", "VISITOR", "WATER", "WEATHER", "WEEKEND", "WHEEL", "WHITE", "WINDOW",
    "WINTER", "WOMAN", "WONDER", "WOODEN", "WORLD", "YELLOW", "ZEBRA",
]  # fmt: skip


def writing_grids() -> dict[Grid, float]:
    """Give the shares of grids: most writing is wider than high."""
    return GRIDS


def plan_lines(random: Random, size: tuple[int, int]) -> list[tuple[Thing, Cell]]:
    """A word, a number or both, as large as the image allows or smaller."""
    width, height = size
    most = min(LONGEST, max(2, int(width / ROOM)))
    kinds = ["word"] if random.random() < 0.6 else ["number"]
    if random.random() < BOTH:
        kinds = [str(kind) for kind in random.permutation(["word", "number"])]
    tall = height / len(kinds)
    plan = []
    for line, kind in enumerate(kinds):
        text = draw_word(random, most) if kind == "word" else draw_number(random, most)
        room = random.uniform(0.22 if len(kinds) == 1 else 0.4, 0.62 * len(kinds) ** 0.5) * tall
        room = max(22.0, min(room, 1.5 * width / len(text)))
        x = random.uniform(0.3, 0.7) * width if len(text) < 4 else 0.5 * width
        y = line * tall + random.uniform(0.5 * room + 1, max(0.5 * room + 2, tall - 0.5 * room - 1))
        plan.append((Thing(kind, text, str(random.choice(list(COLORS)))), Cell(x, y, room)))
    return plan


def plan_letters(random: Random, size: tuple[int, int]) -> list[tuple[Thing, Cell]]:
    """One to four lines of letters or digits that fill the image, for the dense labels."""
    width, height = size
    count = int(random.integers(1, 5))
    tall = height / count
    plan = []
    for line in range(count):
        room = max(20.0, random.uniform(0.6, 0.95) * tall)
        most = max(1, min(LONGEST, int(width / max(ROOM - 4, 0.62 * room))))
        letters = LETTERS if random.random() < 0.65 else DIGITS
        text = "".join(random.choice(list(letters), random.integers(max(1, most - 1), most + 1)))
        kind = "word" if letters is LETTERS else "number"
        color = str(random.choice(list(COLORS)))
        room = min(room, 1.5 * width / len(text))
        plan.append((Thing(kind, text, color), Cell(0.5 * width, (line + 0.5) * tall, room)))
    return plan


def draw_word(random: Random, most: int) -> str:
    """Draw a word of at most ``most`` letters; some are random letters and must be spelled."""
    if random.random() < SPELLED:
        return "".join(random.choice(list(LETTERS), random.integers(2, most + 1)))
    known = [word for word in (*WORDS, *LONG_WORDS) if len(word) <= most]
    return str(known[random.integers(len(known))])


def draw_number(random: Random, most: int) -> str:
    """Draw a number of one to ``most`` digits that does not begin with 0."""
    digits = random.integers(0, 10, random.integers(1, most + 1))
    digits[0] = max(1, digits[0])
    return "".join(map(str, digits))
