"""internvl3-mlx as a model of lmms-eval, asked as its own ``internvl3`` is.

    pip install lmms-eval && pip install --no-deps -e examples/lmms_eval
    python -m lmms_eval --model internvl3_mlx --model_args pretrained=2b --tasks chartqa

The entry point in ``pyproject.toml`` registers it; nothing of lmms-eval is changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from internvl3_mlx import GenerationConfig, load
from internvl3_mlx.evaluation.prompts import place_images
from internvl3_mlx.generation.batch_generate import batch_generate

NAME = "internvl3_mlx"
MAX_TILES, SHARED_TILES = 12, 64  # those of lmms-eval's own internvl3
MAX_TOKENS = 1024
NUM_FRAMES = 8


def manifest() -> ModelManifest:
    """Return what lmms-eval has to know of the model: its name and where its class is."""
    return ModelManifest(NAME, simple_class_path=f"{__name__}.InternVL3")


@dataclass(frozen=True)
class Question:
    """One request of lmms-eval. visuals: PIL images, or the path of a video."""

    text: str
    visuals: Sequence[Any]
    max_tokens: int


class InternVL3(lmms):
    """Answers greedily, several questions in parallel.

    pretrained, q_bits, adapter: as ``internvl3_mlx.load`` takes them. max_tiles: of one image;
    several share 64.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "2b",
        q_bits: int | str | None = None,
        adapter: str | None = None,
        max_tiles: int | str = MAX_TILES,
        num_frames: int | str = NUM_FRAMES,
        batch_size: int | str = 8,
        **_: Any,
    ):
        super().__init__()
        bits = None if q_bits is None else int(q_bits)
        self.vlm = load(pretrained, quantize=bits, adapter=adapter)
        self.max_tiles, self.num_frames = int(max_tiles), int(num_frames)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer all requests in their order."""
        questions = (self.read(request) for request in requests)
        answers: list[str] = []
        for max_tokens, group in groupby(questions, key=lambda question: question.max_tokens):
            while batch := list(islice(group, self.batch_size)):
                answers += self.answer(batch, max_tokens)
        return answers

    def read(self, request: Instance) -> Question:
        text, options, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        return Question(text, visuals, int(options.get("max_new_tokens") or MAX_TOKENS))

    def answer(self, batch: Sequence[Question], max_tokens: int) -> list[str]:
        config = GenerationConfig(max_tokens=max_tokens, keep_boxes=True)
        inputs = [self.build(question, max_tokens) for question in batch]
        answers = batch_generate(self.vlm.runner, inputs, config, self.batch_size)
        return [answer.text for answer in answers]

    def build(self, question: Question, max_tokens: int) -> Any:
        """Tile the images and write the prompt as lmms-eval's class does."""
        if question.visuals and isinstance(question.visuals[0], str):
            config = GenerationConfig(
                video=tuple(question.visuals), num_frames=self.num_frames, max_tokens=max_tokens
            )
            return self.vlm.runner.build_inputs(question.text, [], config)
        count = len(question.visuals)
        tiles = max(1, min(self.max_tiles, SHARED_TILES // max(1, count)))
        config = GenerationConfig(max_tiles=tiles, max_tokens=max_tokens)
        text = place_images(question.text, count, "spaced")
        return self.vlm.runner.build_inputs(text, question.visuals, config)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("no task of images needs likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported")
