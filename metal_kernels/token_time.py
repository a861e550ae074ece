"""A model of the time of one token: bytes, launches, occupancy and instructions. Arithmetic only.

Nothing of it is measured on Apple hardware yet. It says what to expect and what would bound it, so
that a measurement can disagree.
"""

from dataclasses import dataclass

from internvl3_mlx.metal_kernels.cost_model import AttentionCost
from internvl3_mlx.metal_kernels.kv_layout import DENSE_BITS
from internvl3_mlx.metal_kernels.launch_plan import SPLIT_PLANS

WEIGHT_BYTES = 4.5 / 8  # of a 4-bit number in groups of 64, its share of scale and bias included
LAUNCH_SECONDS = 3e-6  # of a kernel that waits for the one before
OTHER_LAUNCHES = 9  # of a layer with the kernels, beside the two of attention
LATENCY_SECONDS = 0.5e-6  # of a read of memory, under load
RESIDENT_THREADGROUPS = 3  # of a core: 20 KiB of threadgroup memory each
ISSUES_PER_CYCLE = 4  # instructions of simdgroups, for each core
CACHE_BITS = (DENSE_BITS, 8, 4)


@dataclass(frozen=True)
class GPU:
    """One chip of each class of ``SPLIT_PLANS``; Apple's and public figures."""

    name: str
    letter: str
    cores: int
    bytes_per_second: float
    hertz: float


GPUS = (
    GPU("M4", "g", 10, 120e9, 1.5e9),
    GPU("M4 Pro", "g", 20, 273e9, 1.5e9),
    GPU("M4 Max", "s", 40, 546e9, 1.5e9),
    GPU("M3 Ultra", "d", 80, 819e9, 1.4e9),
)


@dataclass(frozen=True)
class Decoder:
    """A published language model. ``inner``: of the experts that a token uses together, if any."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def weights(self) -> int:
        """Numbers that a token reads: every matrix once, and of the embedding only the head's."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.inner) + self.vocab * self.width


DECODERS = (
    Decoder("InternVL3 1B", 24, 896, 4864, 14, 2, 64, 151674),
    Decoder("InternVL3 2B", 28, 1536, 8960, 12, 2, 128, 151674),
    Decoder("InternVL3 8B", 28, 3584, 18944, 28, 4, 128, 151674),
    Decoder("InternVL3 9B", 48, 4096, 10240, 32, 2, 128, 128142),
    Decoder("InternVL3 14B", 48, 5120, 13824, 40, 8, 128, 151674),
    Decoder("InternVL3 38B", 64, 5120, 27648, 40, 8, 128, 151674),
    Decoder("InternVL3 78B", 80, 8192, 29568, 64, 8, 128, 151674),
    Decoder("InternVL3.5 1B", 28, 1024, 3072, 16, 8, 128, 151936),
    Decoder("InternVL3.5 2B", 28, 2048, 6144, 16, 8, 128, 151936),
    Decoder("InternVL3.5 4B", 36, 2560, 9728, 32, 8, 128, 151936),
    Decoder("InternVL3.5 8B", 36, 4096, 12288, 32, 8, 128, 151936),
    Decoder("InternVL3.5 14B", 40, 5120, 17408, 40, 8, 128, 151936),
    Decoder("InternVL3.5 38B", 64, 5120, 25600, 64, 8, 128, 151936),
    Decoder("InternVL3.5 30B-A3B", 48, 2048, 8 * 768, 32, 4, 128, 151936),
    Decoder("InternVL3.5 241B-A28B", 94, 4096, 8 * 1536, 64, 4, 128, 151936),
)


@dataclass(frozen=True)
class TokenTime:
    """One new token after ``tokens`` others, weights in 4 bits."""

    decoder: Decoder
    gpu: GPU
    tokens: int
    bits: int = DENSE_BITS

    @property
    def cost(self) -> AttentionCost:
        """Attention of one layer."""
        decoder = self.decoder
        return AttentionCost(
            decoder.heads, decoder.kv_heads, decoder.head_dim, self.tokens, self.bits,
            plan=SPLIT_PLANS[self.gpu.letter],
        )  # fmt: skip

    @property
    def in_flight(self) -> int:
        """Bytes that all resident simdgroups wait for at once."""
        cost, shape = self.cost, self.cost.variant.shape
        groups = min(cost.splits * cost.kv_heads, RESIDENT_THREADGROUPS * self.gpu.cores)
        stages = 1 if shape.tiles > 1 else shape.simdgroups
        return groups * stages * shape.block * cost.variant.token_bytes

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds of one layer's attention by what may bound it; the largest does."""
        cost, gpu = self.cost, self.gpu
        busy = min(gpu.cores, cost.splits * cost.kv_heads)
        return {
            "memory": cost.kernel_nbytes / gpu.bytes_per_second,
            "occupancy": cost.kernel_nbytes * LATENCY_SECONDS / self.in_flight,
            "arithmetic": cost.slots / (ISSUES_PER_CYCLE * busy * gpu.hertz),
        }

    @property
    def bound(self) -> str:
        """What bounds attention."""
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def seconds(self) -> float:
        weights = self.decoder.weights * WEIGHT_BYTES / self.gpu.bytes_per_second
        launches = (OTHER_LAUNCHES + 2) * LAUNCH_SECONDS
        return weights + self.decoder.layers * (launches + max(self.bounds.values()))


def time_table(tokens: int) -> str:
    """Return the table of docs/metal.md: milliseconds a token with 16-, 8- and 4-bit caches.

    A letter marks attention that memory does not bound: o for occupancy, a for arithmetic.
    """
    lines = [
        f"| model | {' | '.join(gpu.name for gpu in GPUS)} |",
        f"|---|{'---:|' * len(GPUS)}",
    ]
    for decoder in DECODERS:
        cells: list[str] = []
        for gpu in GPUS:
            times = [TokenTime(decoder, gpu, tokens, bits) for bits in CACHE_BITS]
            cells.append(" / ".join(format_time(time) for time in times))
        lines.append(f"| {decoder.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_time(time: TokenTime) -> str:
    mark = "" if time.bound == "memory" else time.bound[0]
    return f"{time.seconds * 1e3:.1f}{mark}"
