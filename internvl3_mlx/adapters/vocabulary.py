"""Adapters trained with other tokens than their model's bring embedding, head and tokenizer.

PEFT saves the embedding and the head whole once they were resized, and trainers save the tokenizer
beside them. A model takes all three from the adapter, as PEFT's ``AutoPeftModel`` does.
"""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.adapters.adapter_files import explain_grown_vocabulary
from internvl3_mlx.adapters.attach import EMBEDDING, HEAD
from internvl3_mlx.adapters.peft import Adapter
from internvl3_mlx.checkpoints.build_model import LoadedModel
from internvl3_mlx.errors import CheckpointError, KeyMapError
from internvl3_mlx.models.lora import replace_module
from internvl3_mlx.prompt.tokenizer import Tokenizer


def with_adapter_vocabulary(loaded: LoadedModel, adapter: Adapter, folder: Path) -> LoadedModel:
    """Give a model the vocabulary that an adapter was trained with, if that is another one.

    The new embedding and head are zero: the adapter's take their place when it is merged or
    attached. Raises KeyMapError if the adapter lacks the head or the tokenizer, or has the
    tokenizer of another model.
    """
    text = loaded.config.text
    embedding = adapter.modules_to_save.get(f"{EMBEDDING}.weight")
    if embedding is None or embedding.shape[0] == text.vocab_size:
        return loaded
    rows, width = embedding.shape
    head = adapter.modules_to_save.get(f"{HEAD}.weight")
    if width != text.hidden_size or (head is None) != text.tie_word_embeddings:
        return loaded  # refused when the shapes are compared
    if head is not None and head.shape != embedding.shape:
        return loaded
    tokenizer = read_tokenizer(loaded.tokenizer, folder, (text.vocab_size, width), (rows, width))
    if tokenizer.vocab_size > rows:
        raise KeyMapError(
            f"the tokenizer in {folder} has ids up to {tokenizer.vocab_size - 1}, but the "
            f"adapter's embedding has {rows} rows; save the adapter and its tokenizer again"
        )
    model, config = loaded.model, replace(loaded.config, text=replace(text, vocab_size=rows))
    dtype = model.language_model.model.norm.weight.dtype
    replace_module(model, EMBEDDING, zero_layer(nn.Embedding(rows, width), dtype))
    if head is not None:
        replace_module(model, HEAD, zero_layer(nn.Linear(width, rows, bias=False), dtype))
    model.config = config
    return replace(loaded, config=config, tokenizer=tokenizer)


def read_tokenizer(
    own: Tokenizer, folder: Path, shape: tuple[int, int], saved: tuple[int, int]
) -> Tokenizer:
    """Read the tokenizer of an adapter, and check that it continues the model's own."""
    try:
        tokenizer = Tokenizer.from_folder(folder, stops=own.stop_ids)
    except CheckpointError as error:
        grown = explain_grown_vocabulary([(f"{EMBEDDING}.weight", shape, saved)])
        raise KeyMapError(f"{grown}; its folder has no tokenizer that could be read") from error
    changed = [
        name
        for name, token in own.added.items()
        if name not in tokenizer.added or tokenizer.added[name].id != token.id
    ]
    if changed:
        raise KeyMapError(
            f"the tokenizer in {folder} has another id for {changed[0]!r} than the model's; the "
            "adapter was trained on another model"
        )
    return tokenizer


def zero_layer(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    layer.weight = mx.zeros(layer.weight.shape, dtype)
    return layer
