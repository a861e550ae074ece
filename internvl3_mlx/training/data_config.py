"""The settings of a run that decide what is read: the data half of ``TrainConfig``."""

from dataclasses import dataclass

from internvl3_mlx.errors import UserError
from internvl3_mlx.option_fields import config_field
from internvl3_mlx.training.config_fields import BAD_ROW_POLICIES, REDUCTIONS, TILE_SHARING


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records are read, how images become tiles, and how samples are batched."""

    data: str | None = config_field(
        None,
        "Data",
        "Folder, file, meta JSON or Hub dataset; several with ratios: a.jsonl,b.csv:0.5.",
        metavar="PATH",
    )
    stream_records: int | None = config_field(
        None,
        "Data",
        "Read this many records of a Hub dataset over the network instead of downloading it.",
        low=1,
        default_text="download",
    )
    valid_data: str | None = config_field(
        None, "Data", "Validation data.", metavar="PATH", default_text="valid.jsonl of the folder"
    )
    valid_share: float | None = config_field(
        None,
        "Data",
        "Validate on this fraction of the training records, and train on the others.",
        low=0,
        high=0.5,
        default_text="none",
    )
    test: bool = config_field(False, "Data", "Evaluate on the test data after the last update.")
    test_data: str | None = config_field(
        None, "Data", "Test data.", metavar="PATH", default_text="test.jsonl of the folder"
    )
    image_folder: str | None = config_field(
        None,
        "Data",
        "Folder that the paths of images and videos are relative to.",
        metavar="FOLDER",
        default_text="the folder of the data",
    )
    on_bad_row: str = config_field(
        "skip",
        "Data",
        "If an image cannot be decoded during the run: leave its record out, or stop.",
        choices=BAD_ROW_POLICIES,
    )
    max_bad_rows: float = config_field(
        0.01,
        "Data",
        "Stop above this fraction of unreadable records (and more than 10).",
        low=0,
        high=1,
    )
    max_seq_length: int = config_field(
        16384, "Data", "Maximum length in tokens of a sample, or of a packed sequence.", low=8
    )
    packing: bool = config_field(
        False, "Data", "Pack samples into sequences of --max-seq-length tokens."
    )
    max_tiles: int | None = config_field(
        None, "Data", "Maximum number of tiles per image.", low=1, default_text="the model's own"
    )
    multi_image_tiles: str = config_field(
        "shared",
        "Data",
        "Whether the images of a record share --max-tiles or each have as many.",
        choices=TILE_SHARING,
    )
    max_packed_tiles: int = config_field(
        48, "Data", "Maximum number of tiles per packed sequence.", low=1
    )
    num_frames: int = config_field(8, "Data", "Number of frames sampled from each video.", low=1)
    min_frames: int | None = config_field(
        None,
        "Data",
        "Draw the number of frames of each video at random, from this to --num-frames.",
        low=1,
        default_text="always --num-frames",
    )
    augment: bool | None = config_field(
        None,
        "Data",
        "Augment tiles by re-encoding them as JPEG of quality 75 to 100.",
        default_text="as set in a meta JSON",
    )
    grouping: bool = config_field(True, "Data", "Batch samples of similar length together.")
    system: str | None = config_field(
        None,
        "Data",
        "System prompt for records without one.",
        metavar="TEXT",
        default_text="the model's own",
    )
    v2pe_delta: str = config_field(
        "1",
        "Data",
        "V2PE position increment per image token: 1, 1/2 ... 1/256, random.",
        metavar="STEP",
    )
    loss_reduction: str = config_field(
        "token",
        "Data",
        "Loss weight of a token in an answer of n tokens: 1, 1/n or 1/sqrt(n).",
        choices=REDUCTIONS,
    )
    text_ratio: float | None = config_field(
        None,
        "Data",
        "Fraction of text-only samples; the smaller kind is repeated as needed.",
        low=0,
        high=1,
        default_text="as in the data",
    )
    cache_features: bool = config_field(
        True, "Data", "Cache the features of a frozen vision encoder on disk."
    )


def check_data_conflicts(config: DataConfig) -> None:
    """Raise ``UserError`` for settings of the data that contradict each other."""
    if config.valid_share is not None and config.valid_data is not None:
        raise UserError("valid_share and valid_data are mutually exclusive; choose one")
    if config.valid_share == 0:
        raise UserError("valid_share is 0; set a fraction above 0, or drop it")
    if config.stream_records is not None and (config.packing or config.text_ratio is not None):
        raise UserError(
            "stream_records reads records in the order of their row groups, and packing and "
            "text_ratio need another; drop one of them"
        )
    if config.min_frames is not None and config.min_frames > config.num_frames:
        raise UserError(
            f"min_frames {config.min_frames} is more than num_frames {config.num_frames}; lower "
            "one or raise the other"
        )
