"""Average the weights that a training started from with those that it reached.

``python -m examples.demo_model.average --start runs/wide --run runs/broad --share 0.5 --out mixed``

What the start knew stays, and most of what was learned comes along (WiSE-FT, Wortsman et al.,
2022): a short training at a high rate forgets more than it has to. ``--share`` is chosen on the
columns for choices.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

from examples.demo_model.published import published_weights

Weights = dict[str, Tensor]


def main() -> None:
    """Write averaged weights as a training folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="training folder or checkpoint")
    parser.add_argument("--run", type=Path, required=True, help="training folder")
    parser.add_argument("--share", type=float, required=True, help="of the run's weights, 0 to 1")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    averaged = average(load_weights(options.start), load_weights(options.run), options.share)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save({"model": averaged}, options.out / "state.pt")
    shutil.copyfile(options.run / "tokenizer.json", options.out / "tokenizer.json")


def load_weights(folder: Path) -> Weights:
    """Read the model's weights of a training folder or of a converted checkpoint."""
    state = folder / "state.pt"
    if state.exists():
        return torch.load(state, weights_only=True, map_location="cpu")["model"]
    return published_weights(folder)


def average(start: Weights, end: Weights, share: float) -> Weights:
    """Give ``(1 - share) * start + share * end``, rounded to float16 as it is published."""
    return {
        name: ((1 - share) * tensor + share * end[name]).half().float()
        for name, tensor in start.items()
    }


if __name__ == "__main__":
    main()
