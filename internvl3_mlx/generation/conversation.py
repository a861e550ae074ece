"""A talk about pictures: every question costs only its own tokens, every answer is what a fresh run
of the same history gives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl3_mlx.errors import PromptError, UserError
from internvl3_mlx.generation.answer import Answer, Piece
from internvl3_mlx.generation.context_budget import Budget, measured
from internvl3_mlx.generation.exchange import Exchange
from internvl3_mlx.generation.generation_config import Settings, changed
from internvl3_mlx.generation.processor import Film, ImageInfo, Inputs, Preparer, Seen
from internvl3_mlx.generation.prompt_cache import Memory
from internvl3_mlx.prompt.messages import Turn

if TYPE_CHECKING:
    from internvl3_mlx.generation.vlm import VLM


@dataclass(eq=False)
class Conversation:
    """Turns with their pictures, and the memory of what was read of them.

    One answer at a time. Cut short, by closing the stream or by an exception, the talk keeps what
    was said; if nothing was, it is as before the question.
    """

    vlm: "VLM"
    settings: Settings
    exchanges: list[Exchange] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    busy: bool = False

    def __post_init__(self) -> None:
        self.check(self.settings)

    def ask(self, question: str, images: Sequence[Any] = (), **settings: Any) -> Answer:
        """Say something, with new pictures if there are any, and return the answer."""
        return finished(self.stream(question, images, **settings))

    def stream(self, question: str, images: Sequence[Any] = (), **settings: Any) -> Iterator[Piece]:
        """Yield the answer piece by piece; ``settings`` hold for this question only."""
        wanted = changed(self.settings, settings)
        alone = isinstance(images, str | bytes) or not isinstance(images, Sequence)
        pictures = tuple(self.look(source) for source in ([images] if alone else images))
        films = tuple(self.watch(source, wanted) for source in wanted.video)
        exchange = Exchange(question, pictures, films)
        return self.answering(self.exchanges, exchange, wanted)

    def retry(self, **settings: Any) -> Answer:
        """Answer the last question once more, in the place of the last answer."""
        return finished(self.stream_retry(**settings))

    def stream_retry(self, **settings: Any) -> Iterator[Piece]:
        """Yield another answer to the last question; the old one goes when a new one has begun."""
        last = self.last()
        again = Exchange(last.question, last.pictures, last.films)
        return self.answering(self.exchanges[:-1], again, changed(self.settings, settings))

    def undo(self) -> Exchange:
        """Take back the last question with its answer and its pictures, and return it."""
        last = self.last()
        self.exchanges = self.exchanges[:-1]
        return last

    def forget(self, count: int = 1) -> None:
        """Drop the oldest ``count`` questions with their answers and pictures, to make room."""
        if not 1 <= count <= len(self.exchanges):
            raise UserError(f"cannot forget {count} of {len(self.exchanges)} questions")
        self.exchanges = self.exchanges[count:]

    def clear(self) -> None:
        """Begin anew and give the memory back; pictures that were looked at stay known."""
        self.exchanges, self.memory = [], Memory(self.memory.features)

    def drop_image(self, number: int) -> ImageInfo:
        """Take one picture out of the talk, counted from 1 as in ``images``."""
        left = number - 1
        for at, exchange in enumerate(self.exchanges):
            if 0 <= left < len(exchange.pictures):
                self.exchanges = [*self.exchanges]
                self.exchanges[at] = exchange.without(left)
                return exchange.pictures[left].info
            left -= len(exchange.pictures)
        count = len(self.images)
        raise UserError(f"no picture {number}; this talk has {count or 'none'}")

    def change(self, **settings: Any) -> None:
        """Set what holds from the next question on, such as ``system`` or ``v2pe_delta``."""
        wanted = changed(self.settings, settings)
        self.check(wanted)
        self.settings = wanted

    def look(self, source: Any) -> Seen:
        """Open and cut a picture now, as this talk is set; pass the result to ``ask``."""
        return self.preparer.look(source, self.settings)

    def watch(self, source: Any, settings: Settings | None = None) -> Film:
        """Take the frames of a video now; pass the result to ``ask(video=...)``."""
        return self.preparer.watch(source, settings or self.settings)

    @property
    def images(self) -> tuple[ImageInfo, ...]:
        """The pictures of the talk, in order; videos are not counted."""
        return tuple(seen.info for exchange in self.exchanges for seen in exchange.pictures)

    @property
    def history(self) -> tuple[Turn, ...]:
        """The talk as ``vlm.ask(history=...)`` takes it, with the ids of its answers."""
        return tuple(turn for exchange in self.exchanges for turn in exchange.turns())

    @property
    def budget(self) -> Budget:
        """How much of the window and of the memory the talk takes."""
        inputs = self.inputs(self.exchanges, Exchange(""), self.settings)
        return measured(inputs, self.memory, self.vlm.model, self.settings)

    def save(self, path: str | Path, *, cache: bool = False) -> None:
        """Write the talk to one file; with ``cache`` what was read goes beside it, so that after
        ``load`` nothing has to be read again."""
        from internvl3_mlx.generation.conversation_file import save_talk

        save_talk(self, Path(path).expanduser(), cache=cache)

    def load(self, path: str | Path) -> bool:
        """Go on with a saved talk in the place of this one; tell whether its cache came along."""
        from internvl3_mlx.generation.conversation_file import load_talk

        return load_talk(self, Path(path).expanduser())

    @property
    def preparer(self) -> Preparer:
        return self.vlm.preparer

    def last(self) -> Exchange:
        if not self.exchanges:
            raise UserError("nothing has been asked yet")
        return self.exchanges[-1]

    def check(self, settings: Settings) -> None:
        if settings.history or settings.video:
            raise UserError("history and video belong to one question; pass them with it")

    def inputs(self, before: Sequence[Exchange], exchange: Exchange, settings: Settings) -> Inputs:
        """Write the prompt of ``exchange`` after ``before``: exactly what a fresh run reads."""
        history = [turn for past in before for turn in past.turns()]
        shown = [seen for past in [*before, exchange] for seen in past.seen]
        return self.preparer.lay([*history, exchange.turn], shown, settings)

    def answering(
        self, before: Sequence[Exchange], exchange: Exchange, settings: Settings
    ) -> Iterator[Piece]:
        if settings.history:
            raise UserError("the talk is the history; begin another with vlm.conversation()")
        if self.busy:
            raise PromptError("an answer is still being written; finish or close it first")
        inputs = self.inputs(before, exchange, settings)
        self.vlm.check_length(inputs, settings)
        return self.kept(before, exchange, inputs, settings)

    def kept(
        self, before: Sequence[Exchange], exchange: Exchange, inputs: Inputs, settings: Settings
    ) -> Iterator[Piece]:
        """Pass the pieces on, and keep what was said however it ends."""
        text, ids, whole = "", list[int](), False
        self.busy = True
        pieces = self.vlm.answering(inputs, settings, self.memory)
        try:
            for piece in pieces:
                text, whole = text + piece.text, piece.answer is not None
                ids += [] if piece.token_id is None else [piece.token_id]
                yield piece
        finally:
            self.busy = False
            if ids or whole:
                said = replace(exchange, answer=text.strip(), complete=whole)
                if self.spell(ids, text, settings):
                    said = replace(said, token_ids=tuple(ids))
                self.exchanges = [*before, said]

    def spell(self, ids: Sequence[int], text: str, settings: Settings) -> bool:
        """Tell whether ids may stand for an answer in the history: not where a stop string cut
        it, nor where the model made up a picture."""
        tokenizer = self.vlm.tokenizer
        spelled = tokenizer.decode(ids, keep_boxes=settings.keep_boxes)
        return spelled.strip() == text.strip() and tokenizer.image_id not in ids


def finished(pieces: Iterator[Piece]) -> Answer:
    """Run to the end and return the answer."""
    *_, last = pieces
    assert last.answer is not None
    return last.answer
