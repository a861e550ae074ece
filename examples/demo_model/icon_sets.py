"""List the icon sets that drawings come from, and the icons that show each object.

Training draws from the sets of ``TRAIN_SETS`` and from public-domain clip art. ``DEVELOPMENT_SETS``
are for choices made while training runs. No training and no choice ever uses ``HELD_OUT_SETS``:
they are measured at the very end.
"""

import re

SCOPE = "@iconify-json"
TRAIN_SETS = (
    "noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast",
    "emojione", "emojione-monotone", "fxemoji", "streamline-emojis",
    "bi", "carbon", "cil", "f7", "fa6-solid", "flat-color-icons", "fluent", "fluent-color",
    "game-icons", "guidance", "healthicons", "hugeicons", "icon-park", "icon-park-outline",
    "icon-park-solid", "iconoir", "icons8", "ion", "la", "lucide", "lucide-lab", "majesticons",
    "maki", "marketeq", "material-symbols", "mdi", "mingcute", "mynaui", "pepicons-pencil",
    "pepicons-pop", "ri", "solar", "streamline", "streamline-flex", "streamline-flex-color",
    "streamline-freehand", "streamline-freehand-color", "streamline-kameleon-color",
    "streamline-plump", "streamline-plump-color", "streamline-sharp-color",
    "streamline-stickies-color", "streamline-ultimate", "streamline-ultimate-color", "tdesign",
    "temaki", "uil", "vaadin",
)  # fmt: skip
# OpenMoji and EmojiOne 1 are under CC BY-SA: they are measured with, never passed on.
DEVELOPMENT_SETS = {"emoji": "emojione-v1", "icons": "ph"}
HELD_OUT_SETS = {"twemoji": "twemoji", "openmoji": "openmoji", "tabler": "tabler"}
CLIP_ART = "openclipart-svg"  # a Debian package, in the public domain

# Object -> icons that show it, without the endings that name a variant of the same drawing.
ICONS: dict[str, str] = {
    "dog": "dog dog-face animal-dog basset-hound-head jumping-dog labrador-head sitting-dog "
    "dog-side",
    "cat": "cat cat-face animal-cat black-cat",
    "pig": "pig pig-face animal-pig pig-variant pig-head",
    "frog": "frog frog-face",
    "owl": "owl barn-owl",
    "fish": "fish tropical-fish food-fish fish-one clownfish fish-symbol fish-simple",
    "bee": "bee honeybee",
    "crab": "crab sad-crab",
    "turtle": "turtle animal-turtle tortoise sea-turtle",
    "apple": "red-apple green-apple food-apple apple-one apple-whole apple-fruit shiny-apple",
    "pear": "pear fruit-pear",
    "banana": "banana bananas banana-bunch",
    "lemon": "lemon fruit-lemon",
    "pineapple": "pineapple fruit-pineapple",
    "strawberry": "strawberry",
    "pizza": "pizza pizza-slice full-pizza food-pizza local-pizza ios-pizza",
    "burger": "hamburger burger hamburger-one",
    "cake": "birthday-cake cake food-cake cake-variant cake-candles cake-one cake-three cake-four "
    "cake-five",
    "donut": "doughnut donut donut-bitten sliceofdonut",
    "carrot": "carrot food-carrot",
    "car": "automobile car car-side car-front car-sport city-car directions-car vehicle-car "
    "vehicle-car-profile oncoming-automobile car-alt redcar",
    "bus": "bus oncoming-bus directions-bus vehicle-bus bus-front bus-alt bus-side bus-school "
    "school-bus bus-one bus-two tour-bus",
    "bike": "bicycle bike directions-bike vehicle-bicycle pedal-bike dutch-bike",
    "plane": "airplane plane aeroplane small-airplane commercial-airplane airport-plane plane-up "
    "airplane-mode",
    "rocket": "rocket rocket-launch rocket-one rocket-flight",
    "boat": "sailboat boat sail-boat sailing sailboat-one small-fishing-sailboat ship "
    "vehicle-ship directions-boat fishing-boat",
    "train": "locomotive train steam-locomotive train-front toy-train train-variant "
    "locomotive-variant train-subway",
    "tree": "deciduous-tree tree evergreen-tree tree-deciduous pine-tree tree-evergreen tree-one "
    "tree-two pine-tree-variant tree-pine fruit-tree",
    "cactus": "cactus cactus-pot",
    "rose": "rose flower-rose",
    "sunflower": "sunflower",
    "key": "key old-key key-vertical skeleton-key key-round house-key",
    "book": "closed-book book green-book blue-book orange-book book-one book-open open-book "
    "open-book",
    "umbrella": "umbrella-with-rain-drops umbrella open-umbrella umbrella-one umbrella-full",
    "guitar": "guitar guitar-acoustic guitar-electric",
    "clock": "alarm-clock alarm clock clock-circle clock-alarm alarmclock",
    "bell": "bell bell-ring bell-ringing ringing-bell notifications",
    "hat": "top-hat tophat tall-hat hat-top magic-hat hat pilgrim-hat womans-hat hat-cowboy "
    "western-hat hat-fedora",
    "crown": "crown queen-crown jewel-crown imperial-crown crown-two crown-three",
    "hammer": "hammer claw-hammer flat-hammer",
}
VARIANT = re.compile(
    r"^(outline|outlined|fill|filled|bold|light|thin|duotone|solid|line|rounded|round|sharp|regular"
    r"|color|broken|linear|twotone|remix|stroke|standard|alt|\d+)$"
)
# (set, object) whose icon of that name shows something else.
WRONG = frozenset(
    {
        *(("carbon", "key"), ("game-icons", "rocket"), ("ri", "bell"), ("mingcute", "clock")),
        *((source, "bell") for source in ("icon-park", "icon-park-outline", "icon-park-solid")),
        *((source, "bell") for source in ("streamline-flex", "streamline-plump", "streamline")),
        *((source, "clock") for source in ("icon-park", "icon-park-outline", "icon-park-solid")),
        *(("solar", "plane"), ("marketeq", "boat"), ("iconoir", "hat")),
        *((source, "plane") for source in ("streamline-ultimate", "streamline-ultimate-color")),
    }
)
# In these sets the plain word names the fruit; elsewhere it names the company's logo.
APPLES = frozenset({"carbon", "lucide", "tabler"})


def base_name(icon: str) -> str:
    """Strip what only names a variant: ``bell-outline-24 -> bell``."""
    words = icon.split("-")
    while len(words) > 1 and VARIANT.match(words[-1]):
        words.pop()
    return "-".join(words)
