"""What ``generate`` was asked for, and how it shows an answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internvl3_mlx.cli import console, generation_fields
from internvl3_mlx.cli.best_of import BestOfRequest
from internvl3_mlx.cli.endings import FLAG, describe_ending
from internvl3_mlx.cli.input_line import media_source, open_media
from internvl3_mlx.cli.options import OutputOptions
from internvl3_mlx.cli.thoughts import show_thoughts
from internvl3_mlx.errors import InternVL3Error

if TYPE_CHECKING:
    from internvl3_mlx import Answer, AnswerChunk
    from internvl3_mlx.generation.generation_config import GenerationConfig
    from internvl3_mlx.images.load import LoadedImage


@dataclass(frozen=True)
class GenerateRequest:
    """The command line, checked as far as possible without a model."""

    question: str
    sources: tuple[str, ...]
    generation_options: dict[str, Any]
    load_options: dict[str, Any]
    output: OutputOptions
    batch_size: int = 1
    num_samples: int = 0
    best_of: BestOfRequest | None = None

    @property
    def upright(self) -> bool:
        return bool(self.generation_options.get("upright", True))

    @property
    def config(self) -> "GenerationConfig":
        return generation_fields.make_config(self.generation_options)


def open_sources(request: GenerateRequest) -> "list[LoadedImage]":
    """Open all images, and every page of a PDF or TIFF."""
    upright, quiet = request.upright, request.output.quiet
    media = map(media_source, request.sources)
    return [image for one in media for image in open_media(one, upright=upright, quiet=quiet)]


def stream_answer(chunks: "Iterator[AnswerChunk]", request: GenerateRequest) -> "Answer":
    """Write the answer as it is generated, and end its last line."""
    last, answer = "", None
    for chunk in show_thoughts(chunks, quiet=request.output.quiet):
        console.write_answer(chunk.text)
        last, answer = chunk.text or last, chunk.answer
    if not last.endswith("\n"):
        console.write_line()
    if answer is None:
        raise InternVL3Error("generation ended without statistics; please report this")
    return answer


def show_answer(
    heading: str, keys: dict[str, object], answer: "Answer", output: OutputOptions
) -> None:
    if output.as_jsonl:
        console.print_json({**keys, **answer.to_dict()})
    else:
        console.write_heading(heading)
        console.write_answer(answer.text + "\n")
    if output.stats:
        console.print_stats(answer)


def show_ending(answer: "Answer", request: GenerateRequest) -> None:
    """Note that an answer was cut or is empty; JSON says so in ``finish_reason``."""
    output = request.output
    ending = describe_ending(answer, request.config, FLAG)
    if ending and not (output.quiet or output.as_json or output.as_jsonl):
        console.note(ending)
