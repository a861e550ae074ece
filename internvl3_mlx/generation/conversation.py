"""A talk about pictures: every question costs only its own tokens, every answer is what a fresh run
of the same history gives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl3_mlx.errors import PromptError, UserError
from internvl3_mlx.generation.answer import Answer, AnswerChunk
from internvl3_mlx.generation.context_budget import ContextBudget, measure_context
from internvl3_mlx.generation.exchange import Exchange
from internvl3_mlx.generation.generation_config import GenerationConfig, with_overrides
from internvl3_mlx.generation.processor import (
    ImageInfo,
    ModelInputs,
    ProcessedImage,
    ProcessedVideo,
    Processor,
)
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.prompt.messages import Message

if TYPE_CHECKING:
    from internvl3_mlx.generation.vlm import VLM


@dataclass(eq=False)
class Conversation:
    """Turns with their pictures, and the memory of what was read of them.

    One answer at a time. Cut short, by closing the stream or by an exception, the talk keeps what
    was said; if nothing was, it is as before the question.
    """

    vlm: "VLM"
    generation_config: GenerationConfig
    exchanges: list[Exchange] = field(default_factory=list)
    prompt_cache: PromptCache = field(default_factory=PromptCache)
    busy: bool = False

    def __post_init__(self) -> None:
        self.check_config(self.generation_config)

    def ask(self, question: str, images: Sequence[Any] = (), **settings: Any) -> Answer:
        """Say something, with new pictures if there are any, and return the answer."""
        return final_answer(self.stream(question, images, **settings))

    def stream(
        self, question: str, images: Sequence[Any] = (), **settings: Any
    ) -> Iterator[AnswerChunk]:
        """Yield the answer piece by piece; ``settings`` hold for this question only."""
        wanted = with_overrides(self.generation_config, settings)
        alone = isinstance(images, str | bytes) or not isinstance(images, Sequence)
        pictures = tuple(self.process_image(source) for source in ([images] if alone else images))
        films = tuple(self.process_video(source, wanted) for source in wanted.video)
        exchange = Exchange(question, pictures, films)
        return self.stream_exchange(self.exchanges, exchange, wanted)

    def retry(self, **settings: Any) -> Answer:
        """Answer the last question once more, in the place of the last answer."""
        return final_answer(self.stream_retry(**settings))

    def stream_retry(self, **settings: Any) -> Iterator[AnswerChunk]:
        """Yield another answer to the last question; the old one goes when a new one has begun."""
        last = self.last_exchange()
        again = Exchange(last.question, last.images, last.videos)
        return self.stream_exchange(
            self.exchanges[:-1], again, with_overrides(self.generation_config, settings)
        )

    def undo(self) -> Exchange:
        """Take back the last question with its answer and its pictures, and return it."""
        last = self.last_exchange()
        self.exchanges = self.exchanges[:-1]
        return last

    def drop_oldest(self, count: int = 1) -> None:
        """Drop the oldest ``count`` questions with their answers and pictures, to make room."""
        if not 1 <= count <= len(self.exchanges):
            raise UserError(f"cannot forget {count} of {len(self.exchanges)} questions")
        self.exchanges = self.exchanges[count:]

    def clear(self) -> None:
        """Begin anew and give the memory back; pictures that were looked at stay known."""
        self.exchanges, self.prompt_cache = [], PromptCache(self.prompt_cache.features)

    def drop_image(self, number: int) -> ImageInfo:
        """Take one picture out of the talk, counted from 1 as in ``images``."""
        left = number - 1
        for at, exchange in enumerate(self.exchanges):
            if 0 <= left < len(exchange.images):
                self.exchanges = [*self.exchanges]
                self.exchanges[at] = exchange.without_image(left)
                return exchange.images[left].info
            left -= len(exchange.images)
        count = len(self.images)
        raise UserError(f"no picture {number}; this talk has {count or 'none'}")

    def configure(self, **settings: Any) -> None:
        """Set what holds from the next question on, such as ``system`` or ``v2pe_delta``."""
        wanted = with_overrides(self.generation_config, settings)
        self.check_config(wanted)
        self.generation_config = wanted

    def process_image(self, source: Any) -> ProcessedImage:
        """Open and cut a picture now, as this talk is set; pass the result to ``ask``."""
        return self.processor.process_image(source, self.generation_config)

    def process_video(
        self, source: Any, settings: GenerationConfig | None = None
    ) -> ProcessedVideo:
        """Take the frames of a video now; pass the result to ``ask(video=...)``."""
        return self.processor.process_video(source, settings or self.generation_config)

    @property
    def images(self) -> tuple[ImageInfo, ...]:
        """The pictures of the talk, in order; videos are not counted."""
        return tuple(seen.info for exchange in self.exchanges for seen in exchange.images)

    @property
    def history(self) -> tuple[Message, ...]:
        """The talk as ``vlm.ask(history=...)`` takes it, with the ids of its answers."""
        return tuple(turn for exchange in self.exchanges for turn in exchange.messages())

    @property
    def budget(self) -> ContextBudget:
        """How much of the window and of the memory the talk takes."""
        inputs = self.build_inputs(self.exchanges, Exchange(""), self.generation_config)
        return measure_context(inputs, self.prompt_cache, self.vlm.model, self.generation_config)

    def save(self, path: str | Path, *, cache: bool = False) -> None:
        """Write the talk to one file; with ``cache`` what was read goes beside it, so that after
        ``load`` nothing has to be read again."""
        from internvl3_mlx.generation.conversation_file import write_conversation

        write_conversation(self, Path(path).expanduser(), cache=cache)

    def load(self, path: str | Path) -> bool:
        """Go on with a saved talk in the place of this one; tell whether its cache came along."""
        from internvl3_mlx.generation.conversation_file import read_conversation

        return read_conversation(self, Path(path).expanduser())

    @property
    def processor(self) -> Processor:
        return self.vlm.processor

    def last_exchange(self) -> Exchange:
        if not self.exchanges:
            raise UserError("nothing has been asked yet")
        return self.exchanges[-1]

    def check_config(self, settings: GenerationConfig) -> None:
        if settings.history or settings.video:
            raise UserError("history and video belong to one question; pass them with it")

    def build_inputs(
        self, before: Sequence[Exchange], exchange: Exchange, settings: GenerationConfig
    ) -> ModelInputs:
        """Write the prompt of ``exchange`` after ``before``: exactly what a fresh run reads."""
        history = [turn for past in before for turn in past.messages()]
        shown = [seen for past in [*before, exchange] for seen in past.processed_images]
        return self.processor.build([*history, exchange.user_message], shown, settings)

    def stream_exchange(
        self, before: Sequence[Exchange], exchange: Exchange, settings: GenerationConfig
    ) -> Iterator[AnswerChunk]:
        if settings.history:
            raise UserError("the talk is the history; begin another with vlm.conversation()")
        if self.busy:
            raise PromptError("an answer is still being written; finish or close it first")
        inputs = self.build_inputs(before, exchange, settings)
        self.vlm.check_context_length(inputs, settings)
        return self.record_stream(before, exchange, inputs, settings)

    def record_stream(
        self,
        before: Sequence[Exchange],
        exchange: Exchange,
        inputs: ModelInputs,
        settings: GenerationConfig,
    ) -> Iterator[AnswerChunk]:
        """Pass the pieces on, and keep what was said however it ends."""
        text, ids, whole = "", list[int](), False
        self.busy = True
        pieces = self.vlm.stream_inputs(inputs, settings, self.prompt_cache)
        try:
            for piece in pieces:
                text, whole = text + piece.text, piece.answer is not None
                ids += [] if piece.token_id is None else [piece.token_id]
                yield piece
        finally:
            self.busy = False
            if ids or whole:
                said = replace(exchange, answer=text.strip(), complete=whole)
                if self.ids_match_text(ids, text, settings):
                    said = replace(said, token_ids=tuple(ids))
                self.exchanges = [*before, said]

    def ids_match_text(self, ids: Sequence[int], text: str, settings: GenerationConfig) -> bool:
        """Tell whether ids may stand for an answer in the history: not where a stop string cut
        it, nor where the model made up a picture."""
        tokenizer = self.vlm.tokenizer
        spelled = tokenizer.decode(ids, keep_boxes=settings.keep_boxes)
        return spelled.strip() == text.strip() and tokenizer.image_id not in ids


def final_answer(pieces: Iterator[AnswerChunk]) -> Answer:
    """Run to the end and return the answer."""
    *_, last = pieces
    assert last.answer is not None
    return last.answer
