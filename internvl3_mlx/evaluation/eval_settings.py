"""Everything that decides the predictions of an evaluation."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from internvl3_mlx.evaluation.tasks import TaskSettings
from internvl3_mlx.generation.generation_config import GenerationConfig


@dataclass(frozen=True)
class EvalSettings:
    """Everything that decides the predictions of an evaluation, saved beside them.

    model: its name. fingerprint: of its weights. data: what the source says of itself.
    """

    task: str
    preset: str
    title: str
    how: TaskSettings
    model: str
    fingerprint: str
    data: Mapping[str, object]
    limit: int | None = None
    seed: int = 0
    judge: str | None = None
    adapter: str | None = None
    weights: str = ""
    best_of: Mapping[str, object] | None = None
    harness: str | None = None
    changed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    @property
    def config(self) -> GenerationConfig:
        """Greedy decoding with the harness's tiles and tokens."""
        return GenerationConfig(
            max_tiles=self.how.max_tiles,
            max_tokens=self.how.max_tokens,
            keep_boxes=True,
            cot=self.how.cot,
        )
