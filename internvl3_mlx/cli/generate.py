"""``internvl3 generate``: answer one question, about all images together or about each of them."""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import click

from internvl3_mlx.cli import console, generation_fields, options
from internvl3_mlx.cli.answer_each import EachAnswer
from internvl3_mlx.cli.best_of import answer_best_of, best_of_flags, read_best_of
from internvl3_mlx.cli.endings import require_complete
from internvl3_mlx.cli.flags import SectionedCommand, flag
from internvl3_mlx.cli.generate_request import (
    GenerateRequest,
    open_sources,
    show_answer,
    show_ending,
    stream_answer,
)
from internvl3_mlx.cli.input_line import expand_sample
from internvl3_mlx.cli.line_reader import MAX_LINE
from internvl3_mlx.cli.load_model import load_vlm
from internvl3_mlx.cli.options import STDIN, OutputOptions
from internvl3_mlx.errors import UserError

GREEDY_SAMPLES_NOTE = "without --temp all answers are the same; try --temp 0.8"
FILE_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}$")
MAX_SAMPLES = 256  # generated in parallel; more would run out of memory
IMAGE_FLAG = flag(
    "Images", "-i", "--image", "more_images", multiple=True, metavar="IMAGE",
    help="An image, like IMAGES; may be repeated.",
)  # fmt: skip


@click.command(
    cls=SectionedCommand,
    short_help="Answer one question about images or videos.",
    examples=(
        ('internvl3 generate photo.jpg "What is this?"', "ask about an image"),
        ('internvl3 generate *.jpg --each --jsonl -p "Read the total."', "one answer per image"),
        (
            'internvl3 generate --video walk.mp4 -p "What happens?" --model 8b',
            "a video, and a larger model",
        ),
    ),
    suggestions={"-q": "--quiet", "--quantize": "--q-bits", "--samples": "--num-samples"},
)
@click.argument("images", nargs=-1)
@flag(
    "Question", "-p", "--prompt", "prompt", metavar="TEXT",
    help="The question; else the words after the images, or standard input.",
)  # fmt: skip
@IMAGE_FLAG
@flag(
    "Images", "--video", "videos", multiple=True, metavar="PATH",
    help="A video, or a folder of its frames; may be repeated.",
)  # fmt: skip
@flag(
    "Speed", "--batch-size", "batch_size", metavar="N", type=click.IntRange(min=1), default=1,
    help="With --each: number of answers generated in parallel. The answers stay the same.",
)  # fmt: skip
@flag(
    "Answer", "--num-samples", "num_samples", metavar="N", type=click.IntRange(1, MAX_SAMPLES),
    help="Number of answers. The prompt is processed once; --temp makes them differ.",
)  # fmt: skip
@options.generation_flags
@best_of_flags
@options.load_flags
@options.output_flags
@options.debug_flag
def generate_command(
    images: tuple[str, ...], more_images: tuple[str, ...], videos: tuple[str, ...], **flags: Any
) -> None:
    """Answer one question about images, videos or text.

    IMAGES are files (every page of a PDF or TIFF), http(s) addresses, data URIs, - for standard
    input, or clipboard for the clipboard. Without any, the question is about text alone.

    Exit codes: 0 done, 1 failed, 2 a mistake in the request, 130 interrupted. With --each: 1 if
    some images failed, 2 if none could be read.
    """
    generation_options, output = dict(flags["generation_options"]), flags["output"]
    images = tuple(map(expand_sample, images))
    if flags["prompt"] is None:
        images, flags["prompt"] = split_question(images)
    sources = (*images, *map(expand_sample, more_images))
    _check_output(output, sources, videos)
    if output.each and flags["num_samples"]:
        raise UserError("--num-samples cannot be combined with --each; drop one of them")
    best_of = read_best_of(flags["best_of_options"], generation_options)
    if best_of is not None and (output.each or flags["num_samples"]):
        raise UserError("--best-of cannot be combined with --each or --num-samples; drop one")
    question = _read_question(flags["prompt"], (*sources, *videos))
    if videos and best_of is not None and best_of.critic is not None:
        raise UserError("a critic judges images alone; drop --video or --critic")
    if videos:
        generation_options["video"] = tuple(_check_video(video) for video in videos)
    counts = (flags["batch_size"], flags["num_samples"] or 0)
    load_options = flags["load_options"]
    request = GenerateRequest(
        question, sources, generation_options, load_options, output, *counts, best_of
    )
    # an invalid option is reported before a model loads
    generation_fields.make_config(generation_options)
    run_generate(request)


def split_question(words: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """Split off the question: the words after the images, or before them, that are no file or URL.

    A word that looks like a file, with a folder or a suffix, stays one: its error says what is
    wrong with it.
    """
    is_image = [_names_image(word) for word in words]
    end = max((at for at, found in enumerate(is_image, start=1) if found), default=0)
    if end == len(words) and True in is_image:  # nothing follows the images
        start = is_image.index(True)
        return tuple(words[start:]), " ".join(words[:start]) or None
    return tuple(words[:end]), " ".join(words[end:]) or None


def _names_image(word: str) -> bool:
    if word in (STDIN, "clipboard") or "://" in word or word.startswith("data:"):
        return True
    if os.path.exists(os.path.expanduser(word)):
        return True
    return bool(FILE_SUFFIX.search(word)) or ("/" in word and not any(map(str.isspace, word)))


def run_generate(request: GenerateRequest) -> None:
    if request.output.each:
        raise SystemExit(EachAnswer(request).run())
    if request.best_of is not None:
        answer_best_of(
            request.best_of,
            request.question,
            open_sources(request),
            request.generation_options,
            request.load_options,
            request.output,
        )
    elif request.num_samples:
        answer_samples(request)
    else:
        answer_once(request)


def _check_output(output: OutputOptions, sources: tuple[str, ...], videos: tuple[str, ...]) -> None:
    if output.as_json and output.as_jsonl:
        raise UserError("--json and --jsonl are mutually exclusive; choose one")
    if output.each and output.as_json:
        raise UserError("--json prints one object; with --each use --jsonl, one line per image")
    if output.each and not sources:
        raise UserError("--each needs images; name some files")
    if output.each and videos:
        raise UserError("--each is for images; ask about one video at a time")
    if (*sources, *videos).count(STDIN) > 1:
        raise UserError("- was given more than once, but standard input can be read only once")


def _read_question(prompt: str | None, sources: tuple[str, ...]) -> str:
    """Return the question from the flag or from a pipe; never wait for a keyboard."""
    example = 'pass -p "What is this?" or pipe text in'
    if prompt in (None, STDIN):
        if STDIN in sources:
            raise UserError("standard input is used for the image; pass the question with -p")
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError(f"no question; {example}")
        prompt = sys.stdin.read(MAX_LINE + 1)
        if len(prompt) > MAX_LINE:
            raise UserError(f"the question has more than {MAX_LINE:,} characters; shorten it")
    if not prompt or not prompt.strip():
        raise UserError(f"the question is empty; {example}")
    return prompt


def _check_video(video: str) -> str:
    """Raise ImageError for a video that does not exist, before a model loads."""
    from internvl3_mlx.images.video import check_video

    if "://" not in video and video != STDIN:
        check_video(video)
    return video


def answer_once(request: GenerateRequest) -> None:
    """Answer one question about all images together."""
    images = open_sources(request)
    output, delta = request.output, request.generation_options.get("v2pe_delta", 1)
    vlm = load_vlm(request.load_options, quiet=output.quiet, v2pe_delta=delta)
    if output.as_json or output.as_jsonl:
        answer = vlm.ask(request.question, images, **request.generation_options)
        console.print_json(answer.to_dict(), indent=2 if output.as_json else None)
    else:
        chunks = vlm.stream(request.question, images, **request.generation_options)
        answer = stream_answer(chunks, request)
    if output.stats:
        console.print_stats(answer)
    show_ending(require_complete(answer, request.config), request)


def answer_samples(request: GenerateRequest) -> None:
    """Write several answers to one question, numbered from 1."""
    images, output = open_sources(request), request.output
    if not request.generation_options.get("temperature") and not output.quiet:
        console.note(GREEDY_SAMPLES_NOTE)
    delta = request.generation_options.get("v2pe_delta", 1)
    vlm = load_vlm(request.load_options, quiet=output.quiet, v2pe_delta=delta)
    with console.spinner(f"generating {request.num_samples} answers", quiet=output.quiet):
        answers = vlm.ask_many(
            request.question, images, n=request.num_samples, **request.generation_options
        )
    if output.as_json:
        console.print_json([answer.to_dict() for answer in answers], indent=2)
    else:
        for number, answer in enumerate(answers, start=1):
            show_answer(str(number), {"sample": number}, answer, output)
            show_ending(answer, request)
    for answer in answers:
        require_complete(answer, request.config)
