"""What a frozen tower saw, kept so that it looks at each picture once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import mlx.core as mx

from internvl3_mlx.generation.inputs import Seen
from internvl3_mlx.models.internvl import InternVL

What = Literal["features", "states"]


class FrozenFeatures:
    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.kept: dict[bytes, mx.array] = {}

    def of(self, model: InternVL, seen: Sequence[Seen], what: What = "features") -> mx.array | None:
        """Return what the tower makes of pictures, in order; None without any."""
        if not seen:
            return None
        for picture in seen:
            if picture.key not in self.kept:
                tiles = mx.array(picture.tiles)
                look = model.see if what == "features" else model.vision_model
                self.kept[picture.key] = look(tiles)
        return mx.concatenate([self.kept[picture.key] for picture in seen])
