"""internvl3-mlx as a model of VLMEvalKit, with the prompts and tiles of its InternVL class."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from vlmeval.vlm.base import BaseModel

from internvl3_mlx import load
from internvl3_mlx.errors import UserError
from internvl3_mlx.evaluation.items import EvalItem
from internvl3_mlx.evaluation.prompts import render_prompt
from internvl3_mlx.evaluation.tasks import Task, find_task

PRESET = "vlmevalkit"
OTHER_TILES, SHARED_TILES, MAX_TOKENS = 6, 64, 4096  # of data sets that have no task here
Message = list[dict[str, str]]


class InternVL3MLX(BaseModel):  # type: ignore[misc]
    """model_path: what ``internvl3_mlx.load`` takes. q_bits: of the language model."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(self, model_path: str = "2b", q_bits: int | None = None, **_: Any):
        self.vlm = load(model_path, quantize=q_bits)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Tell whether the prompt of a data set is written here."""
        task = task_of(dataset)
        return task is not None and not task.name.endswith(("mvbench", "videomme"))

    def build_prompt(self, line: Mapping[str, Any], dataset: str) -> Message:
        """Write the question of one row, followed by its images."""
        task = task_of(dataset)
        assert task is not None
        text = render_prompt(item_of(line), task.settings_of(PRESET))
        paths = self.dump_image(line, dataset)
        return [{"type": "text", "value": text}, *({"type": "image", "value": p} for p in paths)]

    def generate_inner(self, message: Message, dataset: str | None = None) -> str:
        """Answer a message of texts and images, greedily."""
        images = [part["value"] for part in message if part["type"] == "image"]
        texts = [part["value"] for part in message if part["type"] == "text"]
        task = task_of(dataset)
        limit = OTHER_TILES if task is None else task.settings_of(PRESET).max_tiles or OTHER_TILES
        tiles = max(1, min(limit, SHARED_TILES // max(1, len(images))))
        answer = self.vlm.ask(
            "\n".join(texts), images, max_tiles=tiles, max_tokens=MAX_TOKENS, keep_boxes=True
        )
        return answer.text


def task_of(dataset: str | None) -> Task | None:
    """Return our task of one of VLMEvalKit's data sets; None if there is none."""
    try:
        return None if dataset is None else find_task(dataset)
    except UserError:
        return None


def item_of(line: Mapping[str, Any]) -> EvalItem:
    """Read a row of VLMEvalKit's table; absent cells are NaN."""
    options = {letter: str(line[letter]) for letter in ascii_uppercase if present(line, letter)}
    hint = str(line["hint"]) if present(line, "hint") else ""
    return EvalItem(str(line["index"]), str(line["question"]), (), options=options, hint=hint)


def present(line: Mapping[str, Any], key: str) -> bool:
    value = line.get(key)
    return value is not None and value == value and value != ""  # NaN differs from itself
