"""Read ``config.json`` of any layout into a ``ModelConfig``."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from internvl3_mlx.config.decoders import (
    FAMILIES,
    FAMILY_OF_NAME,
    FULL,
    SLIDING,
    ExpertsFamily,
)
from internvl3_mlx.config.foreign import (
    check_no_pointers,
    check_quantization_method,
    describe_folder,
    stores_mxfp4,
)
from internvl3_mlx.config.keys import (
    CHAT_TABLE,
    HF_TABLE,
    QUANTIZATION_TABLE,
    TEXT_TABLE,
    VISION_TABLE,
    check_values,
)
from internvl3_mlx.config.model import (
    ExpertsConfig,
    ModelConfig,
    Quantization,
    QuantizationPlan,
    TextConfig,
    VisionConfig,
)
from internvl3_mlx.config.processor import read_tile_limits
from internvl3_mlx.config.rope import read_rope
from internvl3_mlx.errors import CheckpointError, ConfigError
from internvl3_mlx.json_files import read_json

Json = Mapping[str, Any]


def read_config(folder: Path) -> ModelConfig:
    """Read and normalize ``config.json`` of a checkpoint folder.

    In the hf layout the tile limits are in the processor's files. Raises CheckpointError if there
    is no config, ConfigError if it is not an InternVL3 model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        if foreign := describe_folder(folder):
            raise CheckpointError(foreign)
        raise CheckpointError(
            f"no config.json in {folder}; a model folder holds config.json and *.safetensors files"
        )
    check_no_pointers(folder)
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    check_quantization_method(content, folder)
    config = parse_config(content)
    if config.layout == "hf":
        limits = read_tile_limits(folder, config.force_image_size)
        return replace(config, min_dynamic_patch=limits.least, max_dynamic_patch=limits.most)
    return config


def parse_config(content: Json) -> ModelConfig:
    """Normalize the content of a ``config.json`` of any layout."""
    kind = content.get("model_type")
    try:
        if kind == "internvl_chat":
            return _chat_config(content)
        if kind == "internvl":
            return _hf_config(content)
    except KeyError as error:
        raise ConfigError(
            f"config.json has no {error.args[0]!r}, which an InternVL3 config requires"
        ) from error
    except TypeError as error:
        raise ConfigError(f"config.json has a value of the wrong type: {error}") from error
    raise ConfigError(
        f"config.json: model_type is {str(kind)[:60]!r}; expected internvl_chat or internvl, as in "
        "InternVL3 checkpoints"
    )


def _chat_config(content: Json) -> ModelConfig:
    check_values(content, CHAT_TABLE, "")
    given, text = _part(content, "vision_config"), _chat_text(content)
    check_values(given, VISION_TABLE, "vision_config")
    vision = _select_fields(given, VisionConfig)
    vision |= _square_sides(vision)
    plan = _parse_quantization(content)
    converted = plan is not None or content.get("format") == "mlx"
    named = _select_fields(
        content,
        ModelConfig,
        skip={"layout", "vision", "text", "quantization", "dtype", "trained", "image_token_id"},
    )
    named["force_image_size"] = _square_side(
        named.get("force_image_size", vision.get("image_size", 448))
    )
    named["select_layer"] = _only_layer(named.get("select_layer", -1))
    system = content.get("system_message")
    return ModelConfig(
        **{**named, "system_message": system or None},
        layout="mlx" if converted else "original",
        vision=VisionConfig(**vision),
        text=_text_config(
            text,
            "llm_config" if "llm_config" in content else "text_config",
            tied=_tied(content, text),
        ),
        quantization=plan,
        image_token_id=_image_token_id(content, ("img_context_token_id", "image_token_index")),
        trained=content.get("demo_trained", True),
        dtype=_dtype(content, text),
    )


def _hf_config(content: Json) -> ModelConfig:
    """Read the transformers layout, which always uses up to 12 tiles and a thumbnail."""
    check_values(content, HF_TABLE, "")
    vision, text = _part(content, "vision_config"), _part(content, "text_config")
    check_values(vision, VISION_TABLE, "vision_config")
    mapped = {
        ours: vision[theirs]
        for ours, theirs in HF_VISION_FIELDS.items()
        if vision.get(theirs) is not None
    }
    mapped |= _square_sides(mapped)
    config = ModelConfig(
        layout="hf",
        vision=VisionConfig(**(HF_VISION_DEFAULTS | mapped)),
        # the class default of transformers is True at the top, whatever the text part says
        text=_text_config(text, "text_config", tied=bool(content.get("tie_word_embeddings", True))),
        select_layer=_only_layer(content.get("vision_feature_layer", -1)),
        downsample_ratio=content.get("downsample_ratio", 0.5),
        ps_version="v2",
        force_image_size=mapped.get("image_size", 448),
        dynamic_image_size=True,
        use_thumbnail=True,
        max_dynamic_patch=12,
        quantization=_parse_quantization(content),
        dtype=_dtype(content, text),
        image_token_id=_image_token_id(content, ("image_token_id", "image_token_index")),
    )
    stated = content.get("image_seq_length")
    if stated not in (None, config.num_image_token):
        raise ConfigError(
            f"config.json: image_seq_length is {stated}, but tiles of {config.force_image_size} "
            f"pixels have {config.num_image_token} visual tokens; correct one of them"
        )
    return config


HF_VISION_FIELDS = {  # our field -> transformers'
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
HF_VISION_DEFAULTS: dict[str, Any] = {
    "norm_type": "layer_norm",
    "qkv_bias": False,
    "qk_normalization": False,
}


def _text_config(text: Json, where: str, *, tied: bool) -> TextConfig:
    name = (text.get("architectures") or [None])[0] or text.get("model_type")
    family = FAMILY_OF_NAME.get(str(name)) or FAMILY_OF_NAME.get(str(text.get("model_type", "")))
    if family is None:
        titles = ", ".join(row.title for row in FAMILIES.values())
        raise ConfigError(
            f"the language model is {str(name)[:60]!r}; expected one of {titles}; use an InternVL3 "
            "or InternVL3.5 model"
        )
    row = FAMILIES[family]
    text = {**row.defaults, **{key: value for key, value in text.items() if value is not None}}
    check_values(text, TEXT_TABLE, where)
    theta, scaling = read_rope(text, where)
    heads, width = text["num_attention_heads"], text["hidden_size"]
    natural = width // heads if isinstance(width, int) and isinstance(heads, int) and heads else 0
    filled = {"head_dim": natural, "num_key_value_heads": heads}
    experts = _experts(text, row.experts, where) if row.experts else None
    if experts is not None:
        filled["intermediate_size"] = experts.intermediate_size  # of no MLP where all are experts
    return TextConfig(
        **{**filled, **_select_fields(text, TextConfig, skip=TEXT_FIELDS_READ_APART)},
        family=family,
        rope_theta=10000.0 if theta is None else theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        qkv_bias=_qkv_bias(text, family),
        o_bias=row.o_bias,
        qk_norm=row.qk_norm,
        sinks=row.sinks,
        windows=_windows(text, where, sliding=row.sliding),
        experts=experts,
    )


TEXT_FIELDS_READ_APART = frozenset(
    {
        *("family", "tie_word_embeddings", "rope_theta", "rope_scaling", "experts", "windows"),
        *("qkv_bias", "o_bias", "qk_norm", "sinks"),
    }
)


def _qkv_bias(text: Json, family: str) -> bool | None:
    """Tell whether q, k and v have biases; None where only InternLM2's files say it."""
    for key in ("qkv_bias", "attention_bias"):
        if text.get(key) is not None:
            return bool(text[key])
    return FAMILIES[family].qkv_bias


def _experts(text: Json, names: ExpertsFamily, where: str) -> ExpertsConfig:
    """Read the mixture of experts. Raises ConfigError where some layers have an MLP instead."""
    if text.get("mlp_only_layers"):
        raise ConfigError(
            f"{where}.mlp_only_layers is {str(text['mlp_only_layers'])[:60]}; expected [], since "
            "this package computes models whose layers all have experts"
        )
    renormalize = names.renormalize is None or bool(text.get(names.renormalize, False))
    return ExpertsConfig(
        count=text[next((key for key in names.count if key in text), names.count[0])],
        per_token=text[names.per_token],
        intermediate_size=text[names.intermediate_size],
        renormalize=renormalize,
        router=names.router,
        module=names.module,
        bias=names.bias,
        activation=names.activation,
    )


def _windows(text: Json, where: str, *, sliding: bool) -> tuple[int | None, ...]:
    """Return each layer's window, () where all layers attend to all tokens before.

    ``sliding``: the family may have windows; its layers alternate where the file lists none.
    Raises ConfigError for windows in other families, and for kinds of layers that are unknown.
    """
    layers = text.get("num_hidden_layers", 0)
    if not sliding:
        _check_full_attention(text, where)
        return ()
    kinds = text.get("layer_types") or [(SLIDING, FULL)[i % 2] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or {*kinds} - {SLIDING, FULL}:
        raise ConfigError(
            f"{where}.layer_types is {str(kinds)[:60]!r}; expected {SLIDING} or {FULL} for each of "
            f"{layers} layers"
        )
    return tuple(text["sliding_window"] if kind == SLIDING else None for kind in kinds)


def _check_full_attention(text: Json, where: str) -> None:
    """Raise ConfigError where a layer does not see all tokens before it."""
    window, first = text.get("sliding_window"), text.get("max_window_layers", 28)
    layers, context = text.get("num_hidden_layers", 0), text.get("max_position_embeddings", 32768)
    kinds = text.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != FULL for kind in kinds):
        raise ConfigError(
            f"{where}.layer_types is {str(kinds)[:60]!r}; this package computes full_attention only"
        )
    slides = text.get("use_sliding_window") and not kinds
    if slides and window and first < layers and window < context:
        raise ConfigError(
            f"{where}.use_sliding_window is true: layers from {first} on see {window:,} tokens; "
            "this package computes full attention only"
        )


def _part(content: Json, name: str) -> Json:
    """Return a part of a config. Raises KeyError where it is absent, null or empty."""
    if not content.get(name):
        raise KeyError(name)
    part: Json = content[name]
    return part


def _chat_text(content: Json) -> Json:
    """Return the language model's part. Raises ConfigError where its two spellings disagree."""
    ours, other = content.get("llm_config"), content.get("text_config")
    if ours and other:
        differing = [
            key for key in TEXT_TABLE if key in ours and key in other and ours[key] != other[key]
        ]
        if differing:
            raise ConfigError(
                f"config.json: llm_config and text_config disagree about {differing[0]}: "
                f"{str(ours[differing[0]])[:60]!r} and {str(other[differing[0]])[:60]!r}; "
                "remove one of the two"
            )
    text: Json | None = ours or other
    if not text:
        raise KeyError("llm_config")
    return text


def _tied(content: Json, text: Json) -> bool:
    """Tell whether a config allows the output head to be the embedding, at either level."""
    return bool(content.get("tie_word_embeddings") or text.get("tie_word_embeddings"))


def _image_token_id(content: Json, keys: tuple[str, ...]) -> int | None:
    """Return the id of <IMG_CONTEXT> that a config states, under any of its names."""
    stated = {content[key] for key in keys if isinstance(content.get(key), int)} - {-1}
    if len(stated) > 1:
        raise ConfigError(f"config.json: {' and '.join(keys)} disagree; remove one of them")
    return next(iter(stated), None)


MXFP4 = Quantization(4, 32, "mxfp4")


def _parse_quantization(content: Json) -> QuantizationPlan | None:
    """Read ``quantization``; ``quantization_config`` is a copy of it."""
    if stores_mxfp4(content):
        return QuantizationPlan(MXFP4)
    table = content.get("quantization") or content.get("quantization_config")
    if not table:
        return None
    if "bits" not in table or "group_size" not in table:
        raise ConfigError(
            f"config.json has a quantization without bits or group_size, {dict(table)}; only "
            "checkpoints quantized by MLX can be loaded"
        )
    check_values(table, QUANTIZATION_TABLE, "quantization")
    for path, entry in table.items():
        if isinstance(entry, Mapping):
            check_values(entry, QUANTIZATION_TABLE, f"quantization.{path}")
    modules: dict[str, Quantization | Literal[False]] = {
        path: _parse_quantization_entry(entry, table) if isinstance(entry, Mapping) else False
        for path, entry in table.items()
        if isinstance(entry, Mapping) or entry is False
    }
    return QuantizationPlan(_parse_quantization_entry(table, {}), modules)


def _parse_quantization_entry(entry: Json, default: Json) -> Quantization:
    merged = {**default, **entry}
    return Quantization(
        bits=merged["bits"], group_size=merged["group_size"], mode=merged.get("mode", "affine")
    )


def _select_fields(
    content: Json, kind: type, skip: frozenset[str] | set[str] = frozenset()
) -> dict[str, Any]:
    """Select the fields of ``kind`` that the file has; published configs hold many others."""
    names = set(kind.__dataclass_fields__) - set(skip)  # type: ignore[attr-defined]
    return {name: content[name] for name in names if content.get(name) is not None}


def _square_sides(vision: Mapping[str, Any]) -> dict[str, int]:
    return {
        key: _square_side(vision[key])
        for key in ("image_size", "patch_size")
        if vision.get(key) is not None
    }


def _only_layer(layer: int | list[int]) -> int:
    return layer[0] if isinstance(layer, list) else layer


def _square_side(size: int | list[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConfigError(f"vision_config has the size {size}; expected square tiles and patches")
    return sides.pop()


def _dtype(content: Json, text: Json) -> str:
    found = (part.get(key) for part in (content, text) for key in ("dtype", "torch_dtype"))
    for name in found:
        if isinstance(name, Mapping):  # one for each part of the model
            name = next(
                (name[key] for key in ("text_config", "llm_config", "") if key in name), None
            )
        if name not in (None, "auto"):
            return str(name).removeprefix("torch.")
    return "bfloat16"
