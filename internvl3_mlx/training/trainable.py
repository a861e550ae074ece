"""Which layers get adapters and which parameters are trained, by names, presets and patterns."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.config import WORD_BITS
from internvl3_mlx.errors import UserError
from internvl3_mlx.files import did_you_mean
from internvl3_mlx.models.experts import ExpertLinear, QuantizedExpertLinear
from internvl3_mlx.models.internvl import InternVL
from internvl3_mlx.models.lora import LoRALinear

DECODER_LAYERS, VISION_LAYERS = "language_model.model.layers.*.", "vision_model.encoder.layers.*."
LANGUAGE = (
    *(DECODER_LAYERS + f"self_attn.{p}_proj" for p in "qkvo"),
    *(DECODER_LAYERS + f"mlp.{p}_proj" for p in ("gate", "up", "down")),
)
VISION = (
    *(VISION_LAYERS + f"attn.{p}" for p in ("qkv", "proj")),
    *(VISION_LAYERS + f"mlp.fc{i}" for i in (1, 2)),
)
PROJECTOR = ("mlp1.1", "mlp1.3")
# what --lora-keys accepts besides names; InternVL's own training adapts "language" and "vision"
PRESETS = {
    "language": LANGUAGE,
    "vision": VISION,
    "projector": PROJECTOR,
    "all": (*LANGUAGE, *VISION, *PROJECTOR),
}
LAYER = re.compile(r"^(language_model\.model|vision_model\.encoder)\.layers\.(\d+)\.")
LM_HEAD = "lm_head"
LORA = "lora"
LORA_NAMES = ("lora_A", "lora_B", "lora_magnitude_vector")
PARTS = ("language_model", "mlp1", "vision_model", LM_HEAD)
# what a preset of lora_keys is called where all weights are trained
WHOLE_PARTS = {
    "language": "language_model",
    "vision": "vision_model",
    "projector": "mlp1",
    "all": "vision_model,mlp1,language_model",
}
# of a Flash model: trained with a schedule of its own (ViCO), which this package does not have
UNTRAINED = ("mlp2", "pooling_before_gating", "gating")
EXPERTS = (ExpertLinear, QuantizedExpertLinear)
ROUTER = re.compile(r"\.mlp\.(?:gate|router)$")  # of experts: who goes where stays as it was
LINEAR = (nn.Linear, nn.QuantizedLinear)
SAVED_WHOLE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)  # PEFT's modules_to_save
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)
SUGGESTIONS = 3  # similar names in an error


def select_layers(
    model: InternVL, keys: Sequence[str], layers: int | None, vision_layers: int | None
) -> tuple[str, ...]:
    """List the linear layers that any of the keys selects, in the model's order.

    A key is a preset, or one or more whole components of a layer name ("q_proj", "mlp1",
    "layers.3"), which may contain an asterisk. layers, vision_layers: only the last so many of the
    decoder and of the vision tower. Raises UserError for a key that selects nothing.
    """
    check_layer_count("num_layers", layers, model.config.text.num_hidden_layers)
    check_layer_count("vision_layers", vision_layers, model.config.vision.num_hidden_layers)
    modules = dict(model.named_modules())
    if any(isinstance(module, LoRALinear) for module in modules.values()):
        raise UserError("the model already has adapters; reload it to add adapters to other layers")
    linear = [path for path, module in modules.items() if isinstance(module, LINEAR)][::-1]
    linear = [path for path in linear if not (is_untrained(path) or ROUTER.search(path))]
    candidates = [path for path in linear if in_last_layers(model, path, layers, vision_layers)]
    experts = [path for path, module in modules.items() if isinstance(module, EXPERTS)]
    selected: set[str] = set()
    for key in keys:
        if key not in PRESETS and any(matches_key(key, path) for path in experts):
            raise UserError(
                f"LoRA key {key!r} names experts ({experts[-1]} ...), which cannot have adapters; "
                "name the layers of attention (language) instead"
            )
        found = [path for path in candidates if key_selects(key, path)]
        if not found:
            raise UserError(unmatched_key_message(key, linear))
        selected.update(found)
    if vision_layers is not None and not any(path.startswith("vision_model.") for path in selected):
        raise UserError(
            f"vision_layers is {vision_layers}, but no layer of the vision encoder is adapted; add "
            "vision to lora_keys, or drop it"
        )
    return tuple(sorted(selected, key=linear.index))


def is_untrained(name: str) -> bool:
    """Tell whether a module or parameter belongs to the router, or to its projector."""
    return name.split(".", 1)[0] in UNTRAINED


def check_layer_count(name: str, asked: int | None, there_are: int) -> None:
    """Raise UserError for more layers than there are."""
    if asked is not None and asked > there_are:
        raise UserError(f"{name} is {asked}, but this model has {there_are} such layers")


def key_selects(key: str, path: str) -> bool:
    """Tell whether a key selects a layer; the head is selected only by its own name."""
    return matches_key(key, path) and (not path.endswith(LM_HEAD) or key.endswith(LM_HEAD))


def in_last_layers(
    model: InternVL, path: str, layers: int | None, vision_layers: int | None
) -> bool:
    """Tell whether a layer is among the last so many of its tower; others always are."""
    match = LAYER.match(path)
    if match is None:
        return True
    is_text = match[1].startswith("language")
    limit = layers if is_text else vision_layers
    config = model.config.text if is_text else model.config.vision
    return limit is None or int(match[2]) >= config.num_hidden_layers - limit


def matches_key(key: str, path: str) -> bool:
    """Tell whether a preset, or whole components of a name with wildcards, match a path."""
    patterns = PRESETS.get(key, (key,))
    forms = (form for p in patterns for form in (p, f"*.{p}", f"{p}.*", f"*.{p}.*"))
    return any(fnmatchcase(path, form) for form in forms)


def unmatched_key_message(key: str, paths: Iterable[str]) -> str:
    """Say that a key selects no layer, with similar names or the presets."""
    names = {path.rsplit(".", 1)[-1] for path in paths} | {*PRESETS}
    presets = f"presets are {', '.join(PRESETS)}"
    hint = did_you_mean(key.rsplit(".", 1)[-1], sorted(names), otherwise=presets, limit=SUGGESTIONS)
    return f"LoRA key {key!r} matches no linear layer of this model; {hint}"


def set_trainable(model: InternVL, parts: Sequence[str]) -> None:
    """Train ``parts`` and nothing else: "lora", a part of the model, or patterns over its names.

    Raises UserError for a part that does not exist, is quantized, or cannot be saved with adapters.
    """
    model.freeze()
    for part in parts:
        unfreeze_part(model, part)
    if LORA in parts:
        modules_to_save(model)
    set_train_mode(model)


def unfreeze_part(model: InternVL, part: str) -> None:
    """Make the parameters of a part trainable."""
    if whole := WHOLE_PARTS.get(part):
        raise UserError(
            f"{part} names layers that get adapters (lora_keys); to train all weights of that "
            f"part, pass {whole} in train"
        )
    modules = dict(model.named_modules())
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    names = [name for name in parameters if belongs_to_part(part, name)]
    if not names:
        raise UserError(unmatched_part_message(model, part))
    for name in names:
        path, key = name.rpartition(".")[::2]
        if isinstance(modules[path], QUANTIZED):
            raise UserError(
                f"{part} cannot be trained in full: {path} is quantized; "
                "train adapters instead, or use the 16-bit checkpoint"
            )
        modules[path].unfreeze(recurse=False, keys=[key])


def belongs_to_part(part: str, name: str) -> bool:
    """Tell whether a parameter belongs to a part. The weight under an adapter stays frozen."""
    is_lora = name.rsplit(".", 1)[-1] in LORA_NAMES
    if part == LORA or is_lora:
        return part == LORA and is_lora
    return ".base." not in name and not is_untrained(name) and matches_key(part, name)


def unmatched_part_message(model: InternVL, part: str) -> str:
    """Say that a part has no parameters, with similar names or the known parts."""
    if part == LORA:
        return "the model has no adapters to train; add them first with add_lora"
    if part == LM_HEAD:
        return (
            "this model has no separate lm_head: its head is the embedding; "
            "train language_model.model.embed_tokens instead"
        )
    if is_untrained(part) and model.has_router:
        return (
            f"{part} of a Flash model is not trained here: tiles are trained on in their full "
            "form; train language_model or adapters"
        )
    names = {step for path, _ in model.named_modules() for step in path.split(".")} | {*PARTS}
    known = f"parts are {', '.join((LORA, *PARTS))}"
    hint = did_you_mean(part.rsplit(".", 1)[-1], sorted(names), otherwise=known, limit=SUGGESTIONS)
    return f"{part!r} matches no trainable parameters; {hint}"


def modules_to_save(model: InternVL) -> dict[str, mx.array]:
    """Return all tensors of the modules trained in full next to adapters, as PEFT saves them.

    Raises UserError for a trained parameter outside a module that PEFT can save.
    """
    modules = dict(model.named_modules())
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    found: dict[str, mx.array] = {}
    for name in trained:
        path = name.rpartition(".")[0]
        module = modules[path]
        if isinstance(module, LoRALinear):
            continue
        if not isinstance(module, SAVED_WHOLE):
            raise UserError(
                f"{name} cannot be trained together with adapters, because PEFT has no way to "
                "save it; train layers and norms, or whole parts without adapters"
            )
        found |= {f"{path}.{key}": x for key, x in module.items() if isinstance(x, mx.array)}
    return found


def set_train_mode(model: nn.Module) -> None:
    """Put trainable modules and their parents into training mode, all others into evaluation mode.

    A frozen vision tower thus has no stochastic depth. Call it again after an evaluation.
    """
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    training = {path for name in trained for path in parent_paths(name)}
    restore_modes((module, path in training) for path, module in model.named_modules())


def parent_paths(name: str) -> Iterator[str]:
    """Yield the paths of all modules that contain a parameter: "a.b.weight" -> "", "a", "a.b"."""
    steps = name.split(".")
    return (".".join(steps[:count]) for count in range(len(steps)))


def restore_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put modules into training or evaluation mode; parents must come before their children."""
    for module, training in modes:
        if module.training is not training:  # a parent may have changed it already
            module.train(training)


@dataclass(frozen=True)
class ParameterCounts:
    """The number of parameters of a model, and of those that are trained."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count parameters; a quantized weight counts as the weight it encodes, without its scales."""
    trained: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    total = sum(count for _, count in parameter_counts(model))
    return ParameterCounts(sum(value.size for value in trained.values()), total)


def parameter_counts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the name of each array of a model, and how many parameters it stands for."""
    for path, module in model.named_modules():
        for key, value in module.items():
            if isinstance(value, mx.array) and not key.startswith("_"):
                yield f"{path}.{key}", parameter_count(module, key, value)


def parameter_count(module: nn.Module, key: str, value: mx.array) -> int:
    """Count the parameters of one array of a module."""
    if not isinstance(module, QUANTIZED) or key == "bias":
        return value.size
    return value.size * WORD_BITS // module.bits if key == "weight" else 0
