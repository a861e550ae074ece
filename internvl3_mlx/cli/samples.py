"""``generate --samples N``: one question answered several times, the prompt read once."""

from typing import TYPE_CHECKING

from internvl3_mlx.cli import console
from internvl3_mlx.cli.generate import Request, load_model, open_all

if TYPE_CHECKING:
    from internvl3_mlx import Answer

ALL_THE_SAME = "without --temp every answer is the same; --temp 0.8 lets them differ"


def answer_samples(request: Request) -> None:
    """Write all answers of one question, numbered from 1."""
    pictures = open_all(request)
    output = request.output
    if not request.settings.get("temperature") and not output.quiet:
        console.note(ALL_THE_SAME)
    vlm = load_model(request)
    with console.waiting(f"writing {request.samples} answers", quiet=output.quiet):
        answers = vlm.ask_many(request.question, pictures, n=request.samples, **request.settings)
    if output.as_json:
        console.as_json([answer.to_dict() for answer in answers], indent=2)
        return
    for number, answer in enumerate(answers, start=1):
        show(number, answer, request)


def show(number: int, answer: "Answer", request: Request) -> None:
    if request.output.as_jsonl:
        console.as_json({"sample": number, **answer.to_dict()})
    else:
        console.heading(str(number))
        console.answer_text(answer.text + "\n")
    if request.output.stats:
        console.figures(answer)
