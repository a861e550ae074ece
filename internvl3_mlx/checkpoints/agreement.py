"""Check that config, tensors and tokenizer are of one model, from headers alone."""

import re
from collections.abc import Iterable, Mapping, Sequence

from internvl3_mlx.checkpoints.keymap import MXFP4_WORDS, ResolvedRule
from internvl3_mlx.checkpoints.reader import TensorInfo
from internvl3_mlx.config import ModelConfig
from internvl3_mlx.errors import ConfigError, KeyMapError
from internvl3_mlx.prompt.tokenizer import Tokenizer

EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
FLOAT_TYPES = ("F32", "F16", "BF16")
SCALE_TYPES = (*FLOAT_TYPES, "U8")  # the mx formats' scales are bytes
STACKS = {
    "vision_model.encoder.layers.": ("norm1.weight", "vision_config"),
    "language_model.model.layers.": ("input_layernorm.weight", "the language model's config"),
}
LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")


def check_head(names: set[str], config: ModelConfig) -> None:
    """Raise KeyMapError if there is no output head and the config does not tie it."""
    if LM_HEAD not in names and not config.text.tie_word_embeddings:
        raise KeyMapError(
            f"missing: {LM_HEAD}; config.json says tie_word_embeddings false, so the embedding "
            "cannot stand in; download the weights again"
        )


def check_layer_counts(names: Iterable[str], config: ModelConfig) -> None:
    """Raise KeyMapError if the config has more layers than the files, before they are built."""
    found = dict.fromkeys(STACKS, 0)
    for name in names:
        match = LAYER_NUMBER.search(name)
        prefix = name[: match.start(1)] if match else ""
        if match and prefix in found and len(match[1]) < 10:
            found[prefix] = max(found[prefix], int(match[1]) + 1)
    expected = (config.vision.num_hidden_layers, config.text.num_hidden_layers)
    for (prefix, count), wanted in zip(found.items(), expected, strict=True):
        if count < wanted:
            tensor, where = STACKS[prefix]
            raise KeyMapError(
                f"missing: {prefix}{count}.{tensor} and more: {where} has {wanted:,} layers, the "
                f"files have {count:,}; take config and weights from one repository"
            )


def check_dtypes(rules: Sequence[ResolvedRule], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise KeyMapError for a tensor of a data type that it cannot have in this model."""
    scaled = {
        target.removesuffix(".scales")
        for rule in rules
        for target in rule.targets
        if target.endswith(".scales")
    }
    for rule in rules:
        module, _, kind = rule.targets[0].rpartition(".")
        allowed: tuple[str, ...] = FLOAT_TYPES
        if kind == "scales":
            allowed = SCALE_TYPES
        elif kind == "weight" and module in scaled:
            allowed = ("U32",)
        for source in rule.sources:
            dtype = tensors[source].dtype
            if source.endswith(MXFP4_WORDS):
                allowed = ("U8",)
            if dtype not in allowed:
                raise KeyMapError(
                    f"{source} is stored as {dtype}; expected {' or '.join(allowed)}; use a "
                    "checkpoint in 16 bits, or one quantized by MLX"
                )


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise ConfigError where the tokenizer, the config and the embedding are of two models."""
    rows = config.text.vocab_size
    if tokenizer.image_id >= rows:
        raise ConfigError(
            f"<IMG_CONTEXT> is token {tokenizer.image_id} but the model has {rows} tokens; the "
            "tokenizer belongs to another model"
        )
    if tokenizer.vocab_size > rows:
        beyond = sorted((a.id, text) for text, a in tokenizer.added.items() if a.id >= rows)
        example = f", {beyond[0][1]!r} for one," if beyond else ""
        raise ConfigError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}{example} but the embedding "
            f"has {rows} rows; take tokenizer and weights from one repository"
        )
    stated = config.image_token_id
    if stated is not None and stated != tokenizer.image_id:
        raise ConfigError(
            f"config.json says that the image token is {stated}, but <IMG_CONTEXT> is token "
            f"{tokenizer.image_id} of the tokenizer; take both from one repository"
        )
