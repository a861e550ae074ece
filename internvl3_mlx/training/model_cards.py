"""The cards of what a run trained: what it is, what it comes from, how to use it."""

from collections.abc import Mapping
from typing import Any

from internvl3_mlx.adapters.base_bits import DENSE_BITS, language_model_bits
from internvl3_mlx.convert.model_card import find_base_model, hub_link, read_license
from internvl3_mlx.json_files import read_optional_json
from internvl3_mlx.training.session import TrainSession

TAGS = ("internvl", "internvl3-mlx")


def base_model_id(session: TrainSession) -> str:
    """Return the hub's name of the model that was trained on; the user's name if it has none.

    PEFT looks the base model up by it, wherever the adapter is used.
    """
    folder = session.setup.model_folder
    found = find_base_model(folder, read_optional_json(folder / "config.json"))
    return found if "/" in found else session.setup.model_name


def adapter_card(session: TrainSession) -> str:
    """Return the text of an adapter's card."""
    config, base = session.config, base_model_id(session)
    kind = ("rs" if config.rslora else "") + ("DoRA" if config.dora else "LoRA")
    bits = language_model_bits(session.state.model)
    weights = "16-bit or 32-bit weights" if bits == DENSE_BITS else f"weights of {bits} bits"
    lora: Mapping[str, str] = {
        "layers": f"{len(session.adapted_layers)} layers: {', '.join(config.lora_keys)}",
        "rank, alpha": f"{config.lora_rank}, {config.lora_alpha:g}",
    }
    note = ""
    if bits != DENSE_BITS:
        note = f"Use it over weights of {bits} bits; over others its answers differ slightly.\n\n"
    return (
        f"{front_matter(session, library='peft', relation='adapter', tags=('lora', *TAGS))}"
        f"# {kind} adapter for {base}\n\n"
        f"A {kind} adapter for {hub_link(base)}, trained over {weights} with internvl3-mlx.\n\n"
        f"## Use\n\n```sh\ninternvl3 chat --model {base} --adapter-path PATH_OR_REPO\n```\n\n{note}"
        f"It is in PEFT's format, with the layer names of the published code.\n\n"
        f"{training_section(session, lora)}"
    )


def trained_model_card(session: TrainSession) -> str:
    """Return the text of the card of a model whose own weights were trained.

    What the card of the base model measured does not hold for it.
    """
    base = base_model_id(session)
    return (
        f"{front_matter(session, library='mlx', relation='finetune', tags=('mlx', *TAGS))}"
        f"# Fine-tuned {base}\n\n"
        f"{hub_link(base)}, fine-tuned with internvl3-mlx.\n\n"
        f"## Use\n\n```sh\ninternvl3 chat --model PATH_OR_REPO\n```\n\n"
        f"{training_section(session, {})}"
    )


def front_matter(
    session: TrainSession, *, library: str, relation: str, tags: tuple[str, ...]
) -> str:
    """Return the YAML front matter, with the base model's license."""
    import yaml

    fields: dict[str, Any] = {
        **read_license(session.setup.model_folder),
        "library_name": library,
        "pipeline_tag": "image-text-to-text",
        "base_model": base_model_id(session),
        "base_model_relation": relation,
        "tags": [*tags],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n\n"


def training_section(session: TrainSession, more: Mapping[str, str]) -> str:
    """Return a table of what was trained, and how far."""
    config, progress = session.config, session.progress
    facts = {
        "trained": f"{', '.join(config.train)} ({config.method})",
        **more,
        "updates": f"{session.state.update:,}",
    }
    if progress.best_loss is not None:
        best = f"{progress.best_loss:.4f} at update {progress.best_update:,}"
        facts["best validation loss"] = best
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"## Training\n\n| | |\n|---|---|\n{rows}\n"
