"""What the serving engine takes and gives: requests, events, and the ways to refuse a request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from internvl3_mlx.errors import InternVL3Error, UserError
from internvl3_mlx.generation.answer import FinishReason
from internvl3_mlx.generation.generation_config import GenerationConfig
from internvl3_mlx.generation.processor import ImageInfo
from internvl3_mlx.images.load import LoadedImage

DEFAULT_RETRY_AFTER_S = 2


@dataclass(frozen=True)
class TextPart:
    """Text of a message. Special tokens in it stay plain text."""

    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """An image of a user's message: the bytes of a file, or a decoded image.

    max_tiles: at most that many tiles for this image, 1 for ``detail: low``; None for the
    request's own limit. name: what errors call it.
    """

    image: bytes | LoadedImage
    max_tiles: int | None = None
    name: str = "image"


@dataclass(frozen=True, eq=False)
class VideoPart:
    """A video of a user's message, as the bytes of its file; each frame is one tile.

    num_frames: None for the request's own number.
    """

    video: bytes
    num_frames: int | None = None
    name: str = "video"


ContentPart = TextPart | ImagePart | VideoPart


@dataclass(frozen=True, eq=False)
class ChatMessage:
    """One message, its parts in the order in which they are read. Only users show images.

    The system prompt is ``AnswerRequest.config.system``.
    """

    role: Literal["user", "assistant"]
    parts: tuple[ContentPart, ...]

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, eq=False)
class AnswerRequest:
    """A question to a model.

    config: system prompt, sampling, seed, stop strings, max_tokens, tile limits, ``v2pe_delta`` and
    constraint. ``history``, ``video``, ``lookup`` and ``draft_model`` have no effect in it.
    model: a name that the engine serves, or ``base:adapter``; "" for the first one.
    n: the number of answers; answer i samples with ``seed + i``.
    best_of: sample that many and return the ``n`` best: by ``critic``, a model that this engine
    serves too, or by the mean log probability of their tokens. Nothing is streamed then.
    logprobs: give the log probability of every token, with the ``top_logprobs`` most likely ones.
    continue_final_message: the last message is the assistant's, and the answer continues it.
    think: ask for a chain of thought first, in <think> tags, by the published system prompt.
    frequency_penalty, presence_penalty, logit_bias: as OpenAI defines them, over the answer alone.
    client: whom the request is from, for a fair order.
    housekeeping: made by a program (titles, tags): answered last, and nothing of it stays cached.
    """

    messages: tuple[ChatMessage, ...]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    model: str = ""
    n: int = 1
    best_of: int | None = None
    critic: str = ""
    logprobs: bool = False
    top_logprobs: int = 0
    continue_final_message: bool = False
    think: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    client: str = ""
    housekeeping: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the logarithm of its probability before temperature and penalties.

    token: its bytes, which may be a part of a character. top: the most likely tokens.
    """

    token_id: int
    token: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()

    @property
    def text(self) -> str:
        return self.token.decode("utf-8", "replace")


@dataclass(frozen=True)
class RequestUsage:
    """Token counts of a request. completion_tokens: of one answer, or of all so far.

    images: every image and frame in the order of the prompt, with its tiles and tokens.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    images: tuple[ImageInfo, ...] = ()

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class RequestTiming:
    """Seconds from the submission on: waiting, reading images and prompt, and decoding."""

    queue_s: float = 0.0
    preprocess_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    load_s: float = 0.0


@dataclass(frozen=True)
class PromptRead:
    """The first event: the prompt has been read."""

    usage: RequestUsage


@dataclass(frozen=True)
class TextDelta:
    """A piece of answer ``index``: text that is final, and the tokens read since the last piece.

    ``text`` is empty while a character, or what may become a stop string, is incomplete.
    """

    text: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class AnswerDone:
    """The end of answer ``index``. After the last one the stream ends.

    text: the whole answer, with boxes in their tags where ``keep_boxes`` asks for them.
    finish_reason: "stop" or "length"; "length" also where the engine was stopped.
    stop_string: the stop string that ended the answer, if one did.
    score: the critic's, or the mean log probability of the tokens, where ``best_of`` chose.
    """

    text: str
    finish_reason: FinishReason
    usage: RequestUsage
    timing: RequestTiming
    index: int = 0
    stop_string: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    score: float | None = None


Event = PromptRead | TextDelta | AnswerDone


class Rejected(UserError):
    """A request that is refused before anything is computed. status: of HTTP."""

    status = 400


class InvalidRequest(Rejected):
    """A field or an image that cannot be used. parameter: its name, if one is to blame."""

    def __init__(self, message: str, parameter: str | None = None):
        super().__init__(message)
        self.parameter = parameter


class ContextTooLong(InvalidRequest):
    """A prompt that is longer than the model's context window."""


class UnknownModel(Rejected):
    """A model or adapter that this engine does not serve. parameter: the field that names it."""

    status = 404

    def __init__(self, message: str, parameter: str = "model"):
        super().__init__(message)
        self.parameter = parameter


class RequestTooLarge(Rejected):
    """A request that can never fit into the memory of this machine."""

    status = 413


class QueueFull(Rejected):
    """Too many requests wait already. retry_after_s: whole seconds, for Retry-After."""

    status = 503

    def __init__(self, message: str, retry_after_s: int = DEFAULT_RETRY_AFTER_S):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(QueueFull):
    """The engine is stopping and takes no more requests."""


class AnswerFailed(InternVL3Error):
    """An answer that ended by a fault after it had begun; the engine and all others go on."""
