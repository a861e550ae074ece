"""How attention to a cache is divided among simdgroups and threadgroups.

What is compiled depends on the sizes of blocks and threadgroups; over how many threadgroups a
head's tokens are split is data, so another plan for another GPU compiles nothing.
"""

from dataclasses import dataclass
from functools import lru_cache

from internvl3_mlx.device import gpu_info
from internvl3_mlx.metal_kernels.dispatch import MIN_DEVICE_ELEMENTS

TILE_ROWS, MIN_TILE_ROWS = 8, 4  # below four rows a matrix tile would be mostly padding
SIMDGROUPS = 4  # of a threadgroup whose rows fit one tile; each reads its own tokens
BLOCK_TOKENS = (32, 16, 8)  # staged at once, and between two rescalings of the output
STAGE_BYTES = 4608  # of a simdgroup's block: 9 loads of 16 bytes for each of its lanes
THREADGROUP_BYTES = 20 * 1024  # so that three threadgroups fit a core
FLOAT32_BYTES = 4
DENSE_GROUP = 64  # numbers of a dense row that lanes read together


@dataclass(frozen=True)
class SplitPlan:
    """Over how many threadgroups a step is split. ``tokens``: that one reads at least, if possible.

    ``threadgroups``: of all heads and sequences together, from where on more only add partial
    results. ``cores``: of the largest GPU of its class.
    """

    tokens: int
    threadgroups: int
    cores: int

    def scaled(self, scale: float) -> "SplitPlan":
        """Return the plan with so many times the threadgroups, of so much fewer tokens each."""
        return SplitPlan(int(self.tokens / scale), int(self.threadgroups * scale), self.cores)


# By the last letter of Metal's name of the architecture (applegpu_g16s), as MLX tells GPUs apart.
# Four threadgroups for each core of the largest of a class; by arithmetic, see docs/metal.md.
SPLIT_PLANS = {
    "p": SplitPlan(128, 24, 6),  # iPhone, and Macs with its chip
    "g": SplitPlan(128, 80, 20),  # base and Pro
    "s": SplitPlan(128, 160, 40),  # Max
    "d": SplitPlan(128, 320, 80),  # Ultra
}
DEFAULT_CLASS = "s"
# By what the threadgroups of a class are multiplied in the plans that are measured; the first one
# holds until then.
USUAL = "usual"
PLAN_SCALES = {USUAL: 1.0, "coarse": 0.5, "coarsest": 0.25, "fine": 2.0}
MAX_SPLITS = 128  # of one head: what joins them reads them one after the other


@lru_cache(maxsize=1)
def default_split_plan() -> SplitPlan:
    """Return the plan for this machine's GPU, that of a Max if it is not known."""
    architecture = str(gpu_info().get("architecture", ""))
    return SPLIT_PLANS.get(architecture[-1:], SPLIT_PLANS[DEFAULT_CLASS])


@lru_cache(maxsize=len(PLAN_SCALES))
def split_plan(name: str) -> SplitPlan:
    """Return a plan of PLAN_SCALES for this machine's GPU, the usual one for another name."""
    return default_split_plan().scaled(PLAN_SCALES.get(name, PLAN_SCALES[USUAL]))


def split_count(capacity: int, heads: int, plan: SplitPlan, rows: int = MIN_DEVICE_ELEMENTS) -> int:
    """Return how many threadgroups share a head's tokens: enough to fill the GPU, none short.

    ``heads``: key-value heads of all sequences; ``rows``: query rows of each. Very few rows get
    more: MLX compiles another text for fewer than 8 partial results.
    """
    target = -(-plan.threadgroups // heads)
    wanted = min(-(-capacity // plan.tokens), target, MAX_SPLITS)
    return max(1, wanted, -(-MIN_DEVICE_ELEMENTS // (heads * rows)))


@dataclass(frozen=True)
class GroupShape:
    """A threadgroup of the kernel. ``tiles``: of eight rows; ``block``: tokens staged at once."""

    tiles: int
    simdgroups: int
    block: int


@lru_cache(maxsize=256)
def group_shape(rows: int, head_dim: int, token_bytes: int) -> GroupShape:
    """Choose the threadgroup for so many query rows and bytes of a token's key and value.

    With one tile every simdgroup stages tokens of its own, with more all stage the same ones.
    """
    tiles = -(-rows // TILE_ROWS)
    sharing = 1 if tiles == 1 else min(tiles, SIMDGROUPS)
    limit = STAGE_BYTES * sharing
    block = next((n for n in BLOCK_TOKENS if n * token_bytes <= limit), BLOCK_TOKENS[-1])
    if tiles > 1:
        return GroupShape(tiles, tiles, block)
    space = max(block * token_bytes, TILE_ROWS * head_dim * FLOAT32_BYTES)
    simdgroups = SIMDGROUPS if SIMDGROUPS * space <= THREADGROUP_BYTES else SIMDGROUPS // 2
    return GroupShape(tiles, simdgroups, block)
