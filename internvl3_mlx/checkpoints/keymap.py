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

SHOWN = 6  # names listed in an error before it says how many more there are


@dataclass(frozen=True)
class Rule:
    """``ours`` is made of ``theirs``: one for one, or one side joined by rows from the other."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    grouped: bool = False  # rows are interleaved by key-value head (InternLM2's wqkv)


def rule(ours: str | Sequence[str], *theirs: str, grouped: bool = False) -> Rule:
    return Rule((ours,) if isinstance(ours, str) else tuple(ours), theirs or (str(ours),), grouped)


VISION = "vision_model.encoder.layers.{n}."
TEXT = "language_model.model.layers.{n}."

TOWER_NAMES = (
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.*",
    "vision_model.embeddings.position_embedding",
    *(
        VISION + name
        for name in ("norm1.*", "norm2.*", "attn.qkv.*", "attn.q_norm.*", "attn.k_norm.*")
    ),
    *(VISION + name for name in ("attn.proj.*", "mlp.fc1.*", "mlp.fc2.*", "ls1", "ls2")),
    "mlp1.0.*",
    "mlp1.1.*",
    "mlp1.3.*",
)
QWEN_NAMES = (
    "language_model.model.embed_tokens.*",
    *(TEXT + f"self_attn.{p}_proj.*" for p in "qkvo"),
    *(TEXT + f"mlp.{p}_proj.*" for p in ("gate", "up", "down")),
    *(TEXT + f"{p}_layernorm.*" for p in ("input", "post_attention")),
    "language_model.model.norm.*",
    "language_model.lm_head.*",
)
QWEN = tuple(rule(name) for name in QWEN_NAMES)
INTERNLM2 = (  # the 9B stores InternLM3 weights under InternLM2's names
    rule("language_model.model.embed_tokens.*", "language_model.model.tok_embeddings.*"),
    rule([TEXT + f"self_attn.{p}_proj.*" for p in "qkv"], TEXT + "attention.wqkv.*", grouped=True),
    rule(TEXT + "self_attn.o_proj.*", TEXT + "attention.wo.*"),
    rule(TEXT + "mlp.gate_proj.*", TEXT + "feed_forward.w1.*"),
    rule(TEXT + "mlp.up_proj.*", TEXT + "feed_forward.w3.*"),
    rule(TEXT + "mlp.down_proj.*", TEXT + "feed_forward.w2.*"),
    rule(TEXT + "input_layernorm.*", TEXT + "attention_norm.*"),
    rule(TEXT + "post_attention_layernorm.*", TEXT + "ffn_norm.*"),
    rule("language_model.lm_head.*", "language_model.output.*"),
)
# the published tools leave a native checkpoint's q/k norms under the wrong folder
MISSPELT = tuple(rule(VISION + f"attn.{p}_norm.*", VISION + f"attention.{p}_norm.*") for p in "qk")
ORIGINAL = (*(rule(name) for name in TOWER_NAMES), *MISSPELT, *QWEN, *INTERNLM2)

NATIVE_VISION = "vision_tower.encoder.layer.{n}."
NATIVE = (  # transformers "-hf" checkpoints, after ``normalize_name`` has made the prefixes one
    rule("vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token"),
    rule(
        "vision_model.embeddings.patch_embedding.*",
        "vision_tower.embeddings.patch_embeddings.projection.*",
    ),
    rule(
        "vision_model.embeddings.position_embedding", "vision_tower.embeddings.position_embeddings"
    ),
    rule(VISION + "norm1.*", NATIVE_VISION + "layernorm_before.*"),
    rule(VISION + "norm2.*", NATIVE_VISION + "layernorm_after.*"),
    rule(VISION + "attn.qkv.*", *(NATIVE_VISION + f"attention.{p}_proj.*" for p in "qkv")),
    *(  # and an original checkpoint's likewise
        rule(VISION + f"attn.{p}_norm.*", NATIVE_VISION + f"{folder}.{p}_norm.*")
        for p in "qk"
        for folder in ("attention", "attn")
    ),
    rule(VISION + "attn.proj.*", NATIVE_VISION + "attention.projection_layer.*"),
    *(rule(VISION + f"mlp.fc{i}.*", NATIVE_VISION + f"mlp.fc{i}.*") for i in (1, 2)),
    *(rule(VISION + f"ls{i}", NATIVE_VISION + f"lambda_{i}") for i in (1, 2)),
    rule("mlp1.0.*", "multi_modal_projector.layer_norm.*"),
    rule("mlp1.1.*", "multi_modal_projector.linear_1.*"),
    rule("mlp1.3.*", "multi_modal_projector.linear_2.*"),
    *QWEN,
)
TABLES = {"original": ORIGINAL, "mlx": ORIGINAL, "native": NATIVE}
TOWER = tuple(rule(name) for name in TOWER_NAMES)
WRITTEN = {  # layout and decoder -> the names we write, the first rule for a tensor of ours
    ("mlx", "qwen2"): (*TOWER, *QWEN),
    ("mlx", "internlm3"): (*TOWER, *QWEN),
    ("original", "qwen2"): (*TOWER, *QWEN),
    ("original", "internlm3"): (*TOWER, *INTERNLM2, *QWEN),
    ("hf", "qwen2"): NATIVE,
    ("hf", "internlm3"): NATIVE,
}
DROPPED = re.compile(
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
class Move:
    """One finished rule: the tensors to read, in order, and the tensors to make of them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    grouped: bool = False


class KeyMap:
    """Places a checkpoint's tensors by one layout's table."""

    def __init__(self, layout: str, rules: Sequence[Rule] = ()):
        self.layout = layout
        self.rules = rules or TABLES[layout]

    @classmethod
    def back(cls, layout: str, family: str) -> "KeyMap":
        """Read a layout's table the other way: from our names to the ones it is written with."""
        rules = WRITTEN[layout, family]
        return cls(layout, [Rule(entry.theirs, entry.ours, entry.grouped) for entry in rules])

    @cached_property
    def patterns(self) -> list[tuple[re.Pattern[str], Rule, int]]:
        return [
            (pattern_of(name), entry, i)
            for entry in self.rules
            for i, name in enumerate(entry.theirs)
        ]

    def place(self, name: str) -> tuple[Rule, int, Callable[[str], str]]:
        """Find a checkpoint name's rule, its part in it, and how to fill the rule's other names."""
        for pattern, entry, part in self.patterns:
            if match := pattern.fullmatch(normalize_name(name)):
                return entry, part, filler(match.groupdict())
        if "lora_" in name:
            raise KeyMapError(
                f"{name!r} is an adapter's; merge the LoRA adapter into its model first"
            )
        raise KeyMapError(
            f"no rule for checkpoint key {name!r}; "
            f"it is not part of an InternVL3 model ({self.layout} layout)"
        )

    def moves(self, names: Iterable[str]) -> list[Move]:
        """Arrange all tensors; raise when one is unknown, doubled or lacks its siblings."""
        found: dict[tuple[str, ...], tuple[Rule, dict[int, str]]] = {}
        for name in names:
            if DROPPED.search(name):
                continue
            entry, part, fill = self.place(name)
            targets = tuple(fill(target) for target in entry.ours)
            parts = found.setdefault(targets, (entry, {}))[1]
            if part in parts or found[targets][0] is not entry:
                raise KeyMapError(
                    f"doubled: {name} and {next(iter(parts.values()))} both give {targets[0]}"
                )
            parts[part] = name
        twice = [t for t, n in Counter(t for ts in found for t in ts).items() if n > 1]
        if twice:
            raise KeyMapError(f"doubled, by two layouts' names: {listed(twice)}")
        short = [
            targets[0]
            for targets, (entry, parts) in found.items()
            if len(parts) < len(entry.theirs)
        ]
        if short:
            raise KeyMapError(f"incomplete: {listed(short)}")
        return [
            Move(tuple(parts[i] for i in sorted(parts)), targets, entry.grouped)
            for targets, (entry, parts) in found.items()
        ]


def pattern_of(name: str) -> re.Pattern[str]:
    escaped = (
        re.escape(name)
        .replace(r"\{n\}", r"(?P<n>\d+)")
        .replace(r"\*", r"(?P<last>weight|bias|scales|biases)")
    )
    return re.compile(escaped)


def filler(found: dict[str, str]) -> Callable[[str], str]:
    def fill(name: str) -> str:
        return name.replace("{n}", found.get("n", "")).replace("*", found.get("last", ""))

    return fill


def listed(names: Iterable[str]) -> str:
    """Name the first few of a list, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more
