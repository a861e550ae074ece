"""The model card of a converted checkpoint: what it is, how to use it, what was checked."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl3_mlx.checkpoints.keymap import LANGUAGE_LAYOUT
from internvl3_mlx.checkpoints.reader import PART_NAMES
from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.metrics import OutputCheck, QualityMetrics, describe_quality
from internvl3_mlx.disk import format_bytes
from internvl3_mlx.prompt.tokenizer_files import read_optional_text

ROUTER_NAME = PART_NAMES["router"]
HUB_OWNER = "OpenGVLab"
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
LICENSE_KEYS = ("license", "license_name", "license_link")
TAGS = ("mlx", "internvl", "internvl3-mlx")


@dataclass(frozen=True, kw_only=True)
class CardData:
    """Everything that a model card says."""

    name: str
    base: str  # OWNER/NAME of the 16-bit model
    layout: str
    nbytes: int
    command: str  # the shell command or the Python call
    versions: Mapping[str, str]
    bits_per_part: Mapping[str, float]
    quantized: Mapping[str, Quantization]
    skipped_modules: Mapping[str, int]
    num_tensors: int
    unused_tensors: tuple[str, ...] = ()
    quality: QualityMetrics | None = None
    output_check: OutputCheck | None = None
    adapter: str | None = None  # name of the adapter that was merged


def write_model_card(folder: Path, card: CardData, license_fields: Mapping[str, Any]) -> str:
    """Write README.md and return its text."""
    text = model_card(card, license_fields)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def model_card(card: CardData, license_fields: Mapping[str, Any]) -> str:
    """Return the text of the model card."""
    return front_matter(card, license_fields) + card_body(card)


def read_license(folder: Path) -> dict[str, Any]:
    """Read the license fields of the source's own card."""
    import yaml

    match = FRONT_MATTER.match(read_optional_text(folder / "README.md") or "")
    try:
        content = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        content = {}
    return {key: content[key] for key in LICENSE_KEYS if key in (content or {})}


def front_matter(card: CardData, license_fields: Mapping[str, Any]) -> str:
    """Write the YAML front matter. The hub sorts by relation; none of its values fits a 16-bit
    copy."""
    import yaml

    content: dict[str, Any] = dict(license_fields)
    content["library_name"] = "transformers" if card.layout in ("original", "hf") else "mlx"
    is_text = card.layout == LANGUAGE_LAYOUT
    content["pipeline_tag"] = "text-generation" if is_text else "image-text-to-text"
    content["base_model"] = card.base
    if card.quantized:
        content["base_model_relation"] = "quantized"
    tags = TAGS if content["library_name"] == "mlx" else TAGS[1:]
    content["tags"] = [*tags, *bits_tag(card.quantized)]
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return f"---\n{text}---\n\n"


def bits_tag(quantized: Mapping[str, Quantization]) -> list[str]:
    """Return the tag of the most common bit width: 4-bit."""
    if not quantized:
        return []
    [(quantization, _)] = Counter(quantized.values()).most_common(1)
    return [f"{quantization.bits}-bit"]


def card_body(card: CardData) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in card.versions.items())
    language = "sh" if card.command.startswith("internvl3 ") else "python"
    parts = [
        f"# {card.name}",
        f"{part_note(card)}{hub_link(card.base)}{adapter_note(card)}, converted with "
        "internvl3-mlx.",
        *usage_section(card),
        "## Size",
        markdown_table(
            ("part", "bits per parameter"),
            [(p, f"{b:.2f}") for p, b in card.bits_per_part.items()],
        ),
        f"The weights take {format_bytes(card.nbytes)} on disk and in memory.",
        *quantization_section(card),
        "## What was checked",
        "\n".join(f"- {line}" for line in list_checks(card)),
        "## How it was made",
        f"```{language}\n{card.command}\n```\n\nVersions: {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def part_note(card: CardData) -> str:
    return "The language model alone of " if card.layout == LANGUAGE_LAYOUT else ""


def adapter_note(card: CardData) -> str:
    return f" with the adapter `{card.adapter}` merged" if card.adapter else ""


def hub_link(base: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if "/" in base else base


def usage_section(card: CardData) -> list[str]:
    commands = {
        "mlx": f"internvl3 generate photo.jpg -p 'What is this?' --model {card.name}",
        LANGUAGE_LAYOUT: f"mlx_lm.generate --model {card.name} --prompt 'What is rain?'",
    }
    if card.layout not in commands:
        return []
    return ["## Use", f"```sh\n{commands[card.layout]}\n```"]


def quantization_section(card: CardData) -> list[str]:
    """List the quantizations with their modules, and the modules that could not be quantized."""
    counts = Counter(card.quantized.values()).most_common()
    rows = [(str(q.bits), str(q.group_size), q.mode, str(n)) for q, n in counts]
    lines = [markdown_table(("bits", "group size", "mode", "modules"), rows)] if rows else []
    if card.skipped_modules:
        names = ", ".join(f"`{path}` ({width})" for path, width in card.skipped_modules.items())
        lines.append(
            f"Not quantized, because their width is not a multiple of the group size: {names}."
        )
    if card.quantized and ROUTER_NAME in card.bits_per_part:
        lines.append("The visual resolution router is not quantized: its decisions stay exact.")
    if card.unused_tensors:
        lines.append(
            f"Left out: {len(card.unused_tensors)} tensors that the original stores and never "
            f"uses, from `{card.unused_tensors[0]}` to `{card.unused_tensors[-1]}`."
        )
    return lines


def list_checks(card: CardData) -> list[str]:
    lines = [
        f"read back after writing: all {card.num_tensors} tensors are present and finite, with the "
        "right shapes and the bytes that were computed"
    ]
    if card.output_check is not None:
        lines.append(
            f"one generated question, source against result: KL divergence "
            f"{card.output_check.kl:.5f} nats"
        )
        lines.append(f"a passage of English: {describe_quality(card.output_check.text)}")
    if card.quality is not None:
        lines.append(quality_line(card.quality))
    return lines


def quality_line(quality: QualityMetrics) -> str:
    return (
        f"against the 16-bit model over {quality.tokens} tokens: "
        f"KL divergence {quality.kl:.5f} nats, "
        f"top-1 agreement {quality.top1:.1%}, "
        f"perplexity {quality.perplexity:.3f} (16-bit {quality.reference_perplexity:.3f})"
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def find_base_model(source: Path, content: Mapping[str, Any]) -> str:
    """Name the 16-bit repository: that of a hub snapshot, else the published size in its name."""
    for part in source.resolve().parts[::-1]:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    named = content.get("_name_or_path") or source.resolve().name
    match = re.search(r"InternVL3(?:_5)?-(?:GPT-OSS-)?\d+B[\w-]*", str(named))
    return f"{HUB_OWNER}/{match[0]}" if match else str(named).rsplit("/", maxsplit=1)[-1]
