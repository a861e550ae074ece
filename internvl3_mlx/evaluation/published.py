"""Published scores of InternVL3 and InternVL3.5, to stand beside ours.

Sources: tables 2, 3 and 5 of the InternVL3 paper and its text, table of InternVL3.5's report. They
were measured at 16 bits.
"""

import re
from dataclasses import dataclass

SIZES_3 = ("1B", "2B", "8B", "9B", "14B", "38B", "78B")
SIZES_35 = ("1B", "2B", "4B", "8B", "14B", "38B")
_MODEL = re.compile(r"internvl3(?P<half>[._]5)?[-_:]?(?P<size>\d+b)(?![a-z0-9])", re.IGNORECASE)

# task -> scores in the order of SIZES_3; percent, but points for OCRBench and MME
INTERNVL3: dict[str, tuple[float, ...]] = {
    "mmmu": (43.4, 48.6, 62.7, 57.7, 67.1, 70.1, 72.2),
    "mathvista": (45.8, 57.0, 71.6, 71.5, 75.1, 75.1, 79.0),
    "ai2d": (69.4, 78.7, 85.2, 84.6, 86.0, 88.9, 89.7),
    "chartqa": (75.3, 80.2, 86.6, 86.2, 87.3, 89.2, 89.7),
    "textvqa": (74.1, 77.0, 80.2, 79.4, 80.5, 83.9, 84.3),
    "docvqa": (81.9, 88.3, 92.7, 93.6, 94.1, 95.4, 95.4),
    "infovqa": (53.7, 66.1, 76.8, 79.6, 83.6, 85.0, 86.5),
    "ocrbench": (790, 835, 880, 877, 875, 886, 906),
    "mme": (1934.4, 2221.2, 2415.4, 2372.8, 2478.3, 2523.6, 2549.8),
    "mmbench": (72.6, 81.1, 83.4, 83.4, 85.6, 87.6, 89.0),
    "mmstar": (51.5, 60.7, 68.2, 66.3, 68.8, 71.5, 72.5),
    "hallusionbench": (41.4, 42.5, 49.9, 51.2, 55.1, 57.1, 59.1),
    "pope": (90.7, 89.6, 91.1, 90.4, 90.2, 90.6, 90.3),
    "realworldqa": (58.2, 64.3, 70.8, 70.5, 70.7, 75.6, 78.0),
    "refcoco": (81.6, 86.7, 89.6, 88.2, 89.1, 91.2, 91.4),
    "videomme": (51.0, 58.9, 66.3, 66.7, 70.4, 72.7, 72.7),
    "mvbench": (63.1, 70.4, 75.4, 74.3, 76.6, 76.9, 78.7),
}
INTERNVL35: dict[str, tuple[float, ...]] = {
    "ai2d": (71.1, 78.8, 82.6, 84.0, 85.1, 87.8),
    "chartqa": (77.7, 80.7, 86.0, 86.7, 86.5, 88.8),
    "textvqa": (71.5, 76.5, 77.9, 78.2, 77.8, 82.7),
    "docvqa": (85.6, 89.4, 92.4, 92.3, 93.4, 94.0),
    "infovqa": (60.5, 70.8, 78.0, 79.1, 78.3, 83.8),
    "ocrbench": (795, 836, 822, 840, 836, 870),
}
# what a published score was measured on where it is easily taken for another
NOTES = {
    "docvqa": "published on the test split, whose answers are not public",
    "infovqa": "published on the test split, whose answers are not public",
    "refcoco": "published as the mean of eight splits of RefCOCO, RefCOCO+ and RefCOCOg",
    "mmmu": "published on the validation split",
    "mathvista": "published on testmini",
    "mmbench": "published on the English test split with CircularEval",
    "videomme": "published without subtitles, the best of 16, 32, 48 and 64 frames",
}


@dataclass(frozen=True)
class PublishedScore:
    """A published score: of which model, and what it was measured on."""

    model: str
    score: float
    note: str = ""


def published_score(task: str, model: str) -> PublishedScore | None:
    """Return the published score of the model that a name belongs to; None if there is none.

    model: a size such as ``2b``, a repository, or a folder that keeps the published name.
    """
    bare = model.strip().upper()
    match = _MODEL.search(model)
    half = bool(match and match["half"])
    size = match["size"].upper() if match else bare
    sizes, table = (SIZES_35, INTERNVL35) if half else (SIZES_3, INTERNVL3)
    if size not in sizes or task not in table:
        return None
    family = "InternVL3.5" if half else "InternVL3"
    note = "" if half else NOTES.get(task, "")
    return PublishedScore(f"{family}-{size}", table[task][sizes.index(size)], note)
