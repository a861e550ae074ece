"""The model card of a converted checkpoint: what it is, how to run it, what was checked."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.metrics import QualityMetrics
from internvl3_mlx.prompt.tokenizer_files import read_optional_text

GB, MB = 1e9, 1e6
HUB_OWNER = "OpenGVLab"
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
LICENSE_KEYS = ("license", "license_name", "license_link")
TAGS = ("mlx", "internvl", "internvl3-mlx")


@dataclass(frozen=True, kw_only=True)
class CardData:
    """Everything a card tells."""

    name: str
    base: str  # OWNER/NAME of the 16-bit model
    layout: str
    nbytes: int
    command: str
    versions: Mapping[str, str]
    bits_per_part: Mapping[str, float]
    quantized: Mapping[str, Quantization]
    skipped_modules: Mapping[str, int]
    num_tensors: int
    quality: QualityMetrics | None = None
    output_check: QualityMetrics | None = None
    adapter: str | None = None  # what was fused into it


def write_model_card(folder: Path, facts: CardData, licence: Mapping[str, Any]) -> str:
    """Write README.md and return it."""
    text = front_matter(facts, licence) + card_body(facts)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def read_license(folder: Path) -> dict[str, Any]:
    """Take the licence lines of the source's own card."""
    import yaml

    match = FRONT_MATTER.match(read_optional_text(folder / "README.md") or "")
    try:
        content = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        content = {}
    return {key: content[key] for key in LICENSE_KEYS if key in (content or {})}


def front_matter(facts: CardData, licence: Mapping[str, Any]) -> str:
    """Write the YAML head. The hub sorts by relation; no value of it fits a 16-bit copy."""
    import yaml

    content: dict[str, Any] = dict(licence)
    content["library_name"] = "mlx" if facts.layout == "mlx" else "transformers"
    content["pipeline_tag"] = "image-text-to-text"
    content["base_model"] = facts.base
    if facts.quantized:
        content["base_model_relation"] = "quantized"
    content["tags"] = [*(TAGS if facts.layout == "mlx" else TAGS[1:]), *bits_tag(facts.quantized)]
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return f"---\n{text}---\n\n"


def bits_tag(packed: Mapping[str, Quantization]) -> list[str]:
    if not packed:
        return []
    [(form, _)] = Counter(packed.values()).most_common(1)
    return [f"{form.bits}-bit"]


def card_body(facts: CardData) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts.versions.items())
    parts = [
        f"# {facts.name}",
        f"{hub_link(facts.base)}{adapter_note(facts)}, converted with internvl3-mlx.",
        *usage_section(facts),
        "## What is inside",
        markdown_table(
            ("part", "bits per parameter"),
            [(p, f"{b:.2f}") for p, b in facts.bits_per_part.items()],
        ),
        f"Weights take {format_size(facts.nbytes)} on disk and as much in memory.",
        *quantization_section(facts),
        "## What was checked",
        "\n".join(f"- {line}" for line in list_checks(facts)),
        "## How it was made",
        f"```sh\n{facts.command}\n```\n\nVersions: {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def adapter_note(facts: CardData) -> str:
    return f" with the adapter `{facts.adapter}` fused into it" if facts.adapter else ""


def hub_link(base: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if "/" in base else base


def format_size(nbytes: int) -> str:
    return f"{nbytes / GB:,.1f} GB" if nbytes >= GB / 2 else f"{nbytes / MB:,.1f} MB"


def usage_section(facts: CardData) -> list[str]:
    if facts.layout != "mlx":
        return []
    return [
        "## Use",
        f"```sh\nuvx internvl3-mlx generate photo.jpg -p 'What is this?' --model {facts.name}\n```",
    ]


def quantization_section(facts: CardData) -> list[str]:
    """Count modules by how they are packed, and name those left dense."""
    counts = Counter(facts.quantized.values()).most_common()
    rows = [(str(f.bits), str(f.group_size), f.mode, str(n)) for f, n in counts]
    lines = [markdown_table(("bits", "group size", "mode", "modules"), rows)] if rows else []
    if facts.skipped_modules:
        names = ", ".join(f"`{path}` ({width})" for path, width in facts.skipped_modules.items())
        lines.append(f"Left dense, for their widths part into no groups: {names}.")
    return lines


def list_checks(facts: CardData) -> list[str]:
    lines = [
        f"opened again after writing: {facts.num_tensors} tensors present, finite, of the right shape, "
        "their bytes as computed"
    ]
    if facts.output_check is not None:
        lines.append(
            f"one made-up question run through source and copy: KL {facts.output_check.kl:.5f} nats"
        )
    if facts.quality is not None:
        lines.append(quality_line(facts.quality))
    return lines


def quality_line(figures: QualityMetrics) -> str:
    return (
        f"against the 16-bit model over {figures.tokens} tokens: KL {figures.kl:.5f} nats, "
        f"top-1 agreement {figures.top1:.1%}, "
        f"perplexity {figures.perplexity:.3f} (16-bit {figures.reference_perplexity:.3f})"
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def find_base_model(source: Path, content: Mapping[str, Any]) -> str:
    """Name the 16-bit repository: a hub snapshot's own, else one called like a published size."""
    for part in source.resolve().parts[::-1]:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    named = content.get("_name_or_path") or source.resolve().name
    match = re.search(r"InternVL3-\d+B[\w-]*", str(named))
    return f"{HUB_OWNER}/{match[0]}" if match else str(named).rsplit("/", maxsplit=1)[-1]
