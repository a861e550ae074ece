"""Activation-aware scaling: channels that carry much are made larger before packing and smaller
where they come from, so that rounding falls on those that carry little (AWQ, Lin et al. 2023).

Scales fold into what stands before: norms, or the rows of the projection that made the channel.
Nothing is computed at run time, and without packing the model's answers stay what they were.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from internvl3_mlx.config import Quantization
from internvl3_mlx.convert.calibration.bit_allocation import embed_sample, fake_quantize
from internvl3_mlx.convert.calibration.data import CalibrationSample
from internvl3_mlx.models.internvl import InternVL

EXPONENTS = tuple(step / 10 for step in range(11))  # of the activations' means; 0: no scaling
TRIAL_FORM = Quantization(4, 64)  # what the search packs with
TRIAL_ROWS = 256  # inputs of a layer that the search multiplies with
CHANGED = re.compile(r"norm\w*\.(weight|bias)$|v_proj\.bias$")
LEAST = 1e-4  # a channel that is never used is not scaled up without end


class InputRecorder(nn.Module):
    """Stands in for a linear layer and keeps what it is given."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._layer = layer
        self._seen: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self._seen.append(x.reshape(-1, x.shape[-1]).astype(mx.float32))
        return self._layer(x)

    def inputs(self) -> mx.array:
        """(rows, in) of all that was seen."""
        return mx.concatenate(self._seen, axis=0)


@dataclass(frozen=True)
class Joint:
    """Linears that read the same channels, and what makes those.

    ``sources`` are (owner, key) of the tensors whose rows are divided. ``repeats``: the channels
    come in so many copies, by heads of ``dim``.
    """

    owner: Any
    linears: tuple[str, ...]
    sources: tuple[tuple[Any, str], ...]
    repeats: int = 1
    dim: int = 0


def smooth(
    model: InternVL, samples: Sequence[CalibrationSample], *, tower: bool = False
) -> Iterator[str]:
    """Scale the language model's layers in place, and the tower's; yield what was done."""
    if tower:
        for number, block in enumerate(model.vision_model.encoder.layers):
            joints = tower_joints(block)
            record_and_scale(joints, lambda: [see(model, sample) for sample in samples])
            yield f"vision_model.encoder.layers.{number}"
    language = model.language_model
    rows = [embed_sample(model, sample) for sample in samples]
    for number, layer in enumerate(language.model.layers):
        joints = decoder_joints(layer)

        def forward(layer: nn.Module = layer, rows: list[mx.array] = rows) -> list[mx.array]:
            return [
                layer(x, language.rotary(0, len(sample.token_ids)), None)
                for x, sample in zip(rows, samples, strict=True)
            ]

        rows = record_and_scale(joints, forward)
        yield f"language_model.model.layers.{number}"


def see(model: InternVL, sample: CalibrationSample) -> mx.array:
    assert sample.tiles is not None
    return model.get_image_features(mx.array(sample.tiles))


def decoder_joints(layer: Any) -> list[Joint]:
    attention, mlp = layer.self_attn, layer.mlp
    shared = attention.heads // attention.kv_heads
    values = tuple((attention.v_proj, key) for key in ("weight", "bias") if key in attention.v_proj)
    return [
        Joint(attention, ("q_proj", "k_proj", "v_proj"), norm_parts(layer.input_layernorm)),
        Joint(attention, ("o_proj",), values, shared, attention.head_dim),
        Joint(mlp, ("gate_proj", "up_proj"), norm_parts(layer.post_attention_layernorm)),
        Joint(mlp, ("down_proj",), ((mlp.up_proj, "weight"),)),
    ]


def tower_joints(block: Any) -> list[Joint]:
    return [
        Joint(block.attn, ("qkv",), norm_parts(block.norm1)),
        Joint(block.mlp, ("fc1",), norm_parts(block.norm2)),
    ]


def norm_parts(norm: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    return tuple((norm, key) for key in ("weight", "bias") if key in norm)


def record_and_scale(joints: Sequence[Joint], forward: Any) -> list[mx.array]:
    """Watch a layer's inputs during one pass, then scale its joints; return what it gave."""
    recorders = []
    for joint in joints:
        recorder = InputRecorder(joint.owner[joint.linears[0]])
        joint.owner[joint.linears[0]] = recorder
        recorders.append(recorder)
    given: list[mx.array] = forward()
    mx.eval(given)
    for joint, recorder in zip(joints, recorders, strict=True):
        joint.owner[joint.linears[0]] = recorder._layer
    for joint, recorder in zip(joints, recorders, strict=True):
        scale(joint, recorder.inputs())
    return given


def scale(joint: Joint, inputs: mx.array) -> None:
    """Find the best scale of a joint and fold it in."""
    strength = mx.maximum(mx.abs(inputs).mean(axis=0), LEAST)
    if joint.repeats > 1:
        strength = strength.reshape(-1, joint.repeats, joint.dim).mean(axis=1).reshape(-1)
    layers = [joint.owner[name] for name in joint.linears]
    step = max(inputs.shape[0] // TRIAL_ROWS, 1)
    factor = best_scale(layers, inputs[::step][:TRIAL_ROWS], strength, joint)
    wide = spread(factor, joint)
    for layer in layers:
        layer.weight = (layer.weight * wide).astype(layer.weight.dtype)
    for owner, key in joint.sources:
        by = factor[:, None] if owner[key].ndim > 1 else factor
        owner[key] = (owner[key] / by).astype(owner[key].dtype)
    mx.eval([layer.weight for layer in layers], [owner[key] for owner, key in joint.sources])


def best_scale(
    layers: Sequence[Any], inputs: mx.array, strength: mx.array, joint: Joint
) -> mx.array:
    """Try powers of the channels' strength; keep the one whose packed output errs least."""
    best, least = mx.ones_like(strength), float("inf")
    if layers[0].weight.shape[1] % TRIAL_FORM.group_size:
        return best
    wanted = [inputs @ layer.weight.T for layer in layers]
    for exponent in EXPONENTS:
        factor = strength**exponent
        factor = factor / mx.sqrt(factor.max() * factor.min())
        wide = spread(factor, joint)
        error = sum(
            float(
                (
                    ((inputs / wide) @ fake_quantize(layer.weight * wide, TRIAL_FORM).T - y) ** 2
                ).sum()
            )
            for layer, y in zip(layers, wanted, strict=True)
        )
        if error < least:
            best, least = factor, error
    return best


def changed_tensors(model: InternVL, dtype: mx.Dtype, *, tower: bool) -> dict[str, mx.array]:
    """Collect what scaling changes beside the packed weights: norms and biases of the layers."""
    parts: list[tuple[str, Any]] = [
        ("language_model.model.layers", model.language_model.model.layers)
    ]
    if tower:
        parts.append(("vision_model.encoder.layers", model.vision_model.encoder.layers))
    return {
        f"{prefix}.{number}.{name}": x.astype(dtype)
        for prefix, layers in parts
        for number, layer in enumerate(layers)
        for name, x in dict(tree_flatten(layer.parameters())).items()
        if CHANGED.search(name)
    }


def spread(factor: mx.array, joint: Joint) -> mx.array:
    """Repeat a key-value head's scales for the query heads that share it."""
    if joint.repeats == 1:
        return factor
    heads = factor.reshape(-1, 1, joint.dim)
    return mx.broadcast_to(heads, (heads.shape[0], joint.repeats, joint.dim)).reshape(-1)
