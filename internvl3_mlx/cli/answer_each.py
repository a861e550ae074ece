"""``generate --each``: the same question about one source after another.

The next source is read, decoded and tiled on a thread while the model answers about this one, and
an error is one line in the place of its source.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from internvl3_mlx.cli import console
from internvl3_mlx.cli.endings import require_complete
from internvl3_mlx.cli.faults import attempt
from internvl3_mlx.cli.generate_request import (
    GenerateRequest,
    show_answer,
    show_ending,
    stream_answer,
)
from internvl3_mlx.cli.input_line import media_notes, media_source, read_media
from internvl3_mlx.cli.load_model import load_vlm
from internvl3_mlx.errors import InternVL3Error

if TYPE_CHECKING:
    from internvl3_mlx import VLM, Answer, ModelInputs
    from internvl3_mlx.images.load import LoadedImage

SOME_FAILED, ALL_FAILED = 1, 2


@dataclass(frozen=True, eq=False)
class Source:
    """An image or a document of the command line. inputs: of the model, or why there are none.

    notes: what of it the model does not see.
    """

    name: str
    inputs: "ModelInputs | InternVL3Error"
    notes: tuple[str, ...] = ()

    def readable_inputs(self) -> "ModelInputs":
        """Return the inputs. Raises what is wrong with the source."""
        if isinstance(self.inputs, InternVL3Error):
            raise self.inputs
        return self.inputs


@dataclass(eq=False)
class EachAnswer:
    """The answers to a request, in the order of its sources. failed: how many are errors.

    asked: the sources that have no answer yet; their notes and errors come when it is their turn.
    """

    request: GenerateRequest
    vlm: "VLM | None" = None
    failed: int = 0
    asked: deque[Source] = field(default_factory=deque[Source])

    def run(self) -> int:
        """Answer about every source and return the exit code."""
        sources = self.sources()
        for source in sources:
            if self.vlm is None:  # nothing was readable yet
                self.show_error(source, source.inputs)
                continue
            readable = chain([source], sources)
            together = self.request.batch_size > 1
            self.answer_together(readable) if together else self.answer_in_turn(readable)
        if not self.failed:
            return 0
        return ALL_FAILED if self.vlm is None else SOME_FAILED

    def sources(self) -> Iterator[Source]:
        """Read all sources. The model is loaded when the first one was readable."""
        from internvl3_mlx.prefetch import map_ahead

        names = iter(self.request.sources)
        for name in names:
            pages = attempt(partial(self.read, name))
            if isinstance(pages, InternVL3Error):
                yield Source(name, pages)
                continue
            self.vlm = load_vlm(self.request.load_options, quiet=self.request.output.quiet)
            waiting = chain([(name, pages)], ((other, None) for other in names))
            del pages
            yield from map_ahead(self.prepare, waiting)

    def read(self, name: str) -> "list[LoadedImage]":
        return read_media(media_source(name), upright=self.request.upright)

    def prepare(self, waiting: "tuple[str, list[LoadedImage] | None]") -> Source:
        """Read a source unless its pages are there, and build the inputs; called on a thread."""
        name, pages = waiting
        found = attempt(partial(self.read, name)) if pages is None else pages
        if isinstance(found, InternVL3Error):
            return Source(name, found)
        return Source(name, attempt(partial(self.build, found)), tuple(media_notes(found)))

    def build(self, pages: "list[LoadedImage]") -> "ModelInputs":
        assert self.vlm is not None
        request = self.request
        inputs = self.vlm.runner.build_inputs(request.question, pages, request.config)
        for image in inputs.processed_images:
            _ = image.content_hash  # computed here, it costs the answers no time
        return inputs

    def answer_in_turn(self, sources: Iterator[Source]) -> None:
        """Answer about one source after another; text is shown as it is generated."""
        for source in sources:
            self.note(source)
            error = attempt(partial(self.answer, source))
            if error is not None:
                self.show_error(source, error)

    def answer(self, source: Source) -> None:
        assert self.vlm is not None
        inputs, request = source.readable_inputs(), self.request
        if request.output.as_jsonl:
            self.show(source, self.vlm.runner.answer(inputs, request.config))
            return
        console.write_heading(source.name)
        answer = stream_answer(self.vlm.runner.stream(inputs, request.config), request)
        if request.output.stats:
            console.print_stats(answer)
        show_ending(require_complete(answer, request.config), request)

    def answer_together(self, sources: Iterator[Source]) -> None:
        """Decode several answers together, and show each when it is its turn."""
        from internvl3_mlx.generation.batch_generate import batch_results

        assert self.vlm is not None
        inputs, request = map(self.take, sources), self.request
        size = request.batch_size
        for result in batch_results(self.vlm.runner, inputs, request.config, size):
            source = self.asked.popleft()
            self.note(source)
            error = attempt(partial(self.show, source, result))
            if error is not None:
                self.show_error(source, error)

    def take(self, source: Source) -> "ModelInputs | InternVL3Error":
        self.asked.append(source)
        return source.inputs

    def note(self, source: Source) -> None:
        """Say what of a source the model does not see."""
        for note in source.notes if not self.request.output.quiet else ():
            console.note(note)

    def show(self, source: Source, result: "Answer | BaseException") -> None:
        """Write a finished answer. Raises its error, and one for an incomplete form."""
        if isinstance(result, BaseException):
            raise result
        answer = require_complete(result, self.request.config)
        show_answer(source.name, {"source": source.name}, answer, self.request.output)
        show_ending(answer, self.request)

    def show_error(self, source: Source, error: object) -> None:
        """Write one line about a source, and count it."""
        text = str(error)
        self.failed += 1
        if self.request.output.as_jsonl:
            console.print_json({"source": source.name, "error": text})
        else:
            console.error(text if source.name in text else f"{source.name}: {text}")
