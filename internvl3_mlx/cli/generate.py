"""``internvl3 generate``: ask once. Parse, call, show."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from internvl3_mlx.cli import console, options
from internvl3_mlx.cli.input_line import MediaSource, media_kind, open_media
from internvl3_mlx.cli.options import STDIN, OutputOptions, SectionedCommand
from internvl3_mlx.cli.system_info import report_kernel_fallbacks
from internvl3_mlx.errors import InternVL3Error, UserError

if TYPE_CHECKING:
    from internvl3_mlx import VLM, Answer
    from internvl3_mlx.images.load import LoadedImage
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internvl3_mlx import VLM, Answer, GenerationConfig, ModelInputs
    from internvl3_mlx.images.load import LoadedImage
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internvl3_mlx import Answer

UNTRAINED_NOTE = (
    "the demo model is untrained; its answers are noise (it shows that everything runs)"
)
SOME_FAILED, ALL_FAILED = 1, 2
MAX_SAMPLES = 256  # written side by side; more would only wait for memory


@dataclass(frozen=True)
class GenerateRequest:
    """What the user asks for, checked as far as it can be without a model."""

    question: str
    sources: tuple[str, ...]
    generation_options: dict[str, Any]
    load_options: dict[str, Any]
    output: OutputOptions
    batch_size: int = 1
    num_samples: int = 0


@click.command(cls=SectionedCommand)
@click.argument("images", nargs=-1)
@options.flag(
    "Question", "-p", "--prompt", "prompt", metavar="TEXT",
    help="The question; read from standard input when absent or -.",
)  # fmt: skip
@options.flag(
    "Pictures", "-i", "--image", "more_images", multiple=True, metavar="IMAGE",
    help="A picture, like IMAGES; may be repeated.",
)  # fmt: skip
@options.flag(
    "Pictures", "--video", "videos", multiple=True, metavar="PATH",
    help="A video, read as frames; may be repeated.",
)  # fmt: skip
@options.flag(
    "Speed", "--batch-size", "batch_size", metavar="N", type=click.IntRange(min=1), default=1,
    help="With --each: answers written together; each stays the same.",
)  # fmt: skip
@options.flag(
    "Answer", "--samples", "samples", metavar="N", type=click.IntRange(1, MAX_SAMPLES),
    help="Answer this often, the prompt read once; --temp lets answers differ.",
)  # fmt: skip
@options.generation_flags
@options.load_flags
@options.output_flags
@options.debug_flag
def generate_command(
    images: tuple[str, ...], more_images: tuple[str, ...], videos: tuple[str, ...], **flags: Any
) -> None:
    """Ask one question about some pictures and print the answer.

    IMAGES are files (of a PDF every page), http(s) addresses, data URIs, - for standard input or
    clipboard for the clipboard. Without any, the question is about text alone.

    Exit codes: 0 done, 1 failed, 2 a mistake in the request, 130 interrupted. With --each: 1 if
    some pictures failed, 2 if none could be read.
    """
    settings, output = dict(flags["settings"]), flags["output"]
    sources = (*images, *more_images)
    _check_output(output, sources, videos)
    if output.each and flags["samples"]:
        raise UserError("--samples is for one question; leave --each away")
    question = _read_question(flags["prompt"], (*sources, *videos))
    if videos:
        settings["video"] = tuple(_check_video(video) for video in videos)
    if "v2pe_delta" in settings:
        settings["v2pe_delta"] = options.parse_deltas(settings["v2pe_delta"])
    numbers = (flags["batch_size"], flags["samples"] or 0)
    request = GenerateRequest(question, sources, settings, flags["loading"], output, *numbers)
    if output.each and request.batch_size > 1:
        raise SystemExit(answer_in_batches(request))
    if output.each:
        raise SystemExit(_answer_each(request))
    if request.num_samples:
        answer_samples(request)
    else:
        _answer_once(request)


def _check_output(output: OutputOptions, sources: tuple[str, ...], videos: tuple[str, ...]) -> None:
    if output.as_json and output.as_jsonl:
        raise UserError("--json and --jsonl: choose one")
    if output.each and output.as_json:
        raise UserError("--json is one object; with --each use --jsonl, one line for each picture")
    if output.each and not sources:
        raise UserError("--each without pictures: name some files")
    if output.each and videos:
        raise UserError("--each is for pictures; ask about one video at a time")
    if (*sources, *videos).count(STDIN) > 1:
        raise UserError("standard input holds one thing; - was given more than once")


def _read_question(prompt: str | None, sources: tuple[str, ...]) -> str:
    """Take the question from the flag or from what is piped in; never wait for a keyboard."""
    if prompt in (None, STDIN):
        if STDIN in sources:
            raise UserError("standard input holds what is asked about; pass the question with -p")
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError('no question: pass -p "What is this?" or pipe text in')
        prompt = sys.stdin.read()
    if not prompt or not prompt.strip():
        raise UserError('the question is empty: pass -p "What is this?" or pipe text in')
    return prompt


def _check_video(video: str) -> str:
    """Refuse a video that is not there before a model loads."""
    from internvl3_mlx.images.fetch import locate

    if "://" not in video and video != STDIN:
        locate(video)
    return video


def _answer_once(request: GenerateRequest) -> None:
    pictures = open_sources(request)
    vlm, output = load_vlm(request), request.output
    if output.as_json or output.as_jsonl:
        answer = vlm.ask(request.question, pictures, **request.generation_options)
        console.print_json(answer.to_dict(), indent=2 if output.as_json else None)
    else:
        answer = _stream(vlm, pictures, request)
    if output.stats:
        console.print_stats(answer)


def _answer_each(request: GenerateRequest) -> int:
    """Ask about one picture after another; a fault stops none but its own. Return the exit code."""
    vlm: VLM | None = None
    faults: list[InternVL3Error] = []
    for source in request.sources:
        try:
            picture = open_source(source, request)
        except InternVL3Error as fault:
            faults.append(fault)
            report_failure(source, fault, request.output)
            continue
        vlm = vlm or load_vlm(request)  # not before one picture could be read
        try:
            _answer_image(vlm, picture, source, request)
        except InternVL3Error as fault:
            faults.append(fault)
            report_failure(source, fault, request.output)
    if not faults:
        return 0
    return ALL_FAILED if vlm is None else SOME_FAILED


def _answer_image(
    vlm: "VLM", picture: "LoadedImage", source: str, request: GenerateRequest
) -> None:
    output = request.output
    if output.as_jsonl:
        answer = vlm.ask(request.question, [picture], **request.generation_options)
        console.print_json({"source": source, **answer.to_dict()})
    else:
        console.write_heading(source)
        answer = _stream(vlm, [picture], request)
    if output.stats:
        console.print_stats(answer)


def report_failure(source: str, fault: InternVL3Error, output: OutputOptions) -> None:
    if output.as_jsonl:
        console.print_json({"source": source, "error": str(fault)})
    else:
        console.error(str(fault) if source in str(fault) else f"{source}: {fault}")


def open_source(source: str, request: GenerateRequest) -> "LoadedImage":
    from internvl3_mlx.images.load import open_image

    return open_image(source, upright=request.generation_options.get("upright", True))


def open_sources(request: GenerateRequest) -> "list[LoadedImage]":
    """Open every picture, and every page of a document."""
    upright = request.generation_options.get("upright", True)
    dropped = [MediaSource(source, media_kind(source) or "image") for source in request.sources]
    return [shown for one in dropped for shown in open_media(one, upright=upright)]


def load_vlm(request: GenerateRequest) -> "VLM":
    from internvl3_mlx import load

    quiet = request.output.quiet
    report_kernel_fallbacks(quiet=quiet)
    model = request.load_options.get("model", "the model")
    with console.spinner(f"loading {model}", quiet=quiet) as notify:
        vlm = load(**request.load_options, notify=notify)
    if not vlm.trained and not quiet:
        console.note(UNTRAINED_NOTE)
    return vlm


def _stream(vlm: "VLM", pictures: "list[LoadedImage]", request: GenerateRequest) -> "Answer":
    """Write the answer as it comes, and a line end after it."""
    last, answer = "", None
    for piece in vlm.stream(request.question, pictures, **request.generation_options):
        console.write_answer(piece.text)
        last, answer = piece.text or last, piece.answer
    if not last.endswith("\n"):
        console.write_line()
    if answer is None:
        raise InternVL3Error("the answer ended without its figures; please report this")
    return answer


def answer_in_batches(request: GenerateRequest) -> int:
    """Answer about all pictures in their order; a fault stops none but its own. Return the exit
    code."""
    vlm: VLM | None = None
    failed = 0
    for at in range(0, len(request.sources), request.batch_size):
        sources = request.sources[at : at + request.batch_size]
        opened = [try_open(source, request) for source in sources]
        if vlm is None and any(not isinstance(item, InternVL3Error) for item in opened):
            vlm = load_vlm(request)  # not before one picture could be read
        for source, found in zip(sources, batch_answers(vlm, opened, request), strict=True):
            if isinstance(found, InternVL3Error):
                failed += 1
                report_failure(source, found, request.output)
            else:
                _show_batch_answer(source, found, request)
    if not failed:
        return 0
    return ALL_FAILED if vlm is None else SOME_FAILED


def try_open(source: str, request: GenerateRequest) -> "LoadedImage | InternVL3Error":
    try:
        return open_source(source, request)
    except InternVL3Error as fault:
        return fault


def batch_answers(
    vlm: "VLM | None", opened: "Sequence[LoadedImage | InternVL3Error]", request: GenerateRequest
) -> "Iterator[Answer | InternVL3Error]":
    """Put an answer in the place of every picture; faults keep theirs."""
    from internvl3_mlx import GenerationConfig
    from internvl3_mlx.generation.batch_generate import batch_generate

    if vlm is None:  # there is nothing but faults
        yield from (item for item in opened if isinstance(item, InternVL3Error))
        return
    settings = GenerationConfig(**request.generation_options)
    prepared = [try_prepare(vlm, item, request.question, settings) for item in opened]
    good = [item for item in prepared if not isinstance(item, InternVL3Error)]
    written = batch_generate(vlm.runner, good, settings, request.batch_size)
    for item in prepared:
        yield item if isinstance(item, InternVL3Error) else next(written)


def try_prepare(
    vlm: "VLM", item: "LoadedImage | InternVL3Error", question: str, settings: "GenerationConfig"
) -> "ModelInputs | InternVL3Error":
    """Write the prompt of one picture; one that is too long is a fault of its own."""
    if isinstance(item, InternVL3Error):
        return item
    try:
        return vlm.runner.build_inputs(question, [item], settings)
    except InternVL3Error as fault:
        return fault


def _show_batch_answer(source: str, answer: "Answer", request: GenerateRequest) -> None:
    if request.output.as_jsonl:
        console.print_json({"source": source, **answer.to_dict()})
    else:
        console.write_heading(source)
        console.write_answer(answer.text + "\n")
    if request.output.stats:
        console.print_stats(answer)


GREEDY_SAMPLES_NOTE = "without --temp every answer is the same; --temp 0.8 lets them differ"


def answer_samples(request: GenerateRequest) -> None:
    """Write all answers of one question, numbered from 1."""
    pictures = open_sources(request)
    output = request.output
    if not request.generation_options.get("temperature") and not output.quiet:
        console.note(GREEDY_SAMPLES_NOTE)
    vlm = load_vlm(request)
    with console.spinner(f"writing {request.num_samples} answers", quiet=output.quiet):
        answers = vlm.ask_many(
            request.question, pictures, n=request.num_samples, **request.generation_options
        )
    if output.as_json:
        console.print_json([answer.to_dict() for answer in answers], indent=2)
        return
    for number, answer in enumerate(answers, start=1):
        _show_sample(number, answer, request)


def _show_sample(number: int, answer: "Answer", request: GenerateRequest) -> None:
    if request.output.as_jsonl:
        console.print_json({"sample": number, **answer.to_dict()})
    else:
        console.write_heading(str(number))
        console.write_answer(answer.text + "\n")
    if request.output.stats:
        console.print_stats(answer)
