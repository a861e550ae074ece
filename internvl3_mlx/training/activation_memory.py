"""Bytes that a forward and backward pass keep at one time, counted from the shapes of a model.

MLX keeps an intermediate result until the last operation that needs it has run. What a gradient
needs is known: a product the input of a trained weight, a norm its input, softmax and sigmoid their
output. These sums per token and layer are exact to a few percent. On top comes what the busiest
operation holds for a moment; its factors were measured on MLX's CPU back end.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.device import on_gpu
from internvl3_mlx.models.chunked_attention import ROWS_PER_CHUNK
from internvl3_mlx.models.decoder import Block
from internvl3_mlx.models.experts import MixtureOfExperts
from internvl3_mlx.models.internvl import InternVL, tiles_per_chunk
from internvl3_mlx.models.lora import LoRALinear, linear_shape
from internvl3_mlx.models.vision import Block as VisionBlock
from internvl3_mlx.training.grad_checkpoint import is_trainable
from internvl3_mlx.training.params import named_arrays
from internvl3_mlx.training.token_log_probs import states_per_chunk

FLOAT32 = 4
ATTENTION_COPIES = 5.0  # of the scores of one chunk, in the backward pass
ATTENTION_AHEAD = 0.7  # more for each further chunk, since results are allocated ahead
MAX_ATTENTION_COPIES = 8.0
MLP_COPIES = 4.0  # of the widest state of a block, in the backward pass
HEAD_COPIES, HEAD_AHEAD = 8.4, 0.32  # of one chunk of logits; more for each further chunk
MAX_HEAD_COPIES = 14.0
RECOMPUTED_BLOCKS = 3  # at least so many at a time, since results are allocated ahead
TOWER_COPIES = 3.0  # of the scores of one tile, outside gradients


@dataclass(frozen=True)
class BatchShape:
    """The largest micro-batch: tokens in all, of its longest sample, in the loss; and tiles.

    scores: of attention that one chunk of every sample's rows has, for one head. The samples are
    independent of each other, so MLX works on all of them at a time.
    """

    tokens: int
    longest: int
    targets: int
    tiles: int
    scores: int


def activation_bytes(
    model: InternVL, shape: BatchShape, *, dropout: float, grad_checkpoint: bool
) -> int:
    """Return the peak of what a micro-step holds beside the weights, new gradients included."""
    layers = model.language_model.model.layers
    width = element_bytes(model)
    blocks = layers[first_trained_layer(model) :]
    rows = [shape.tokens] * (len(blocks) - 1) + [min(shape.targets, shape.tokens)]
    kept = [
        decoder_block_bytes(block, shape.tokens, count, width, dropout)
        for block, count in zip(blocks, rows, strict=False)
    ]
    recomputed = 0
    if grad_checkpoint:
        recomputed = max(kept, default=0)
        kept = [shape.tokens * width * model.config.text.hidden_size] * len(blocks)
    gradients = [gradient_bytes(block) for block in blocks]
    tower = tower_bytes(model, shape.tiles, width, dropout, grad_checkpoint=grad_checkpoint)
    busiest = max(
        attention_bytes(model.config, shape),
        MLP_COPIES * FLOAT32 * model.config.text.intermediate_size * shape.tokens,
        head_bytes(model, shape.targets),
    )
    encoding = 0.0 if is_trainable(model.vision_model) else encoding_bytes(model, shape.tiles)
    busiest = max(recomputed + busiest, RECOMPUTED_BLOCKS * recomputed)
    backward = tower + most_at_once(kept, gradients) + busiest
    return round(max(backward, encoding))


def most_at_once(kept: list[int], gradients: list[int]) -> int:
    """Return the most that is held at one time by what layers keep and the gradients they give.

    The backward pass frees the one from the last layer on while it adds the other.
    """
    most, held, added = 0, sum(kept), 0
    for own, gradient in zip(reversed(kept), reversed(gradients), strict=True):
        added += gradient
        most = max(most, held + added)
        held -= own
    return most


def gradient_bytes(module: nn.Module) -> int:
    """Return the size of the gradients of a module."""
    return array_bytes(x for _, x in named_arrays(module.trainable_parameters()))


def element_bytes(model: InternVL) -> int:
    """Return the bytes of one number of the compute dtype."""
    return int(model.language_model.model.norm.weight.dtype.size)


def first_trained_layer(model: InternVL) -> int:
    """Return the first decoder layer that gradients reach: all, if what comes before is trained."""
    layers = model.language_model.model.layers
    before = (model.vision_model, *model.mlp1, model.language_model.model.embed_tokens)
    if any(map(is_trainable, before)):
        return 0
    return next((i for i, block in enumerate(layers) if is_trainable(block)), len(layers))


def decoder_block_bytes(block: Block, tokens: int, rows: int, width: int, dropout: float) -> int:
    """Return what a decoder block keeps. rows: of the tokens, those that leave its attention."""
    attention = block.self_attn
    hidden = linear_shape(base_of(attention.o_proj))[0]
    inner, linears = mlp_linears(block)
    heads = linear_shape(base_of(attention.q_proj))[0]
    keys = linear_shape(base_of(attention.k_proj))[0]
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    per_token = width * (hidden + heads + 2 * keys) + inputs_bytes(qkv, width, dropout)
    per_row = width * hidden + 2 * (FLOAT32 + width) * inner
    for group in ((attention.o_proj,), *linears):
        per_row += inputs_bytes(group, width, dropout)
    return tokens * per_token + rows * per_row


def mlp_linears(block: Block) -> tuple[int, tuple[tuple[nn.Module, ...], ...]]:
    """Return the width of a block's MLP and its layers, grouped by what they read.

    Of experts: the width of those that a token goes through together, and no layers, since these
    have no adapters.
    """
    mlp = block.mlp
    if isinstance(mlp, MixtureOfExperts):
        return mlp.config.per_token * mlp.config.intermediate_size, ()
    inner = linear_shape(base_of(mlp.down_proj))[1]
    return inner, ((mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))


def base_of(layer: nn.Module) -> nn.Module:
    """Return a linear layer without its adapter."""
    return layer.base if isinstance(layer, LoRALinear) else layer


def inputs_bytes(layers: Iterable[nn.Module], width: int, dropout: float) -> int:
    """Return what trained linear layers that read the same input keep of it, per token."""
    total, shared = 0, 0
    for layer in layers:
        if not is_trainable(layer):
            continue
        out, inside = linear_shape(base_of(layer))
        if isinstance(layer, LoRALinear):
            total += FLOAT32 * int(layer.lora_A.shape[0])
            if "lora_magnitude_vector" in layer:
                total += 2 * FLOAT32 * out
            if dropout:
                total += (width + 1) * inside  # the input after dropout, and the mask
                continue
        shared = width * inside
    return total + shared


def chunk_scores(lengths: Iterable[int]) -> int:
    """Return the scores of one chunk of rows of every sample."""
    return sum(min(length, ROWS_PER_CHUNK) * length for length in lengths)


def attention_bytes(config: ModelConfig, shape: BatchShape) -> float:
    """Return what the backward pass of a batch's attention holds for a moment."""
    text = config.text
    chunks = -(-shape.longest // ROWS_PER_CHUNK)
    copies = min(ATTENTION_COPIES + ATTENTION_AHEAD * (chunks - 1), MAX_ATTENTION_COPIES)
    scores = FLOAT32 * text.num_attention_heads * shape.scores
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    states = heads * text.head_dim * shape.longest
    return copies * scores + 3 * FLOAT32 * states


def head_bytes(model: InternVL, targets: int) -> float:
    """Return what the head and its backward pass hold for a moment."""
    text = model.config.text
    logits = FLOAT32 * min(targets, states_per_chunk()) * text.vocab_size
    chunks = -(-targets // states_per_chunk())
    copies = min(HEAD_COPIES + HEAD_AHEAD * chunks, MAX_HEAD_COPIES)
    return copies * logits + 2 * FLOAT32 * targets * text.hidden_size


def tower_bytes(
    model: InternVL, tiles: int, width: int, dropout: float, *, grad_checkpoint: bool
) -> int:
    """Return what a trained vision tower keeps of all tiles, and nothing for a frozen one."""
    vision, config = model.config.vision, model.config
    rows = tiles * (vision.grid**2 + 1)
    merged = vision.hidden_size * config.shuffle_factor**2
    projector = 0
    if is_trainable(model.vision_model) or any(map(is_trainable, model.mlp1)):
        tokens = tiles * config.num_image_token
        projector = tokens * (2 * width * merged + 4 * FLOAT32 * config.text.hidden_size)
    if not is_trainable(model.vision_model):
        return projector
    blocks = model.vision_model.encoder.layers
    first = next((i for i, block in enumerate(blocks) if is_trainable(block)), 0)
    kept = [rows * vision_block_bytes(block, width, dropout) for block in blocks[first:]]
    if grad_checkpoint:
        kept = [len(kept) * rows * width * vision.hidden_size, max(kept, default=0)]
    scores = FLOAT32 * vision.num_attention_heads * min(rows // max(tiles, 1), ROWS_PER_CHUNK)
    return projector + sum(kept) + round(ATTENTION_COPIES * scores * tiles_rows(model))


def tiles_rows(model: InternVL) -> int:
    """Return the rows of the tiles that the tower reads at a time."""
    return tiles_per_chunk() * (model.config.vision.grid**2 + 1)


def vision_block_bytes(block: VisionBlock, width: int, dropout: float) -> int:
    """Return what a block of the vision tower keeps per row."""
    inner, hidden = linear_shape(base_of(block.mlp.fc1))
    kept = width * (2 + 3 + 2) * hidden  # inputs of the norms; q, k, v; the scaled branches
    kept += 4 * FLOAT32 * inner  # GELU, in float32
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        kept += inputs_bytes((layer,), width, dropout)
    return kept


def encoding_bytes(model: InternVL, tiles: int) -> float:
    """Return what a frozen tower holds while it encodes some tiles at a time."""
    if not tiles:
        return 0.0
    vision, rows = model.config.vision, tiles_rows(model)
    per_tile = vision.grid**2 + 1
    scores = 0 if on_gpu() else FLOAT32 * vision.num_attention_heads * rows * per_tile
    states = FLOAT32 * rows * (4 * vision.intermediate_size + 6 * vision.hidden_size)
    return TOWER_COPIES * scores + states


def array_bytes(arrays: Iterable[mx.array]) -> int:
    """Sum the sizes of arrays, which need not have been computed."""
    return sum(int(x.nbytes) for x in arrays)
