"""A conversation about images: every question costs only its own tokens.

Each answer is what a fresh run over the same history would give.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from internvl3_mlx.errors import PromptError, UserError
from internvl3_mlx.generation.answer import Answer, AnswerChunk
from internvl3_mlx.generation.context_budget import ContextBudget, measure_context
from internvl3_mlx.generation.conversation_file import read_conversation, write_conversation
from internvl3_mlx.generation.exchange import Exchange
from internvl3_mlx.generation.generation_config import (
    GenerationConfig,
    InputVideo,
    with_overrides,
)
from internvl3_mlx.generation.open_media import OpenMedia
from internvl3_mlx.generation.processor import (
    ImageInfo,
    InputImage,
    ModelInputs,
    ProcessedImage,
    ProcessedVideo,
    as_sequence,
)
from internvl3_mlx.generation.prompt_cache import PromptCache
from internvl3_mlx.generation.prompt_cache_file import model_fingerprint
from internvl3_mlx.generation.runner import ModelRunner, final_answer
from internvl3_mlx.generation.visual_router import route_known
from internvl3_mlx.prompt.messages import Message
from internvl3_mlx.user_paths import expand_user

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from internvl3_mlx.generation.generation_config import GenerationOptions

T = TypeVar("T")
STILL_ANSWERING = "an answer is still being generated; finish or close it first"


@dataclass(eq=False)
class Conversation:
    """Questions, images and answers, with the prompt cache of what the model has read.

    One answer at a time, also where several threads ask: the second one gets PromptError. When
    generation is interrupted, by closing the stream or by an exception, the tokens so far become
    the answer; if there are none, or only a thought, nothing has changed. A thought is never part
    of the history.
    """

    runner: ModelRunner
    generation_config: GenerationConfig
    exchanges: list[Exchange] = field(default_factory=list[Exchange])
    prompt_cache: PromptCache = field(default_factory=PromptCache)
    answering: Lock = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        self.check_config(self.generation_config)

    def ask(
        self,
        question: str,
        images: InputImage | Sequence[InputImage] = (),
        **options: "Unpack[GenerationOptions]",
    ) -> Answer:
        """Ask a question, with new images if there are any, and return the answer.

        options: for this question only.
        """
        return final_answer(self.stream(question, images, **options))

    def stream(
        self,
        question: str,
        images: InputImage | Sequence[InputImage] = (),
        **options: "Unpack[GenerationOptions]",
    ) -> Iterator[AnswerChunk]:
        """Yield the answer chunk by chunk; ``options`` apply to this question only."""
        config = with_overrides(self.generation_config, options)
        self.check_free()
        features = self.prompt_cache.features
        media = self.runner.open_media(as_sequence(images), config, features)
        exchange = Exchange(question, tuple(media.images), tuple(media.videos))
        return self.stream_exchange(self.exchanges, exchange, config, media)

    def retry(self, **options: "Unpack[GenerationOptions]") -> Answer:
        """Answer the last question again and replace its answer."""
        return final_answer(self.stream_retry(**options))

    def stream_retry(self, **options: "Unpack[GenerationOptions]") -> Iterator[AnswerChunk]:
        """Yield a new answer to the last question; it replaces the old one once it has begun."""
        last = self.last_exchange()
        again = Exchange(last.question, last.images, last.videos)
        config = with_overrides(self.generation_config, options)
        return self.stream_exchange(self.exchanges[:-1], again, config)

    def replace_last_answer(self, answer: Answer) -> None:
        """Put another answer to the last question in the place of the present one."""
        last, config = self.last_exchange(), self.generation_config
        same = self.ids_match_text(answer.token_ids, answer.text, config)
        ids = tuple(answer.token_ids) if same else ()
        replaced = replace(last, answer=answer.text, token_ids=ids, complete=True)
        self.exchanges = [*self.exchanges[:-1], replaced]

    def undo(self) -> Exchange:
        """Remove the last question with its answer and its images, and return it."""
        last = self.last_exchange()
        self.exchanges = self.exchanges[:-1]
        return last

    def drop_oldest(self, count: int = 1) -> None:
        """Remove the oldest ``count`` questions with their answers and images."""
        self.last_exchange()  # raises where there is none
        if not 1 <= count <= len(self.exchanges):
            raise UserError(
                f"cannot remove {count} of the questions; choose from 1 to {len(self.exchanges)}"
            )
        self.exchanges = self.exchanges[count:]

    def clear(self) -> None:
        """Start over and free the KV cache; image features stay cached."""
        self.exchanges, self.prompt_cache = [], PromptCache(self.prompt_cache.features)

    def drop_image(self, number: int) -> ImageInfo:
        """Remove image ``number`` of the conversation, counted from 1 as in ``images``."""
        index = number - 1
        for position, exchange in enumerate(self.exchanges):
            if 0 <= index < len(exchange.images):
                self.exchanges = [*self.exchanges]
                self.exchanges[position] = exchange.without_image(index)
                return exchange.images[index].info
            index -= len(exchange.images)
        raise UserError(f"no image {number}; this conversation has {len(self.images) or 'none'}")

    def configure(self, **options: "Unpack[GenerationOptions]") -> None:
        """Change options from the next question on, such as ``system`` or ``v2pe_delta``."""
        config = with_overrides(self.generation_config, options)
        self.check_config(config)
        self.runner.check_config(config)
        self.generation_config = config

    def with_runner(
        self, runner: ModelRunner, pending: Sequence[ProcessedImage | ProcessedVideo] = ()
    ) -> "Conversation":
        """Return this conversation with another model, which reads it again at the next question.

        pending: images and videos that are still to be sent. Raises UserError where the tiles of
        the images are not those of the other model.
        """
        ours, theirs = (
            (one.config.force_image_size, one.config.num_image_token)
            for one in (self.runner, runner)
        )
        has_media = bool(pending) or any(past.processed_images for past in self.exchanges)
        if has_media and ours != theirs:
            raise UserError(
                f"{runner.name} cuts images into tiles of {theirs[0]} pixels, this model of "
                f"{ours[0]}; start a new conversation with /clear, or drop the images"
            )
        runner.check_config(self.generation_config)
        same = model_fingerprint(runner.model) == model_fingerprint(self.runner.model)
        exchanges = [past if same else past.without_token_ids() for past in self.exchanges]
        return Conversation(runner, self.generation_config, exchanges)

    def process_image(self, image: InputImage) -> ProcessedImage:
        """Open and tile an image now, with this conversation's options; pass the result to ``ask``.

        Raises ImageError.
        """
        return self.runner.processor.process_image(image, self.generation_config)

    def process_video(
        self, video: InputVideo, generation_config: GenerationConfig | None = None
    ) -> ProcessedVideo:
        """Read the frames of a video now; pass the result to ``ask(video=...)``.

        Raises ImageError.
        """
        return self.runner.processor.process_video(
            video, generation_config or self.generation_config
        )

    def encode_early(self, media: Sequence[ProcessedImage | ProcessedVideo]) -> None:
        """Encode what is about to be asked about, while more of it is opened on a thread.

        The answer finds the visual tokens in the prompt cache, so its statistics leave them out.
        """
        frames = [one.frames if isinstance(one, ProcessedVideo) else (one,) for one in media]
        images = [image for part in frames for image in part]
        self.runner.encode_early(images, self.generation_config, self.prompt_cache.features)

    @property
    def images(self) -> tuple[ImageInfo, ...]:
        """The images of the conversation in order; videos are not counted."""
        return tuple(image.info for exchange in self.exchanges for image in exchange.images)

    @property
    def history(self) -> tuple[Message, ...]:
        """The messages so far, as ``vlm.ask(history=...)`` takes them, with the ids of answers."""
        return tuple(message for exchange in self.exchanges for message in exchange.messages())

    @property
    def budget(self) -> ContextBudget:
        """How much of the context window and of the memory the conversation takes."""
        model, config = self.runner.model, self.generation_config
        inputs = self.build_inputs(self.exchanges, Exchange(""), config)
        inputs = route_known(model, inputs, config, self.prompt_cache.features)
        return measure_context(inputs, self.prompt_cache, model, config)

    def save(self, path: str | Path, *, cache: bool = False) -> None:
        """Save the conversation to one file.

        cache: save the prompt cache beside it, so that nothing is read again after ``load``.
        Raises UserError where the file cannot be written.
        """
        if cache and self.runner.mirror is not None:
            raise UserError(
                "a prompt cache cannot be saved where several processes hold the model, each a "
                "part of it; save the conversation without its cache"
            )
        prompt_cache = self.prompt_cache if cache else None
        write_conversation(
            expand_user(path),
            self.exchanges,
            self.generation_config,
            self.runner,
            prompt_cache,
        )

    def load(self, path: str | Path) -> bool:
        """Replace this conversation by a saved one; return whether its prompt cache is usable.

        Raises UserError for a file that is not a saved conversation, and changes nothing then.
        """
        saved = read_conversation(
            expand_user(path), self.generation_config, self.runner, self.prompt_cache
        )
        self.generation_config = saved.generation_config
        self.exchanges = saved.exchanges
        return saved.has_cache

    def last_exchange(self) -> Exchange:
        if not self.exchanges:
            raise UserError("nothing has been asked yet; ask a question first")
        return self.exchanges[-1]

    def check_config(self, config: GenerationConfig) -> None:
        """Raise UserError for options that belong to a single question."""
        if config.history or config.video:
            raise UserError("history and video belong to one question; pass them to ask")

    def build_inputs(
        self, before: Sequence[Exchange], exchange: Exchange, config: GenerationConfig
    ) -> ModelInputs:
        """Build the prompt of ``exchange`` after ``before``: exactly what a fresh run reads."""
        history = [message for past in before for message in past.messages()]
        images = [image for past in [*before, exchange] for image in past.processed_images]
        return self.runner.processor.build([*history, exchange.user_message], images, config)

    def check_free(self) -> None:
        """Raise PromptError while another answer is generated."""
        if self.answering.locked():
            raise PromptError(STILL_ANSWERING)

    def stream_exchange(
        self,
        before: Sequence[Exchange],
        exchange: Exchange,
        config: GenerationConfig,
        media: OpenMedia | None = None,
    ) -> Iterator[AnswerChunk]:
        """Check that ``exchange`` can be asked after ``before``, then stream its answer.

        media: what has just been opened for it, for the statistics.
        """
        if config.history:
            raise UserError(
                "a conversation has its own history; start another with vlm.conversation()"
            )
        self.check_free()
        base = self.exchanges
        inputs = self.build_inputs(before, exchange, config)
        if media is not None:
            inputs = media.describe(inputs)
        self.runner.check_context_length(inputs, config)
        return self.stream_exclusively(base, self.record_stream(before, exchange, inputs, config))

    def stream_exclusively(self, base: Sequence[Exchange], stream: Iterator[T]) -> Iterator[T]:
        """Yield ``stream`` while no other answer is generated, and only if it still fits.

        base: the exchanges when the prompt was built. An answer recorded since would be lost.
        """
        if not self.answering.acquire(blocking=False):
            raise PromptError(STILL_ANSWERING)
        try:
            if self.exchanges is not base:
                raise PromptError("the conversation has changed since this question; ask it again")
            with closing(stream):  # type: ignore[type-var]
                yield from stream
        finally:
            self.answering.release()

    def record_stream(
        self,
        before: Sequence[Exchange],
        exchange: Exchange,
        inputs: ModelInputs,
        config: GenerationConfig,
    ) -> Iterator[AnswerChunk]:
        """Yield the answer's chunks, and record what was generated however it ends."""
        text, ids, complete = "", list[int](), False
        try:
            for chunk in self.runner.stream(inputs, config, self.prompt_cache):
                text, complete = text + chunk.text, chunk.answer is not None
                ids += [] if chunk.token_id is None else [chunk.token_id]
                yield chunk
        finally:
            thinks = config.think and not text.strip()
            if complete or (ids and not thinks):
                answered = replace(exchange, answer=text.strip(), complete=complete)
                self.exchanges = recorded = [*before, answered]  # before anything else can fail
                if self.ids_match_text(ids, text, config):
                    recorded[-1] = replace(answered, token_ids=tuple(ids))

    def ids_match_text(self, ids: Sequence[int], text: str, config: GenerationConfig) -> bool:
        """Tell whether ids may represent an answer in the history.

        They may not where a stop string cut the text, nor where the model generated image tokens.
        Those of GPT-OSS may hold a thought; the template rewrites its answers.
        """
        tokenizer = self.runner.tokenizer
        if tokenizer.is_harmony:
            return False
        decoded = tokenizer.decode(ids, keep_boxes=config.keep_boxes)
        return decoded.strip() == text.strip() and tokenizer.image_id not in ids
