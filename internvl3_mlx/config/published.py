"""The published sizes of both families: names, repositories and parameters.

A size is named by its family and its parameters (``2b``, ``3.5-8b``, ``3.5-30b-a3b``); a stage of
training and transformers' layout may follow (``3.5-8b-mpo``, ``3.5-8b-hf``).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

OWNER = "OpenGVLab"
STAGES = MappingProxyType(  # in a name -> in a repository's name, for each family
    {
        "3": {"pretrained": "-Pretrained", "instruct": "-Instruct"},
        "3.5": {
            "pretrained": "-Pretrained",
            "instruct": "-Instruct",
            "mpo": "-MPO",
            "flash": "-Flash",
        },
    }
)
HF = MappingProxyType({"3": "-hf", "3.5": "-HF"})
# 4 bits with the scale and bias of the group, and some layers that stay at 16 bits
QUANTIZED_BYTES_PER_PARAMETER = 0.6


@dataclass(frozen=True)
class PublishedSize:
    """A published size. ``active``: the parameters that one token goes through."""

    name: str
    family: str
    repo: str
    parameters: int
    active: int
    stage: str = ""  # of training, "" for the final model

    @property
    def base(self) -> str:
        """The name without a stage or a layout."""
        return self.name.removesuffix("-hf").removesuffix(f"-{self.stage}")

    @property
    def short(self) -> str:
        """The repository's name without its owner."""
        return self.repo.rpartition("/")[2]

    @property
    def dense_bytes(self) -> float:
        return 2 * self.parameters

    @property
    def quantized_bytes(self) -> float:
        return QUANTIZED_BYTES_PER_PARAMETER * self.parameters


def published(
    family: str, name: str, parameters: int, active: int = 0, short: str = ""
) -> PublishedSize:
    title = f"InternVL{family.replace('.', '_')}"
    prefix = "" if family == "3" else f"{family}-"
    repo = f"{OWNER}/{title}-{short or name.upper()}"
    return PublishedSize(prefix + name, family, repo, parameters, active or parameters)


PUBLISHED_SIZES: Mapping[str, PublishedSize] = MappingProxyType(
    {
        size.name: size
        for size in (
            published("3", "1b", 938_193_024),
            published("3", "2b", 2_088_957_440),
            published("3", "8b", 7_944_373_760),
            published("3", "9b", 9_138_793_472),
            published("3", "14b", 15_117_256_704),
            published("3", "38b", 38_388_164_992),
            published("3", "78b", 78_408_318_336),
            published("3.5", "1b", 1_060_897_792),
            published("3.5", "2b", 2_348_347_392),
            published("3.5", "4b", 4_732_489_216),
            published("3.5", "8b", 8_528_318_464),
            published("3.5", "14b", 15_119_523_840),
            published("3.5", "20b-a4b", 21_238_874_304, 4_511_557_824, "GPT-OSS-20B-A4B-Preview"),
            published("3.5", "30b-a3b", 30_848_730_112, 3_669_640_192),
            published("3.5", "38b", 38_390_405_504),
            published("3.5", "241b-a28b", 240_699_370_368, 27_796_499_328),
        )
    }
)
SIZE = r"(?P<size>\d+b(?:-a\d+b)?)"
SUFFIX = r"(?:-(?P<stage>[a-z]+?))??(?P<hf>-hf)?"
SIZE_NAME = re.compile(rf"(?P<newer>3[._]5-)?{SIZE}{SUFFIX}", re.IGNORECASE)
PASTED_NAME = re.compile(rf"internvl3(?P<newer>[._]5)?[-:_ ]{SIZE}{SUFFIX}", re.IGNORECASE)
SIZE_IN_NAME = re.compile(rf"InternVL[\d.]*3(?P<newer>[._]5)?-{SIZE}", re.IGNORECASE)


def find_size(name: str) -> PublishedSize | None:
    """Find a size by its name, with the stage and the layout that the name may end with."""
    match = SIZE_NAME.fullmatch(name)
    return size_of(match) if match else None


def find_pasted_size(name: str) -> PublishedSize | None:
    """Find a size by its name with the family's before it, or by its repository's name."""
    plain = name.lower()
    for size in PUBLISHED_SIZES.values():
        if size.short.lower() == plain:
            return size
    match = PASTED_NAME.fullmatch(name)
    return size_of(match) if match else None


def size_of(match: re.Match[str]) -> PublishedSize | None:
    """Return the size that the parts of a name give, None if there is none."""
    found = match.groupdict()
    family = "3.5" if found["newer"] else "3"
    name = ("" if family == "3" else f"{family}-") + found["size"].lower()
    size, stage = PUBLISHED_SIZES.get(name), (found.get("stage") or "").lower()
    if size is None or (stage and stage not in STAGES[family]):
        return None
    ending = (STAGES[family][stage] if stage else "") + (HF[family] if found.get("hf") else "")
    suffix = (f"-{stage}" if stage else "") + ("-hf" if found.get("hf") else "")
    return replace(size, name=name + suffix, repo=size.repo + ending, stage=stage)


def find_model_name(name: str) -> PublishedSize | None:
    """Find the size, and the stage if it has one, that the name of a folder or repository states.

    Names of copies go on with bits: ``InternVL3_5-8B-MPO-4bit``. Folders of the hub's cache begin
    with the owner: ``models--OpenGVLab--InternVL3-2B``.
    """
    words = name.rpartition("--")[2].split("-")
    beginnings = ("-".join(words[:count]) for count in range(len(words), 1, -1))
    return next(filter(None, map(find_pasted_size, beginnings)), None)


def size_in(text: str) -> PublishedSize | None:
    """Find the size that a repository's or folder's name begins with the name of."""
    match = SIZE_IN_NAME.search(text)
    return size_of(match) if match else None
