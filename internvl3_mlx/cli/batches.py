"""``generate --each --batch-size N``: several pictures read one by one and answered together."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from internvl3_mlx.cli import console
from internvl3_mlx.cli.generate import (
    ALL_MISTAKEN,
    SOME_FAILED,
    Request,
    load_model,
    open_one,
    tell,
)
from internvl3_mlx.errors import InternVL3Error

if TYPE_CHECKING:
    from internvl3_mlx import VLM, Answer, Inputs, Settings
    from internvl3_mlx.images.load import Picture


def answer_batches(request: Request) -> int:
    """Answer about all pictures in their order; a fault stops none but its own. Return the exit
    code."""
    vlm: VLM | None = None
    failed = 0
    for at in range(0, len(request.sources), request.batch_size):
        sources = request.sources[at : at + request.batch_size]
        opened = [attempt(source, request) for source in sources]
        if vlm is None and any(not isinstance(item, InternVL3Error) for item in opened):
            vlm = load_model(request)  # not before one picture could be read
        for source, found in zip(sources, answered(vlm, opened, request), strict=True):
            if isinstance(found, InternVL3Error):
                failed += 1
                tell(source, found, request.output)
            else:
                show(source, found, request)
    if not failed:
        return 0
    return ALL_MISTAKEN if vlm is None else SOME_FAILED


def attempt(source: str, request: Request) -> "Picture | InternVL3Error":
    try:
        return open_one(source, request)
    except InternVL3Error as fault:
        return fault


def answered(
    vlm: "VLM | None", opened: "Sequence[Picture | InternVL3Error]", request: Request
) -> "Iterator[Answer | InternVL3Error]":
    """Put an answer in the place of every picture; faults keep theirs."""
    from internvl3_mlx import Settings
    from internvl3_mlx.generation.batch_generate import answers

    if vlm is None:  # there is nothing but faults
        yield from (item for item in opened if isinstance(item, InternVL3Error))
        return
    settings = Settings(**request.settings)
    prepared = [prepare(vlm, item, request.question, settings) for item in opened]
    good = [item for item in prepared if not isinstance(item, InternVL3Error)]
    written = answers(vlm, good, settings, request.batch_size)
    for item in prepared:
        yield item if isinstance(item, InternVL3Error) else next(written)


def prepare(
    vlm: "VLM", item: "Picture | InternVL3Error", question: str, settings: "Settings"
) -> "Inputs | InternVL3Error":
    """Write the prompt of one picture; one that is too long is a fault of its own."""
    if isinstance(item, InternVL3Error):
        return item
    try:
        return vlm.prepared(question, [item], settings)
    except InternVL3Error as fault:
        return fault


def show(source: str, answer: "Answer", request: Request) -> None:
    if request.output.as_jsonl:
        console.as_json({"source": source, **answer.to_dict()})
    else:
        console.heading(source)
        console.answer_text(answer.text + "\n")
    if request.output.stats:
        console.figures(answer)
