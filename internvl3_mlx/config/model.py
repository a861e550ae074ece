"""The configuration of a model, whichever layout its ``config.json`` was written in.

Field names and defaults are those of the published ``internvl_chat`` config class, because a file
omits what equals the default: a missing ``ps_version`` means v1, a missing ``qkv_bias`` no bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from internvl3_mlx.config.rope import RopeScaling
from internvl3_mlx.errors import ConfigError

Layout = Literal["original", "hf", "mlx"]

# mean and standard deviation of R, G, B in 0..1, with which InternViT's pixels are normalized
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

WORD_BITS = 32  # of the words that hold quantized weights and quantized keys and values


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """InternViT. The 300M and 6B towers differ in these fields alone."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int = 448
    patch_size: int = 14
    norm_type: str = "rms_norm"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_normalization: bool = True
    drop_path_rate: float = 0.0  # used in training only

    def __post_init__(self) -> None:
        check_positive_numbers(self, "vision_config")
        if self.drop_path_rate >= 1:
            raise ConfigError(
                f"vision_config.drop_path_rate is {self.drop_path_rate!r}; expected a rate below 1"
            )
        if self.norm_type not in ("layer_norm", "rms_norm"):
            raise ConfigError(
                f"vision_config.norm_type is {self.norm_type!r}; expected layer_norm or rms_norm"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision_config: hidden_size {self.hidden_size} is not divisible by "
                f"{self.num_attention_heads} attention heads"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision_config: image_size {self.image_size} is not a multiple of "
                f"patch_size {self.patch_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts that each layer has for its MLP.

    ``per_token``: experts that a token goes through. ``renormalize``: their weights sum to 1.
    ``router``, ``module``: the names of both parts. ``bias``: router and experts have biases.
    """

    count: int
    per_token: int
    intermediate_size: int
    renormalize: bool = True
    router: str = "gate"
    module: str = "switch_mlp"
    bias: bool = False
    activation: str = "swiglu"

    def __post_init__(self) -> None:
        if not 0 < self.per_token <= self.count:
            raise ConfigError(
                f"text config: {self.per_token} experts per token of {self.count} experts; "
                "expected at least one and no more than there are"
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder. ``family`` is our own field: a row of ``config.decoders.FAMILIES``.

    ``tie_word_embeddings``: the checkpoint may lack an output head of its own. ``qkv_bias``: it
    must have these biases; None where the published code leaves it to the file. ``o_bias``: the
    output projection has one. ``qk_norm``: each head of q and k has a norm before it is rotated.
    ``sinks``: each head has an attention sink. ``windows``: for each layer the tokens that a token
    attends to, itself included, None for all before it; () if all layers attend to all.
    """

    family: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    qkv_bias: bool | None = True
    o_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    windows: tuple[int | None, ...] = ()
    experts: ExpertsConfig | None = None

    @property
    def active_intermediate_size(self) -> int:
        """The width of the MLP that one token goes through: of its experts together."""
        experts = self.experts
        return experts.per_token * experts.intermediate_size if experts else self.intermediate_size

    @property
    def rope_dynamic_factor(self) -> float | None:
        """The factor of dynamic NTK, which alone depends on the length; None for other methods."""
        scaling = self.rope_scaling
        return scaling.factor if scaling.rope_type == "dynamic" else None

    def is_stretched(self, length: int) -> bool:
        """Return whether dynamic NTK changes the rotary base of a sequence of so many tokens."""
        return self.rope_dynamic_factor is not None and length > self.max_position_embeddings

    def any_stretched(self, lengths: Sequence[int | None]) -> bool:
        """Return the same for several sequences; None where dynamic NTK does not apply."""
        return any(length is not None and self.is_stretched(length) for length in lengths)

    @property
    def static_context(self) -> int:
        """Positions that the model can use without dynamic NTK."""
        scaling, window = self.rope_scaling, self.max_position_embeddings
        factor = scaling.factor or 1.0
        if scaling.rope_type == "linear":
            return int(window * factor)
        if scaling.rope_type == "yarn":
            return max(window, int((scaling.original_max_position_embeddings or window) * factor))
        return window

    def __post_init__(self) -> None:
        check_positive_numbers(self, "text config")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"text config: {self.num_attention_heads} attention heads are not divisible by "
                f"{self.num_key_value_heads} key-value heads"
            )


@dataclass(frozen=True)
class Quantization:
    """How one module is quantized. ``mode`` is MLX's: affine, mxfp4, mxfp8 or nvfp4."""

    bits: int
    group_size: int = 64
    mode: str = "affine"


@dataclass(frozen=True)
class QuantizationPlan:
    """How each module is quantized: a default, and exceptions (False: not quantized)."""

    default: Quantization
    modules: Mapping[str, Quantization | Literal[False]] = field(default_factory=dict)

    def for_module(self, module: str) -> Quantization:
        """Return how ``module`` is quantized, given that the checkpoint holds scales for it."""
        return self.modules.get(module) or self.default


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that is known about a checkpoint before its tensors are read."""

    layout: Layout
    vision: VisionConfig
    text: TextConfig
    select_layer: int = -1
    downsample_ratio: float = 0.5
    ps_version: str = "v1"
    force_image_size: int = 448
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 6
    template: str | None = None
    system_message: str | None = None
    quantization: QuantizationPlan | None = None
    trained: bool = True
    dtype: str = "bfloat16"
    image_token_id: int | None = None
    flash_mode: bool = False
    flash_relative_threshold: float | None = None
    flash_absolute_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.ps_version not in ("v1", "v2"):
            raise ConfigError(f"ps_version is {self.ps_version!r}; expected v1 or v2")
        if self.force_image_size != self.vision.image_size:
            raise ConfigError(
                f"force_image_size {self.force_image_size} differs from vision_config.image_size "
                f"{self.vision.image_size}: tiles and position embeddings must agree"
            )
        if self.min_dynamic_patch > self.max_dynamic_patch:
            raise ConfigError(
                f"min_dynamic_patch {self.min_dynamic_patch} is more than max_dynamic_patch "
                f"{self.max_dynamic_patch}; correct one of them"
            )
        if self.vision.grid % self.shuffle_factor:
            raise ConfigError(
                f"a grid of {self.vision.grid} patches is not divisible by the pixel shuffle "
                f"factor {self.shuffle_factor}; check downsample_ratio"
            )
        if self.flash_mode:
            self._check_flash()

    def _check_flash(self) -> None:
        for name in FLASH_THRESHOLDS:
            if getattr(self, name) is None:
                raise ConfigError(
                    f"config.json has flash_mode but no {name}; add the published one, from 0 to 1"
                )
        if self.vision.grid % self.compressed_shuffle_factor:
            raise ConfigError(
                f"a grid of {self.vision.grid} patches is not divisible by "
                f"{self.compressed_shuffle_factor}, as flash_mode requires; check downsample_ratio"
            )

    @property
    def shuffle_factor(self) -> int:
        """Patches per side that pixel shuffle joins into a visual token: 2 for a ratio of 0.5."""
        return round(1 / self.downsample_ratio)

    @property
    def num_image_token(self) -> int:
        """Visual tokens per tile: 256 in every published size."""
        return (self.vision.grid // self.shuffle_factor) ** 2

    @property
    def compressed_shuffle_factor(self) -> int:
        """Patches per side of a visual token of a compressed tile (Flash): 4."""
        return self.shuffle_factor**2

    @property
    def num_compressed_token(self) -> int:
        """Visual tokens of a compressed tile (Flash): 64."""
        return (self.vision.grid // self.compressed_shuffle_factor) ** 2

    @property
    def patch_size(self) -> int:
        return self.vision.patch_size


FLASH_THRESHOLDS = ("flash_relative_threshold", "flash_absolute_threshold")
MAY_BE_ZERO = ("drop_path_rate",)


def check_positive_numbers(config: VisionConfig | TextConfig, name: str) -> None:
    """Raise ConfigError for a size that is not a positive number."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        whole, number = entry.type is int, entry.type in (int, float)
        zero = entry.name in MAY_BE_ZERO and value == 0
        if number and not zero and not (is_number(value, whole) and value > 0):
            raise ConfigError(f"{name}.{entry.name} is {value!r}; expected a positive number")


def is_number(value: object, integer_only: bool) -> bool:
    return isinstance(value, int if integer_only else int | float) and not isinstance(value, bool)
