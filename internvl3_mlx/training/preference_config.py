"""The settings of preference optimization: the weights of its losses, and what they depend on."""

from dataclasses import dataclass

from internvl3_mlx.errors import UserError
from internvl3_mlx.option_fields import config_field
from internvl3_mlx.training.config_fields import REWARD_SHIFTS

# the losses of each kind of data; sft is of both
PAIR_WEIGHTS = ("dpo_weight", "bco_weight", "sft_weight", "orpo_weight", "simpo_weight")
LABEL_WEIGHTS = ("kto_weight", "sft_weight")


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """How preferences are learned. Each weight is that of one loss; 0 skips it."""

    dpo_weight: float = config_field(
        0.8, "Preference", "Weight of the preference (DPO) term.", low=0
    )
    bco_weight: float = config_field(0.2, "Preference", "Weight of the quality (BCO) term.", low=0)
    sft_weight: float = config_field(
        1.0, "Preference", "Weight of the generation (SFT) term.", low=0
    )
    orpo_weight: float = config_field(
        0.0, "Preference", "Weight of the odds ratio (ORPO) term.", low=0
    )
    simpo_weight: float = config_field(0.0, "Preference", "Weight of the SimPO term.", low=0)
    kto_weight: float = config_field(
        0.0, "Preference", "Weight of the KTO term, of answers with a label.", low=0
    )
    beta: float = config_field(
        0.1,
        "Preference",
        "Scale of the rewards; with a reference, lower allows more drift from it.",
        low=0,
    )
    length_normalize: bool = config_field(
        False,
        "Preference",
        "Divide the rewards of DPO and BCO by the number of tokens; suits a --beta near 5.",
    )
    simpo_gamma: float = config_field(
        0.5, "Preference", "Margin that SimPO asks for between the rewards of a pair.", low=0
    )
    desirable_weight: float = config_field(
        1.0, "Preference", "KTO: weight of answers whose label is true.", low=0
    )
    undesirable_weight: float = config_field(
        1.0, "Preference", "KTO: weight of answers whose label is false.", low=0
    )
    label_smoothing: float = config_field(
        0.0,
        "Preference",
        "Label smoothing: assumed fraction of flipped preference pairs.",
        low=0,
        high=0.5,
    )
    reward_shift: str = config_field(
        "running",
        "Preference",
        "Reward shift of the BCO term: the running mean reward, or zero.",
        choices=REWARD_SHIFTS,
    )
    cache_reference: bool = config_field(
        False, "Preference", "Cache the reference log-probabilities on disk."
    )


def check_weights(config: PreferenceSettings, *, reads_labels: bool) -> None:
    """Raise ``UserError`` for weights of losses that this kind of data has not, or if all are 0."""
    own: tuple[str, ...] = LABEL_WEIGHTS if reads_labels else PAIR_WEIGHTS
    other: tuple[str, ...] = PAIR_WEIGHTS if reads_labels else LABEL_WEIGHTS
    if foreign := [name for name in other if name not in own and getattr(config, name)]:
        needs = "pairs: method mpo" if reads_labels else "answers with labels: method kto"
        raise UserError(
            f"{foreign[0]} is {getattr(config, foreign[0])}, but this loss needs {needs}; set it "
            "to 0 or choose that method"
        )
    if not any(getattr(config, name) for name in own):
        names = f"{', '.join(own[:-1])} and {own[-1]}"
        both = "both" if len(own) == 2 else "all"  # noqa: PLR2004  two is what both means
        raise UserError(f"{names} are {both} 0; set at least one above 0")
