"""The keys of a model's JSON files that change a result, with the values each may have.

One table per kind of file and level. A key in a table is obeyed, or refused by name when this
package cannot do what it says; a key in no table has no effect here, and ``internvl3 info`` lists
it. Bookkeeping (``HARMLESS``) is not worth listing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from internvl3_mlx.errors import ConfigError

MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_CONTEXT = 10_000, 2**20, 2**24, 2**31 - 1


class Rule(Protocol):
    """Says which values a key may have."""

    def accepts(self, value: Any) -> bool: ...

    @property
    def expected(self) -> str: ...


@dataclass(frozen=True)
class Whole:
    """An integer in a range."""

    least: int = 0
    most: int = MAX_CONTEXT

    def accepts(self, value: Any) -> bool:
        return type(value) is int and self.least <= value <= self.most

    @property
    def expected(self) -> str:
        if self.least == 1:
            return f"a positive number, whole and at most {self.most:,}"
        return f"a whole number from {self.least:,} to {self.most:,}"


@dataclass(frozen=True)
class Number:
    """A finite number of at least ``least``."""

    least: float = 0.0
    most: float = 1e12
    exclusive: bool = False

    def accepts(self, value: Any) -> bool:
        if type(value) not in (int, float):
            return False
        return self.least <= value <= self.most and not (self.exclusive and value == self.least)

    @property
    def expected(self) -> str:
        least = "a positive number" if self.exclusive else f"a number from {self.least:g}"
        return f"{least} up to {self.most:g}"


@dataclass(frozen=True)
class Switch:
    """true or false."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    expected = "true or false"


@dataclass(frozen=True)
class Text:
    """A text."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str)

    expected = "a text"


@dataclass(frozen=True)
class Table:
    """An object."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Mapping)

    expected = "an object"


@dataclass(frozen=True)
class OneOf:
    """One of some values; others ask for what this package does not compute."""

    values: tuple[Any, ...]

    def accepts(self, value: Any) -> bool:
        return any(value == known and type(value) is type(known) for known in self.values)

    @property
    def expected(self) -> str:
        return " or ".join(str(value) for value in self.values)


@dataclass(frozen=True)
class Null:
    """Nothing but null: the key asks for what this package does not know."""

    def accepts(self, _: Any) -> bool:
        return False

    expected = "null"


@dataclass(frozen=True)
class Size:
    """A side in pixels, or a pair of equal ones."""

    def accepts(self, value: Any) -> bool:
        sides = value if isinstance(value, list) else [value]
        return 1 <= len(sides) <= 2 and all(Whole(1, 2**14).accepts(side) for side in sides)

    expected = "a whole number of pixels"


@dataclass(frozen=True)
class Ids:
    """A token id, or a list of them."""

    def accepts(self, value: Any) -> bool:
        ids = value if isinstance(value, list) else [value]
        return len(ids) <= 1000 and all(Whole(-1, MAX_VOCABULARY).accepts(one) for one in ids)

    expected = "a token id or a list of token ids"


@dataclass(frozen=True)
class DataType:
    """The name of a floating-point type, or an object with one for each part of the model."""

    names = ("bfloat16", "float16", "float32", "auto")

    def accepts(self, value: Any) -> bool:
        values = list(value.values()) if isinstance(value, Mapping) else [value]
        return all(isinstance(one, str) and self.accepts_name(one) for one in values)

    def accepts_name(self, name: str) -> bool:
        return name.removeprefix("torch.") in self.names

    expected = "bfloat16, float16, float32 or auto"


@dataclass(frozen=True)
class Layer:
    """A layer number, negative from the end, alone or as the only one of a list."""

    def accepts(self, value: Any) -> bool:
        layers = value if isinstance(value, list) else [value]
        return len(layers) == 1 and Whole(-MAX_LAYERS, MAX_LAYERS).accepts(layers[0])

    expected = "one layer number"


LEAST_RATIO = 0.001  # of pixel shuffle; the published one is 0.5
COUNT, WIDTH = Whole(1, MAX_LAYERS), Whole(1, MAX_WIDTH)
POSITIVE, RATE, TILES = Number(exclusive=True), Number(0, 1), Whole(1, 512)
DTYPES = DataType()
COMMON: dict[str, Rule] = {"dtype": DTYPES, "torch_dtype": DTYPES, "tie_word_embeddings": Switch()}
SIZES: dict[str, Rule] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "intermediate_size": WIDTH,
}
CHAT_TABLE: dict[str, Rule] = {
    **COMMON,
    "vision_config": Table(),
    "llm_config": Table(),
    "text_config": Table(),
    "quantization": Table(),
    "quantization_config": Table(),
    "select_layer": Layer(),
    "downsample_ratio": Number(LEAST_RATIO, 1),
    "ps_version": OneOf(("v1", "v2")),
    "force_image_size": Size(),
    "dynamic_image_size": Switch(),
    "use_thumbnail": Switch(),
    "min_dynamic_patch": TILES,
    "max_dynamic_patch": TILES,
    "pad2square": OneOf((False,)),
    "image_fold": Null(),
    "template": Text(),
    "system_message": Text(),
    "image_token_index": Whole(),
    "img_context_token_id": Whole(-1),
    "format": Text(),
    "use_backbone_lora": Whole(),
    "use_llm_lora": Whole(),
    "demo_trained": Switch(),
    "flash_mode": Switch(),
    "flash_relative_threshold": RATE,
    "flash_absolute_threshold": RATE,
}
HF_TABLE: dict[str, Rule] = {
    **COMMON,
    "vision_config": Table(),
    "text_config": Table(),
    "quantization": Table(),
    "quantization_config": Table(),
    "downsample_ratio": Number(LEAST_RATIO, 1),
    "vision_feature_layer": Layer(),
    "vision_feature_select_strategy": OneOf(("default",)),
    "projector_hidden_act": OneOf(("gelu",)),
    "image_seq_length": Whole(1),
    "image_token_id": Whole(),
    "image_token_index": Whole(),
}
VISION_TABLE: dict[str, Rule] = {
    **SIZES,
    "image_size": Size(),
    "patch_size": Size(),
    "num_channels": OneOf((3,)),
    "hidden_act": OneOf(("gelu",)),
    "norm_type": OneOf(("layer_norm", "rms_norm")),
    "layer_norm_eps": Number(0, 1, exclusive=True),
    "qkv_bias": Switch(),
    "qk_normalization": Switch(),
    "use_moe": OneOf((False,)),
    "drop_path_rate": RATE,
    "attention_bias": Switch(),
    "use_qk_norm": Switch(),
    "use_mask_token": OneOf((False,)),
    "use_mean_pooling": OneOf((True,)),
    "use_absolute_position_embeddings": OneOf((True,)),
}
TEXT_TABLE: dict[str, Rule] = {
    **COMMON,
    **SIZES,
    "num_key_value_heads": COUNT,
    "head_dim": WIDTH,
    "vocab_size": Whole(1, MAX_VOCABULARY),
    "max_position_embeddings": Whole(1),
    "original_max_position_embeddings": Whole(1),
    "rms_norm_eps": Number(0, 1, exclusive=True),
    "rope_theta": POSITIVE,
    "rope_scaling": Table(),
    "rope_parameters": Table(),
    "partial_rotary_factor": OneOf((1, 1.0)),
    "hidden_act": OneOf(("silu",)),
    "attention_bias": Switch(),
    "qkv_bias": Switch(),
    "mlp_bias": OneOf((False,)),
    "use_qk_norm": OneOf((False,)),
    "use_sliding_window": Switch(),
    "sliding_window": Whole(1),
    "max_window_layers": Whole(0),
    "eos_token_id": Ids(),
    "num_experts": COUNT,
    "num_local_experts": COUNT,
    "num_experts_per_tok": COUNT,
    "moe_intermediate_size": WIDTH,
    "norm_topk_prob": Switch(),
    "decoder_sparse_step": OneOf((1,)),
    "swiglu_alpha": OneOf((1.702,)),
    "swiglu_limit": OneOf((7, 7.0)),
}
QUANTIZATION_TABLE: dict[str, Rule] = {
    "bits": OneOf((2, 3, 4, 5, 6, 8)),
    "group_size": OneOf((16, 32, 64, 128)),
    "mode": OneOf(("affine", "mxfp4", "mxfp8", "nvfp4")),
}
GENERATION_TABLE: dict[str, Rule] = {"eos_token_id": Ids()}
PROCESSOR_TABLE: dict[str, Rule] = {
    "min_patches": TILES,
    "max_patches": TILES,
    "do_resize": OneOf((True,)),
    "do_rescale": OneOf((True,)),
    "do_normalize": OneOf((True,)),
    "do_convert_rgb": OneOf((True,)),
    "do_center_crop": OneOf((False,)),
    "do_pad": OneOf((False,)),
    "resample": OneOf((3,)),
    "rescale_factor": Number(0, 1, exclusive=True),
    "size": Table(),
}
TOKENIZER_TABLE: dict[str, Rule] = {
    "added_tokens_decoder": Table(),
    "add_bos_token": Switch(),
    "add_eos_token": OneOf((False,)),
    "split_special_tokens": OneOf((False,)),
}
READ_ELSEWHERE = {  # keys that are read by name where they are needed, whatever their type
    "model_type",
    "architectures",
    "chat_template",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "image_mean",
    "image_std",
    "layer_types",
    "mlp_only_layers",
    "attention_dropout",
}
HARMLESS = {
    "_name_or_path",
    "bos_token_id",
    "dtype",
    "torch_dtype",
    "_commit_hash",
    "_from_model_config",
    "auto_map",
    "transformers_version",
    "use_cache",
    "use_flash_attn",
    "attn_implementation",
    "_attn_implementation_autoset",
    "initializer_range",
    "initializer_factor",
    "processor_class",
    "image_processor_type",
    "tokenizer_class",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
}


def check_values(content: Mapping[str, Any], table: Mapping[str, Rule], where: str) -> None:
    """Raise ConfigError for the first value that a table does not allow; null counts as absent."""
    for key, rule in table.items():
        value = content.get(key)
        if value is not None and not rule.accepts(value):
            name = f"{where}.{key}" if where else f"config.json: {key}"
            raise ConfigError(
                f"{name} is {str(value)[:60]!r}; expected {rule.expected}; correct it, or use "
                "another model"
            )


def ignored_keys(content: Mapping[str, Any], tables: Iterable[Mapping[str, Rule]]) -> list[str]:
    """List the keys of one level that have no effect here, bookkeeping aside."""
    known = {key for table in tables for key in table} | READ_ELSEWHERE | HARMLESS
    return sorted(key for key, value in content.items() if key not in known and value is not None)
