"""What a request may take at most. Importing this is cheap: the command line makes flags of it."""

from dataclasses import dataclass, fields

from internvl3_mlx.option_fields import check_bounds, config_field

MB, MEGAPIXEL = 2**20, 10**6
SECTION = "Limits"


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Bounds on one request. Beyond them it is refused, and the server goes on."""

    max_body_mb: int = config_field(
        64, SECTION, "Size of a request, with its images, in MB.", low=1, high=4096
    )
    max_images: int = config_field(
        64, SECTION, "Images, pages and videos of a request.", low=1, high=4096
    )
    max_megapixels: int = config_field(
        100, SECTION, "Pixels of an image, in millions.", low=1, high=10_000
    )
    max_tokens: int = config_field(
        4096, SECTION, "Tokens of an answer; requests may ask for fewer.", low=1, high=10**9,
        flags=("--max-tokens",),
    )  # fmt: skip
    body_timeout: float = config_field(
        60.0, SECTION, "Seconds in which a request must arrive.", low=0.05, high=86_400
    )
    answer_timeout: float = config_field(
        1800.0, SECTION, "Seconds after which an answer is ended.", low=0.05, high=10**7
    )
    allow_private_urls: bool = config_field(
        False, SECTION,
        "Also download images from this machine and its local network.",
        flags=("--allow-private-urls",),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_bounds(entry, getattr(self, entry.name))
