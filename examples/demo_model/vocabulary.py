"""Name everything the demo model can see: the one list that scenes, tokenizer and labels share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """Describe one drawable object: its category and its icon's name in each icon set."""

    category: str
    icon: str
    plural: str = ""


OBJECTS: dict[str, Kind] = {
    "dog": Kind("animal", "dog-face"),
    "cat": Kind("animal", "cat-face"),
    "pig": Kind("animal", "pig-face"),
    "frog": Kind("animal", "frog"),
    "owl": Kind("animal", "owl"),
    "fish": Kind("animal", "tropical-fish", "fish"),
    "bee": Kind("animal", "honeybee"),
    "crab": Kind("animal", "crab"),
    "turtle": Kind("animal", "turtle"),
    "apple": Kind("fruit", "red-apple"),
    "pear": Kind("fruit", "pear"),
    "banana": Kind("fruit", "banana"),
    "lemon": Kind("fruit", "lemon"),
    "pineapple": Kind("fruit", "pineapple"),
    "strawberry": Kind("fruit", "strawberry", "strawberries"),
    "pizza": Kind("food", "pizza"),
    "burger": Kind("food", "hamburger"),
    "cake": Kind("food", "birthday-cake"),
    "donut": Kind("food", "doughnut"),
    "carrot": Kind("food", "carrot"),
    "car": Kind("vehicle", "automobile"),
    "bus": Kind("vehicle", "bus", "buses"),
    "bike": Kind("vehicle", "bicycle"),
    "plane": Kind("vehicle", "airplane"),
    "rocket": Kind("vehicle", "rocket"),
    "boat": Kind("vehicle", "sailboat"),
    "train": Kind("vehicle", "locomotive"),
    "tree": Kind("plant", "deciduous-tree"),
    "cactus": Kind("plant", "cactus", "cactuses"),
    "rose": Kind("plant", "rose"),
    "sunflower": Kind("plant", "sunflower"),
    "key": Kind("tool", "key"),
    "book": Kind("tool", "closed-book"),
    "umbrella": Kind("tool", "umbrella-with-rain-drops"),
    "guitar": Kind("tool", "guitar"),
    "clock": Kind("tool", "alarm-clock"),
    "bell": Kind("tool", "bell"),
    "hat": Kind("tool", "top-hat"),
    "crown": Kind("tool", "crown"),
    "hammer": Kind("tool", "hammer"),
}
NAMES = tuple(OBJECTS)
CATEGORIES = ("animal", "fruit", "food", "vehicle", "plant", "tool")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (35, 150, 55),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 45),
    "orange": (245, 135, 25),
    "purple": (140, 55, 185),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = [
    "BUS", "CAR", "CAT", "COW", "CUP", "DOG", "EGG", "FOX", "HAT", "ICE", "JAM",
    "KEY", "MAP", "NUT", "OWL", "PEN", "PIG", "RED", "SUN", "TEA", "TOY", "VAN",
    "WEB", "ZOO", "BIRD", "BLUE", "BOOK", "CAKE", "DOOR", "FISH", "FROG", "GOLD", "HELP",
    "KING", "LAMP", "MILK", "MOON", "OPEN", "PARK", "RAIN", "SHOP", "STOP", "TREE", "WIND",
]  # fmt: skip

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")

# What one patch can hold; index 0 is the background.
CONCEPTS = ("background", *NAMES, *SHAPES, *DIGITS, *LETTERS)
CONCEPT_ID = {name: number for number, name in enumerate(CONCEPTS)}

STYLES = {
    "noto": "noto",
    "noto1": "noto-v1",
    "fluent": "fluent-emoji",
    "flat": "fluent-emoji-flat",
    "contrast": "fluent-emoji-high-contrast",
    "emojione": "emojione",
    "fx": "fxemoji",
    "twemoji": "twemoji",
}
HELD_OUT_STYLE = "twemoji"
TRAIN_STYLES = tuple(style for style in STYLES if style != HELD_OUT_STYLE)
ONE_COLOR_STYLES = ("contrast",)


def article(noun: str) -> str:
    """Put the indefinite article before a noun: ``apple -> an apple``."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    """Give the plural of an object's or a shape's name."""
    if noun in OBJECTS and OBJECTS[noun].plural:
        return OBJECTS[noun].plural
    return noun + ("es" if noun.endswith("ss") else "s")
