"""The model card of an adapter folder: what it is, what it belongs to, how to use it."""

from collections.abc import Mapping
from typing import Any

from internvl3_mlx.adapters.base_bits import DENSE_BITS, language_model_bits
from internvl3_mlx.convert.model_card import find_base_model, hub_link, read_license
from internvl3_mlx.json_files import read_optional_json
from internvl3_mlx.training.session import TrainSession

TAGS = ("lora", "internvl", "internvl3-mlx")


def base_model_id(session: TrainSession) -> str:
    """Return the hub's name of the model that was trained on; the user's name if it has none.

    PEFT looks the base model up by it, wherever the adapter is used.
    """
    folder = session.setup.model_folder
    found = find_base_model(folder, read_optional_json(folder / "config.json"))
    return found if "/" in found else session.setup.model_name


def adapter_card(session: TrainSession) -> str:
    """Return the text of the card."""
    import yaml

    config, base = session.config, base_model_id(session)
    front: dict[str, Any] = {
        **read_license(session.setup.model_folder),
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "base_model": base,
        "base_model_relation": "adapter",
        "tags": [*TAGS],
    }
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    kind = ("rs" if config.rslora else "") + ("DoRA" if config.dora else "LoRA")
    bits = language_model_bits(session.state.model)
    weights = "16-bit or 32-bit weights" if bits == DENSE_BITS else f"weights of {bits} bits"
    facts: Mapping[str, Any] = {
        "trained": f"{', '.join(config.train)} ({config.method})",
        "layers": f"{len(session.adapted_layers)} layers: {', '.join(config.lora_keys)}",
        "rank, alpha": f"{config.lora_rank}, {config.lora_alpha:g}",
        "updates": f"{session.state.update:,}",
        "best validation loss": ""
        if session.progress.best_loss is None
        else f"{session.progress.best_loss:.4f} at update {session.progress.best_update:,}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)
    note = ""
    if bits != DENSE_BITS:
        note = f"Use it over weights of {bits} bits; over others its answers differ slightly.\n\n"
    return (
        f"---\n{header}---\n\n# {kind} adapter for {base}\n\n"
        f"A {kind} adapter for {hub_link(base)}, trained over {weights} with internvl3-mlx.\n\n"
        f"## Use\n\n```sh\ninternvl3 chat --model {base} --adapter-path PATH_OR_REPO\n```\n\n{note}"
        f"It is in PEFT's format, with the layer names of the published code.\n\n"
        f"## Training\n\n| | |\n|---|---|\n{rows}\n"
    )
