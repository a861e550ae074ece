"""Checkpoint layouts as tables of rules: a tensor's published names and its name in the model.

The model uses the names of the original Qwen-based checkpoints. A rule maps published names to
those names and is also read in the other direction, to write a layout. In a name ``{n}`` is a layer
number, ``{e}`` the number of an expert, and ``*`` the last component: weight, bias, or the scales
and biases of quantized tensors.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from internvl3_mlx.config import TextConfig
from internvl3_mlx.errors import KeyMapError

# How the rows of the targets lie in the sources. joined: one source after another. grouped: for
# each key-value head its queries, its key and its value (InternLM2's wqkv). halves: for each expert
# the rows of one target, then those of the other. alternating: the rows of two targets in turn.
# columns, alternating columns: an expert's matrix is transposed. The last four are of stacked
# experts.
RowOrder = Literal["joined", "grouped", "halves", "alternating", "columns", "alternating columns"]
MAX_LISTED = 6  # names listed in an error; the others are counted


@dataclass(frozen=True)
class KeyRule:
    """``targets`` are made of ``sources``: one from one, or by joining or splitting rows."""

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    order: RowOrder = "joined"


def key_rule(ours: str | Sequence[str], *theirs: str, order: RowOrder = "joined") -> KeyRule:
    return KeyRule((ours,) if isinstance(ours, str) else tuple(ours), theirs or (str(ours),), order)


TEXT_PREFIX = "language_model."  # of all that belongs to the language model
LANGUAGE_LAYOUT = "language"  # the language model alone, which mlx-lm reads; it is only written
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
POOLING = "pooling_before_gating."
ROUTER_NAMES = (  # of Flash: the projector of compressed tiles, and what chooses them
    *(f"mlp2.{i}.*" for i in (0, 1, 4, 7)),
    POOLING + "query_token",
    *(POOLING + f"attn{i}.in_proj_{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    *(POOLING + f"{name}.*" for name in ("attn1.out_proj", "attn2.out_proj", "norm1", "norm2")),
    *(f"gating.block{block}.{i}.*" for block in range(1, 5) for i in (0, 3, 5)),
    *(f"gating.gate.{i}.*" for i in (0, 1)),
)
MXFP4_WORDS = "_blocks"  # the end of a name of bytes that each hold two mxfp4 numbers
GATE_UP_DOWN = ("gate", "up", "down")
QWEN_NAMES = (
    "language_model.model.embed_tokens.*",
    *(TEXT_LAYER + f"self_attn.{p}_proj.*" for p in "qkvo"),
    *(TEXT_LAYER + f"self_attn.{p}_norm.*" for p in "qk"),
    TEXT_LAYER + "self_attn.sinks",
    *(TEXT_LAYER + f"mlp.{p}_proj.*" for p in GATE_UP_DOWN),
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
        order="grouped",
    ),
    key_rule(TEXT_LAYER + "self_attn.o_proj.*", TEXT_LAYER + "attention.wo.*"),
    key_rule(TEXT_LAYER + "mlp.gate_proj.*", TEXT_LAYER + "feed_forward.w1.*"),
    key_rule(TEXT_LAYER + "mlp.up_proj.*", TEXT_LAYER + "feed_forward.w3.*"),
    key_rule(TEXT_LAYER + "mlp.down_proj.*", TEXT_LAYER + "feed_forward.w2.*"),
    key_rule(TEXT_LAYER + "input_layernorm.*", TEXT_LAYER + "attention_norm.*"),
    key_rule(TEXT_LAYER + "post_attention_layernorm.*", TEXT_LAYER + "ffn_norm.*"),
    key_rule("language_model.lm_head.*", "language_model.output.*"),
)
QWEN_EXPERTS = (  # one tensor for each expert, or as transformers holds them: all in two
    *(
        key_rule(
            TEXT_LAYER + f"mlp.switch_mlp.{p}_proj.*", TEXT_LAYER + f"mlp.experts.{{e}}.{p}_proj.*"
        )
        for p in GATE_UP_DOWN
    ),
    key_rule(
        [TEXT_LAYER + f"mlp.switch_mlp.{p}_proj.weight" for p in ("gate", "up")],
        TEXT_LAYER + "mlp.experts.gate_up_proj",
        order="halves",
    ),
    key_rule(TEXT_LAYER + "mlp.switch_mlp.down_proj.weight", TEXT_LAYER + "mlp.experts.down_proj"),
    key_rule(TEXT_LAYER + "mlp.gate.*"),
    *(key_rule(TEXT_LAYER + f"mlp.switch_mlp.{p}_proj.*") for p in GATE_UP_DOWN),
)


def gpt_oss_experts(last: str, suffix: str, order: RowOrder) -> tuple[KeyRule, KeyRule]:
    """Return the rules for one kind of GPT-OSS's tensors: gate and up together, and down."""
    alternating: RowOrder = "alternating columns" if order == "columns" else "alternating"
    experts = TEXT_LAYER + "mlp.experts."
    return (
        key_rule(
            [f"{experts}{p}_proj.{last}" for p in ("gate", "up")],
            f"{experts}gate_up_proj{suffix}",
            order=alternating,
        ),
        key_rule(f"{experts}down_proj.{last}", f"{experts}down_proj{suffix}", order=order),
    )


GPT_OSS_EXPERTS = (
    *gpt_oss_experts("weight", "", "columns"),
    *gpt_oss_experts("bias", "_bias", "joined"),
    *gpt_oss_experts("weight", MXFP4_WORDS, "joined"),
    *gpt_oss_experts("scales", "_scales", "joined"),
    key_rule(TEXT_LAYER + "mlp.router.*"),
    *(key_rule(TEXT_LAYER + f"mlp.experts.{p}_proj.*") for p in GATE_UP_DOWN),
)
# the published conversion tools write the q/k norms of an -hf checkpoint under this name
MISSPELLED = tuple(
    key_rule(VISION_LAYER + f"attn.{p}_norm.*", VISION_LAYER + f"attention.{p}_norm.*")
    for p in "qk"
)
TOWER = tuple(key_rule(name) for name in (*TOWER_NAMES, *ROUTER_NAMES))
ORIGINAL = (*TOWER, *MISSPELLED, *QWEN, *INTERNLM2)

HF_VISION_LAYER = "vision_tower.encoder.layer.{n}."
HF = (  # transformers' "-hf" checkpoints, after ``normalize_name`` has unified their prefixes
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
    *(  # under either name, as above
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


def without_prefix(entry: KeyRule) -> KeyRule:
    """Return a rule for files of a language model alone, whose names lack ``TEXT_PREFIX``."""
    sources = tuple(name.removeprefix(TEXT_PREFIX) for name in entry.sources)
    return KeyRule(entry.targets, sources, entry.order)


READ_RULES = {"original": ORIGINAL, "mlx": ORIGINAL, "hf": HF}
# layout -> the names to write; the first rule for a tensor applies
WRITE_RULES = {
    "mlx": (*TOWER, *QWEN),
    "original": (*TOWER, *QWEN),
    "hf": HF,
    LANGUAGE_LAYOUT: tuple(map(without_prefix, QWEN)),
}
# decoder -> rules beside those of the layout, all of them layouts' own names at once
FAMILY_READ_RULES = {"qwen3_moe": QWEN_EXPERTS, "gpt_oss": GPT_OSS_EXPERTS}
# where a family's names take precedence over the layout's; its own names in the mlx layout
FAMILY_WRITE_RULES = {
    ("original", "internlm3"): INTERNLM2,
    ("mlx", "qwen3_moe"): QWEN_EXPERTS[-4:],
    (LANGUAGE_LAYOUT, "qwen3_moe"): tuple(map(without_prefix, QWEN_EXPERTS[-4:])),
    ("original", "qwen3_moe"): QWEN_EXPERTS,
    ("hf", "qwen3_moe"): QWEN_EXPERTS,
    ("mlx", "gpt_oss"): GPT_OSS_EXPERTS[-4:],
}
IGNORED = re.compile(
    r"(^|\.)(position_ids|rotary_emb\.inv_freq)$"
)  # buffers that some writers save
# weights of Flash that its published forward pass never uses; conversions leave them out
UNUSED = re.compile(r"pooling_before_gating\.(attn|norm)[34]\..*")


def normalize_name(name: str) -> str:
    """Unify variants of a layout: PEFT's prefix, a leading ``model.``, the place of the head."""
    name = name.replace("base_model.model.", "").replace(".base_layer.", ".")
    name = re.sub(r"^model\.(?=vision_tower\.|multi_modal_projector\.|language_model\.)", "", name)
    name = re.sub(
        r"^language_model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model.", name
    )
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def unused_tensors(names: Iterable[str]) -> list[str]:
    """List the tensors that are stored and unused."""
    return sorted(name for name in names if UNUSED.fullmatch(name))


@dataclass(frozen=True)
class ResolvedRule:
    """One rule for actual tensors: the tensors to read, in order, and those to make of them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    order: RowOrder = "joined"


class KeyMap:
    """Maps a checkpoint's tensors by one layout's table.

    experts: how many there are, for rules that make a tensor for each of them.
    """

    def __init__(
        self, layout: str, family: str = "", rules: Sequence[KeyRule] = (), experts: int = 0
    ):
        self.layout, self.experts = layout, experts
        self.rules = rules or (*FAMILY_READ_RULES.get(family, ()), *READ_RULES[layout])

    @classmethod
    def inverse(cls, layout: str, text: TextConfig) -> "KeyMap":
        """Return the map from the model's names to those of a layout."""
        rules = (*FAMILY_WRITE_RULES.get((layout, text.family), ()), *WRITE_RULES[layout])
        inverted = [KeyRule(entry.sources, entry.targets, entry.order) for entry in rules]
        return cls(layout, rules=inverted, experts=text.experts.count if text.experts else 0)

    @cached_property
    def patterns(self) -> list[tuple[re.Pattern[str], KeyRule, int]]:
        return [
            (compile_pattern(name), entry, i)
            for entry in self.rules
            for i, name in enumerate(entry.sources)
        ]

    def match(self, name: str) -> tuple[KeyRule, int, "NameFormatter"]:
        """Find the rule for a name, its index among the sources, and a formatter of other names.

        The index is the number of the expert where each has a tensor. Raises KeyMapError if there
        is no rule.
        """
        normal = normalize_name(name)
        for pattern, entry, part in self.patterns:
            if match := pattern.fullmatch(normal):
                fill = NameFormatter(match.groupdict(), self.experts)
                return entry, int(fill.found.get("e", part)), fill
        if "lora_" in name:
            raise KeyMapError(
                f"{name!r} belongs to a LoRA adapter; merge the adapter into its model first"
            )
        raise KeyMapError(
            f"no rule for checkpoint key {name!r}; "
            f"it is not part of an InternVL3 model ({self.layout} layout)"
        )

    def resolve(self, names: Iterable[str]) -> list[ResolvedRule]:
        """Resolve the rules for all tensors.

        Raises KeyMapError for a tensor that is unknown, duplicated or has missing siblings.
        """
        found: dict[tuple[str, ...], tuple[KeyRule, dict[int, str]]] = {}
        for name in names:
            if IGNORED.search(name) or UNUSED.fullmatch(name):
                continue
            entry, part, fill = self.match(name)
            targets = tuple(target for pattern in entry.targets for target in fill.all(pattern))
            parts = found.setdefault(targets, (entry, {}))[1]
            if part in parts or found[targets][0] is not entry:
                raise KeyMapError(
                    f"duplicate: {name} and {next(iter(parts.values()))} both map to {targets[0]}"
                )
            parts[part] = name
        twice = [t for t, n in Counter(t for ts in found for t in ts).items() if n > 1]
        if twice:
            raise KeyMapError(f"duplicates under two layouts' names: {summarize_names(twice)}")
        partial = [
            targets[0]
            for targets, (entry, parts) in found.items()
            if len(parts) < len(entry.sources) or max(parts) >= len(parts)
        ]
        if partial:
            raise KeyMapError(f"incomplete: {summarize_names(partial)}")
        return [
            ResolvedRule(tuple(parts[i] for i in sorted(parts)), targets, entry.order)
            for targets, (entry, parts) in found.items()
        ]


def compile_pattern(name: str) -> re.Pattern[str]:
    escaped = (
        re.escape(name)
        .replace(r"\{n\}", r"(?P<n>\d+)")
        .replace(r"\{e\}", r"(?P<e>\d{1,5})")
        .replace(r"\*", r"(?P<last>weight|bias|scales|biases)")
    )
    return re.compile(escaped)


@dataclass(frozen=True)
class NameFormatter:
    """Fills in the patterns of a rule with what was found in a name that it matches."""

    found: dict[str, str]
    experts: int

    def __call__(self, pattern: str) -> str:
        for key in ("n", "e"):
            pattern = pattern.replace(f"{{{key}}}", self.found.get(key, ""))
        return pattern.replace("*", self.found.get("last", ""))

    def all(self, pattern: str) -> list[str]:
        """Return the name, or one for each expert where the pattern has a number that was not."""
        if "{e}" not in pattern or "e" in self.found:
            return [self(pattern)]
        return [self(pattern.replace("{e}", str(e))) for e in range(self.experts)]


def summarize_names(names: Iterable[str]) -> str:
    """Join the first few names and say how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_LISTED} more" if len(ordered) > MAX_LISTED else ""
    return ", ".join(ordered[:MAX_LISTED]) + more
