"""Checkpoint layouts as tables of rules: every tensor's published names, and the one name we keep.

We keep the names of the original Qwen-based checkpoints. A rule is read in both directions: ``Ours
<- Theirs``, where
``{n}`` is a layer number and ``*`` a last part (weight, bias, and the scales and biases of packed
tensors).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from internvl3_mlx.errors import KeyMapError

MAX_LISTED = 6  # names listed in an error before it says how many more there are


@dataclass(frozen=True)
class KeyRule:
    """``ours`` is made of ``theirs``: one for one, or one side joined by rows from the other."""

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    grouped: bool = False  # rows are interleaved by key-value head (InternLM2's wqkv)


def key_rule(ours: str | Sequence[str], *theirs: str, grouped: bool = False) -> KeyRule:
    return KeyRule(
        (ours,) if isinstance(ours, str) else tuple(ours), theirs or (str(ours),), grouped
    )


VISION_LAYER = "vision_model.encoder.layers.{n}."
TEXT_LAYER = "language_model.model.layers.{n}."

TOWER_NAMES = (
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.*",
    "vision_model.embeddings.position_embedding",
    *(
        VISION_LAYER + name
        for name in ("norm1.*", "norm2.*", "attn.qkv.*", "attn.q_norm.*", "attn.k_norm.*")
    ),
    *(VISION_LAYER + name for name in ("attn.proj.*", "mlp.fc1.*", "mlp.fc2.*", "ls1", "ls2")),
    "mlp1.0.*",
    "mlp1.1.*",
    "mlp1.3.*",
)
QWEN_NAMES = (
    "language_model.model.embed_tokens.*",
    *(TEXT_LAYER + f"self_attn.{p}_proj.*" for p in "qkvo"),
    *(TEXT_LAYER + f"mlp.{p}_proj.*" for p in ("gate", "up", "down")),
    *(TEXT_LAYER + f"{p}_layernorm.*" for p in ("input", "post_attention")),
    "language_model.model.norm.*",
    "language_model.lm_head.*",
)
QWEN = tuple(key_rule(name) for name in QWEN_NAMES)
INTERNLM2 = (  # the 9B stores InternLM3 weights under InternLM2's names
    key_rule("language_model.model.embed_tokens.*", "language_model.model.tok_embeddings.*"),
    key_rule(
        [TEXT_LAYER + f"self_attn.{p}_proj.*" for p in "qkv"],
        TEXT_LAYER + "attention.wqkv.*",
        grouped=True,
    ),
    key_rule(TEXT_LAYER + "self_attn.o_proj.*", TEXT_LAYER + "attention.wo.*"),
    key_rule(TEXT_LAYER + "mlp.gate_proj.*", TEXT_LAYER + "feed_forward.w1.*"),
    key_rule(TEXT_LAYER + "mlp.up_proj.*", TEXT_LAYER + "feed_forward.w3.*"),
    key_rule(TEXT_LAYER + "mlp.down_proj.*", TEXT_LAYER + "feed_forward.w2.*"),
    key_rule(TEXT_LAYER + "input_layernorm.*", TEXT_LAYER + "attention_norm.*"),
    key_rule(TEXT_LAYER + "post_attention_layernorm.*", TEXT_LAYER + "ffn_norm.*"),
    key_rule("language_model.lm_head.*", "language_model.output.*"),
)
# the published tools leave a native checkpoint's q/k norms under the wrong folder
MISSPELLED = tuple(
    key_rule(VISION_LAYER + f"attn.{p}_norm.*", VISION_LAYER + f"attention.{p}_norm.*")
    for p in "qk"
)
ORIGINAL = (*(key_rule(name) for name in TOWER_NAMES), *MISSPELLED, *QWEN, *INTERNLM2)

HF_VISION_LAYER = "vision_tower.encoder.layer.{n}."
HF = (  # transformers "-hf" checkpoints, after ``normalize_name`` has made the prefixes one
    key_rule("vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token"),
    key_rule(
        "vision_model.embeddings.patch_embedding.*",
        "vision_tower.embeddings.patch_embeddings.projection.*",
    ),
    key_rule(
        "vision_model.embeddings.position_embedding", "vision_tower.embeddings.position_embeddings"
    ),
    key_rule(VISION_LAYER + "norm1.*", HF_VISION_LAYER + "layernorm_before.*"),
    key_rule(VISION_LAYER + "norm2.*", HF_VISION_LAYER + "layernorm_after.*"),
    key_rule(
        VISION_LAYER + "attn.qkv.*", *(HF_VISION_LAYER + f"attention.{p}_proj.*" for p in "qkv")
    ),
    *(  # and an original checkpoint's likewise
        key_rule(VISION_LAYER + f"attn.{p}_norm.*", HF_VISION_LAYER + f"{folder}.{p}_norm.*")
        for p in "qk"
        for folder in ("attention", "attn")
    ),
    key_rule(VISION_LAYER + "attn.proj.*", HF_VISION_LAYER + "attention.projection_layer.*"),
    *(key_rule(VISION_LAYER + f"mlp.fc{i}.*", HF_VISION_LAYER + f"mlp.fc{i}.*") for i in (1, 2)),
    *(key_rule(VISION_LAYER + f"ls{i}", HF_VISION_LAYER + f"lambda_{i}") for i in (1, 2)),
    key_rule("mlp1.0.*", "multi_modal_projector.layer_norm.*"),
    key_rule("mlp1.1.*", "multi_modal_projector.linear_1.*"),
    key_rule("mlp1.3.*", "multi_modal_projector.linear_2.*"),
    *QWEN,
)
READ_RULES = {"original": ORIGINAL, "mlx": ORIGINAL, "native": HF}
TOWER = tuple(key_rule(name) for name in TOWER_NAMES)
WRITE_RULES = {  # layout and decoder -> the names we write, the first rule for a tensor of ours
    ("mlx", "qwen2"): (*TOWER, *QWEN),
    ("mlx", "internlm3"): (*TOWER, *QWEN),
    ("original", "qwen2"): (*TOWER, *QWEN),
    ("original", "internlm3"): (*TOWER, *INTERNLM2, *QWEN),
    ("hf", "qwen2"): HF,
    ("hf", "internlm3"): HF,
}
IGNORED = re.compile(
    r"(^|\.)(position_ids|rotary_emb\.inv_freq)$"
)  # buffers that some writers save


def normalize_name(name: str) -> str:
    """Make one layout's variants one: PEFT's wrapping, a leading ``model.``, the head's place."""
    name = name.replace("base_model.model.", "").replace(".base_layer.", ".")
    name = re.sub(r"^model\.(?=vision_tower\.|multi_modal_projector\.|language_model\.)", "", name)
    name = re.sub(
        r"^language_model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model.", name
    )
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


@dataclass(frozen=True)
class ResolvedRule:
    """One finished rule: the tensors to read, in order, and the tensors to make of them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    grouped: bool = False


class KeyMap:
    """Places a checkpoint's tensors by one layout's table."""

    def __init__(self, layout: str, rules: Sequence[KeyRule] = ()):
        self.layout = layout
        self.rules = rules or READ_RULES[layout]

    @classmethod
    def inverse(cls, layout: str, family: str) -> "KeyMap":
        """Read a layout's table the other way: from our names to the ones it is written with."""
        rules = WRITE_RULES[layout, family]
        return cls(
            layout, [KeyRule(entry.sources, entry.targets, entry.grouped) for entry in rules]
        )

    @cached_property
    def patterns(self) -> list[tuple[re.Pattern[str], KeyRule, int]]:
        return [
            (compile_pattern(name), entry, i)
            for entry in self.rules
            for i, name in enumerate(entry.sources)
        ]

    def match(self, name: str) -> tuple[KeyRule, int, Callable[[str], str]]:
        """Find a checkpoint name's rule, its part in it, and how to fill the rule's other names."""
        for pattern, entry, part in self.patterns:
            if match := pattern.fullmatch(normalize_name(name)):
                return entry, part, name_formatter(match.groupdict())
        if "lora_" in name:
            raise KeyMapError(
                f"{name!r} is an adapter's; merge the LoRA adapter into its model first"
            )
        raise KeyMapError(
            f"no rule for checkpoint key {name!r}; "
            f"it is not part of an InternVL3 model ({self.layout} layout)"
        )

    def resolve(self, names: Iterable[str]) -> list[ResolvedRule]:
        """Arrange all tensors; raise when one is unknown, doubled or lacks its siblings."""
        found: dict[tuple[str, ...], tuple[KeyRule, dict[int, str]]] = {}
        for name in names:
            if IGNORED.search(name):
                continue
            entry, part, fill = self.match(name)
            targets = tuple(fill(target) for target in entry.targets)
            parts = found.setdefault(targets, (entry, {}))[1]
            if part in parts or found[targets][0] is not entry:
                raise KeyMapError(
                    f"doubled: {name} and {next(iter(parts.values()))} both give {targets[0]}"
                )
            parts[part] = name
        twice = [t for t, n in Counter(t for ts in found for t in ts).items() if n > 1]
        if twice:
            raise KeyMapError(f"doubled, by two layouts' names: {summarize_names(twice)}")
        short = [
            targets[0]
            for targets, (entry, parts) in found.items()
            if len(parts) < len(entry.sources)
        ]
        if short:
            raise KeyMapError(f"incomplete: {summarize_names(short)}")
        return [
            ResolvedRule(tuple(parts[i] for i in sorted(parts)), targets, entry.grouped)
            for targets, (entry, parts) in found.items()
        ]


def compile_pattern(name: str) -> re.Pattern[str]:
    escaped = (
        re.escape(name)
        .replace(r"\{n\}", r"(?P<n>\d+)")
        .replace(r"\*", r"(?P<last>weight|bias|scales|biases)")
    )
    return re.compile(escaped)


def name_formatter(found: dict[str, str]) -> Callable[[str], str]:
    def fill(name: str) -> str:
        return name.replace("{n}", found.get("n", "")).replace("*", found.get("last", ""))

    return fill


def summarize_names(names: Iterable[str]) -> str:
    """Name the first few of a list, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_LISTED} more" if len(ordered) > MAX_LISTED else ""
    return ", ".join(ordered[:MAX_LISTED]) + more
