"""LoRA adapters in PEFT's form, merged into the weights as a model is loaded.

``adapter_model.safetensors`` holds ``base_model.model.X.lora_A.weight`` (r, in) and ``lora_B``
(out, r) for modules X, named as the model it was trained on names them; ``adapter_config.json``
holds r and alpha. What is added, ``alpha / r * B A``, is a tensor like any other and takes the way
of the layout's rules: a native adapter fits an original checkpoint and the other way round.
"""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.convert.adapters import PART, both, read_settings, scale_of
from internvl3_mlx.convert.arrange import moved
from internvl3_mlx.convert.checkpoint import Checkpoint
from internvl3_mlx.convert.headers import read_header
from internvl3_mlx.convert.keymap import KeyMap, listed, normalize_name
from internvl3_mlx.errors import CheckpointError, KeyMapError, UserError

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
NAMINGS = ("original", "native")


def read_adapter(folder: Path, config: ModelConfig) -> dict[str, mx.array]:
    """Read what an adapter adds to our weights: name -> (out, in) float32, unevaluated.

    Raises when the folder is no adapter, changes nothing, or is not of an InternVL3 model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no folder at {folder}; an adapter is a folder that PEFT saved")
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"no {name} in {folder}; an adapter folder is what PEFT saves")
    tensors = {info.name: info for info in read_header(folder / WEIGHTS)}
    deltas = read_deltas(Checkpoint(folder, tensors), read_settings(folder))
    keymap = naming(deltas)
    deltas = with_siblings(deltas, keymap)
    return {
        target: part
        for move in keymap.moves(deltas)
        for target, part in moved({name: deltas[name] for name in move.sources}, move, config)
    }


def read_deltas(adapter: Checkpoint, settings: Mapping[str, object]) -> dict[str, mx.array]:
    """Multiply out each module's two factors: the name of its weight -> (out, in)."""
    sides: dict[str, dict[str, str]] = {}
    for name in adapter.tensors:
        match = PART.fullmatch(name)
        if match is None:
            raise KeyMapError(f"{name!r} is no LoRA factor; DoRA and saved modules must be merged")
        sides.setdefault(match["module"], {})[match["side"]] = name
    changes, deltas = False, {}
    for module, found in sides.items():
        down, up = (adapter.read(name).astype(mx.float32) for name in both(module, found))
        changes = changes or bool(mx.any(up != 0))
        deltas[f"{module}.weight"] = scale_of(module, settings) * (up @ down)
    if not changes:
        raise UserError(f"the adapter in {adapter.folder} changes nothing: all its B factors are 0")
    return deltas


def naming(deltas: Mapping[str, mx.array]) -> KeyMap:
    """Find the layout whose names an adapter bears."""
    faults = []
    for keymap in map(KeyMap, NAMINGS):
        try:
            for name in deltas:
                keymap.place(name)
            return keymap
        except KeyMapError as fault:
            faults.append(fault)
    raise KeyMapError(f"the adapter is not of an InternVL3 model: {faults[0]}")


def with_siblings(deltas: Mapping[str, mx.array], keymap: KeyMap) -> dict[str, mx.array]:
    """Add nothing, in so many zeros, to what is joined with a changed weight but unchanged itself.

    A native tower has q, k and v apart; adapted in one or two, they still become one matrix.
    """
    whole = {normalize_name(name): delta for name, delta in deltas.items()}
    for name, delta in list(whole.items()):
        entry, _, fill = keymap.place(name)
        whole = {fill(sibling): mx.zeros_like(delta) for sibling in entry.theirs} | whole
    return whole


def merged(weights: dict[str, mx.array], deltas: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Add an adapter's deltas; raise when it changes an absent weight or one of another shape."""
    if absent := deltas.keys() - weights.keys():
        raise KeyMapError(f"the adapter changes what this model lacks: {listed(absent)}")
    wrong = [
        f"{name} by {delta.shape}, it is {weights[name].shape}"
        for name, delta in deltas.items()
        if delta.shape != weights[name].shape
    ]
    if wrong:
        raise KeyMapError(f"the adapter is of another model: it changes {listed(wrong)}")
    added = {
        name: (weights[name].astype(mx.float32) + delta).astype(weights[name].dtype)
        for name, delta in deltas.items()
    }
    return weights | added
