"""Check that mlx-vlm loads what we write: compare its logits of our files with ours, and our
tensors with its own conversion of the same checkpoint.

    python -m benchmarks.peer_reads

Prints one line for each recipe and ends with an error when a logit is off.
"""

import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from benchmarks.checkpoint import Shape, write_checkpoint
from benchmarks.vocabulary import FEW_MERGES
from internvl3_mlx.checkpoints.build_model import build_model
from internvl3_mlx.convert.pipeline import convert_checkpoint
from internvl3_mlx.convert.recipes import QuantizationRecipe, mixed_recipe, uniform_recipe

SHAPE = Shape(vision_width=128, vision_layers=2, text_width=256, text_layers=8, merges=FEW_MERGES)
RECIPES: dict[str, QuantizationRecipe | None] = {
    "16bit": None,
    **{f"{bits}bit": uniform_recipe(bits) for bits in (2, 3, 4, 5, 6, 8)},
    "4bit-g32": uniform_recipe(4, 32),
    "4bit-v8": uniform_recipe(4, vision_bits=8),
    **{name: mixed_recipe(name) for name in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")},
    **{mode: uniform_recipe(mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")},
}
TEXT_LIMIT, IMAGE_LIMIT = (
    1e-4,
    5e-3,
)  # relative; mlx-vlm's vision tower uses the tanh approximation of GELU
WORDS = 12


def main() -> None:
    """Convert by every recipe, load with both, compare."""
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source = write_checkpoint(place / "source", SHAPE)
        print("| recipe | text logits | image logits | loads |")
        print("|---|---|---|---|")
        for label, quantization_recipe in RECIPES.items():
            target = place / label
            for _ in convert_checkpoint(source, target, quantization_recipe):
                pass
            text, image = differences(target)
            good = text < TEXT_LIMIT and image < IMAGE_LIMIT
            failures += not good
            print(f"| {label} | {text:.1e} | {image:.1e} | {'yes' if good else 'WRONG'} |")
        failures += not same_as_theirs(source, place)
    sys.exit(bool(failures))


def differences(folder: Path) -> tuple[float, float]:
    """Compare logits of a text and of a tile with text: relative to the largest."""
    from mlx_vlm.utils import load_model

    ours, theirs = build_model(folder), load_model(folder)
    rng = np.random.default_rng(0)
    words = rng.integers(5, 200, size=WORDS).tolist()
    image = [ours.model.image_id] * ours.config.num_image_token
    pixels = mx.array(rng.normal(size=(1, 448, 448, 3)).astype(np.float32))
    text = relative(theirs.language_model(mx.array([words])).logits, ours.model(mx.array([words])))
    row = mx.array([[*words, *image, *words]])
    embeds = theirs.get_input_embeddings(
        row, pixels.transpose(0, 3, 1, 2), image_token_index=ours.model.image_id
    ).inputs_embeds
    seen = theirs.language_model(None, inputs_embeds=embeds).logits
    return text, relative(seen, ours.model(row, pixels))


def relative(theirs: mx.array, ours: mx.array) -> float:
    theirs, ours = theirs.astype(mx.float32), ours.astype(mx.float32)
    return float((mx.abs(theirs - ours).max() / mx.abs(theirs).max()).item())


def same_as_theirs(source: Path, place: Path) -> bool:
    """Convert with mlx-vlm too: the quantized decoder must be the same, tensor by tensor."""
    from mlx_vlm.convert import convert as peer_convert
    from mlx_vlm.utils import load_model

    peer_convert(
        str(source), str(place / "peer"), quantize=True, q_bits=4, q_group_size=64, dtype="float32"
    )
    theirs = dict(tree_flatten(load_model(place / "peer").language_model.parameters()))
    ours = dict(tree_flatten(load_model(place / "4bit").language_model.parameters()))
    same = theirs.keys() == ours.keys() and all(mx.array_equal(ours[n], theirs[n]) for n in ours)
    print(f"quantized decoder equal to mlx-vlm's own 4-bit conversion: {'yes' if same else 'NO'}")
    return same


if __name__ == "__main__":
    main()
