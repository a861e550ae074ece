"""A tokenizer of Qwen2's kind and size with generated merges: it loads as slowly as the real
one."""

import json
from itertools import islice, product
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre

from internvl3_mlx.prompt.tokenizer import QWEN_SPLIT

QWEN_MERGES = 151_387  # with 256 bytes and 31 added tokens: the 151,674 rows of InternVL3's Qwen
FEW_MERGES = 200
ADDED = (  # the published order, so that a full vocabulary has the published ids
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>",
    "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
IMAGE_TOKEN = "<IMG_CONTEXT>"
MAX_LENGTH = 12_288  # tokens; mlx-vlm truncates longer prompts at the tokenizer's own limit


def write_tokenizer(folder: Path, merges: int) -> dict[str, int]:
    """Write tokenizer.json and its config into ``folder``; return the ids of the added tokens."""
    tokenizer = Tokenizer(synthetic_bpe(merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(QWEN_SPLIT), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in ADDED}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings(ids)), encoding="utf-8")
    return ids


def synthetic_bpe(count: int) -> models.BPE:
    """Merge bytes to pairs, then pairs with bytes, until there are ``count`` merges."""
    alphabet = sorted(pre.ByteLevel.alphabet())
    pairs = list(product(alphabet, repeat=2))
    triples = ((a + b, c) for (a, b), c in product(pairs, alphabet))
    merges = [*pairs[:count], *islice(triples, max(0, count - len(pairs)))]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    return models.BPE({token: n for n, token in enumerate(tokens)}, merges)


def settings(ids: dict[str, int]) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": MAX_LENGTH,
        "additional_special_tokens": list(ADDED),
        "added_tokens_decoder": {
            str(n): {"content": token, "special": True, **plain} for token, n in ids.items()
        },
    }
