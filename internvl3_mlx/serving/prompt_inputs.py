"""From a request to what the model reads. Nothing here computes with MLX: it runs on threads."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from threading import Lock

from internvl3_mlx.config import ModelConfig
from internvl3_mlx.errors import UserError
from internvl3_mlx.generation.context_budget import context_overflow_message
from internvl3_mlx.generation.engine import remaining_context
from internvl3_mlx.generation.generation_config import GREEDY, GenerationConfig
from internvl3_mlx.generation.processor import ModelInputs, ProcessedImage, Processor
from internvl3_mlx.generation.row_sampler import TokenConstraint
from internvl3_mlx.generation.structured import make_constraint, needs_constraint
from internvl3_mlx.generation.thinking import make_thought_constraint
from internvl3_mlx.generation.visual_router import check_flash_options, is_routable
from internvl3_mlx.prompt.messages import Message, MessageMedia
from internvl3_mlx.serving.requests import (
    AnswerRequest,
    ChatMessage,
    ContextTooLong,
    ImagePart,
    InvalidRequest,
    TextPart,
    VideoPart,
)
from internvl3_mlx.serving.tiled_images import TiledImages

MAX_TOP_LOGPROBS = 20
GRAMMAR_LOCK = Lock()  # the tokenizer's table for llguidance is built once


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A request's prompt. max_tokens: of an answer, also by the context that is left after it.

    ntk: whether dynamic NTK may extend the context. constraints: one for each answer, or none.
    """

    inputs: ModelInputs
    max_tokens: int
    ntk: bool
    constraints: tuple[TokenConstraint, ...]


def prepare_request(
    processor: Processor, request: AnswerRequest, tiled: TiledImages
) -> PreparedRequest:
    """Decode the images, build the prompt and compile the constraint.

    tiled: images that were decoded before. Raises ``InvalidRequest`` for what cannot be read or
    used.
    """
    try:
        check_flash_options(processor.config, request.config, request.model or "this model")
        inputs = build_inputs(processor, request, tiled)
        constraints = make_constraints(processor, request)
    except InvalidRequest:
        raise
    except UserError as error:
        raise InvalidRequest(str(error)) from error
    config = request.config
    ntk = config.ntk and inputs.uses_unit_positions
    if is_routable(processor.config, inputs, config):
        limit = config.max_tokens  # decided once it is known which tiles are compressed
    else:
        limit = answer_limit(inputs, processor.config, config)
    for image in inputs.processed_images:
        _ = image.content_hash  # computed here, where it holds up nobody
    return PreparedRequest(inputs, limit, ntk, constraints)


def answer_limit(inputs: ModelInputs, model: ModelConfig, config: GenerationConfig) -> int:
    """Return how many tokens an answer may have, also by the context that is left.

    Raises ``ContextTooLong`` where none is.
    """
    ntk = config.ntk and inputs.uses_unit_positions
    left = remaining_context(inputs.next_position, model.text, ntk=ntk)
    if left < 0:
        raise ContextTooLong(context_overflow_message(inputs, model), "messages")
    return min(config.max_tokens, max(left, 1))


def build_inputs(processor: Processor, request: AnswerRequest, tiled: TiledImages) -> ModelInputs:
    """Build the prompt of a request's messages, with their media where they stand."""
    asked, continued = split_continuation(request)
    messages, images = list[Message](), list[ProcessedImage]()
    for chat_message in asked:
        message, shown = read_message(processor, chat_message, request.config, tiled)
        messages.append(message)
        images += shown
    return processor.build(messages, images, request.config, continued=continued)


def served_request(request: AnswerRequest, kv_bits: int | None = None) -> AnswerRequest:
    """Return a request whose config says all that matters, and nothing that a server leaves out.

    kv_bits: the server's, where the request has none.
    Choices are decoded token by token within their grammar. Raises ``InvalidRequest`` for options
    that exclude each other.
    """
    try:
        config = replace(
            request.config,
            history=(),
            video=(),
            lookup=False,
            draft_model=None,
            kv_bits=request.config.kv_bits or kv_bits,
            choice_mode=GREEDY,
            think=request.think or request.config.think,
        )
    except UserError as error:
        raise InvalidRequest(str(error), "think") from error
    return replace(request, config=config)


def split_continuation(request: AnswerRequest) -> tuple[tuple[ChatMessage, ...], str]:
    """Return the messages to be answered, and the beginning of the answer."""
    if not request.continue_final_message:
        return request.messages, ""
    if not request.messages or request.messages[-1].role != "assistant":
        raise InvalidRequest(
            "continue_final_message continues an assistant's message, but the last message is "
            "another's; end with the message to continue",
            "continue_final_message",
        )
    return request.messages[:-1], request.messages[-1].text


def read_message(
    processor: Processor, message: ChatMessage, config: GenerationConfig, tiled: TiledImages
) -> tuple[Message, list[ProcessedImage]]:
    """Read the media of one message; return it with its images and frames in order."""
    texts, media, images = [""], list[MessageMedia](), list[ProcessedImage]()
    after_text = False
    for part in message.parts:
        if isinstance(part, TextPart):
            texts[-1] += "\n" * after_text + part.text
            after_text = True
            continue
        shown, medium = read_media(processor, part, config, tiled)
        images += shown
        media.append(medium)
        texts.append("")
        after_text = False
    if not media:
        return Message(message.role, texts[0]), []
    if message.role != "user":
        raise InvalidRequest(
            "an assistant's message shows an image; put it into a user's message", "messages"
        )
    return Message(message.role, "".join(texts), tuple(media), texts=tuple(texts)), images


def read_media(
    processor: Processor, part: ImagePart | VideoPart, config: GenerationConfig, tiled: TiledImages
) -> tuple[Iterable[ProcessedImage], MessageMedia]:
    """Decode and tile an image, or the frames of a video."""
    if isinstance(part, VideoPart):
        frames = config.num_frames if part.num_frames is None else part.num_frames
        video = processor.process_video(part.video, replace(config, num_frames=frames))
        return video.frames, video.media
    image = tiled.process(processor, part.image, tile_limits(config, part.max_tiles))
    return [image], MessageMedia((image.info.tiles,))


def tile_limits(config: GenerationConfig, max_tiles: int | None) -> GenerationConfig:
    """Apply the limit of one image; the smaller one counts."""
    if max_tiles is None:
        return config
    most = min(max_tiles, config.max_tiles or max_tiles)
    least = None if config.min_tiles is None else min(config.min_tiles, most)
    return replace(config, max_tiles=most, min_tiles=least)


def make_constraints(processor: Processor, request: AnswerRequest) -> tuple[TokenConstraint, ...]:
    """Make a constraint for each answer: a grammar, or the budget of its thought."""
    config = request.config
    if not (needs_constraint(config) or config.think_budget is not None):
        return ()
    if request.continue_final_message:
        raise InvalidRequest(
            "a constraint or a think_budget holds for a whole answer and cannot begin within one; "
            "drop it, or continue_final_message",
            "continue_final_message",
        )
    tokenizer, vocab_size = processor.tokenizer, processor.config.text.vocab_size
    made = list[TokenConstraint]()
    with GRAMMAR_LOCK:
        for _ in range(request.best_of or request.n):
            thought = make_thought_constraint(config, tokenizer)
            made.append(thought or make_constraint(config, tokenizer, vocab_size))
    return tuple(made)


def check_request(request: AnswerRequest, most_answers: int) -> None:
    """Raise ``InvalidRequest`` for settings that contradict each other or exceed a limit."""
    if not request.messages:
        raise InvalidRequest("messages is empty; send at least one", "messages")
    if not 1 <= request.n <= most_answers:
        raise InvalidRequest(f"n is {request.n}; choose 1 to {most_answers}", "n")
    if request.best_of is not None and not request.n <= request.best_of <= most_answers:
        raise InvalidRequest(
            f"best_of is {request.best_of}; choose {request.n} (n) to {most_answers}", "best_of"
        )
    check_best_of(request)
    for name in ("frequency_penalty", "presence_penalty"):
        if not -2 <= getattr(request, name) <= 2:
            raise InvalidRequest(f"{name} is {getattr(request, name)}; choose -2 to 2", name)
    if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"top_logprobs is {request.top_logprobs}; choose 0 to {MAX_TOP_LOGPROBS}",
            "top_logprobs",
        )


def check_best_of(request: AnswerRequest) -> None:
    """Raise ``InvalidRequest`` where the best cannot be chosen."""
    if request.best_of is None:
        if request.critic:
            raise InvalidRequest("critic chooses among answers; set best_of too", "critic")
        return
    if request.config.temperature == 0 and request.best_of > 1:
        raise InvalidRequest(
            "best_of needs a temperature above 0, or all candidates are equal", "temperature"
        )
    parts = [part for message in request.messages for part in message.parts]
    asks_once = len(request.messages) == 1 and request.messages[0].role == "user"
    if request.critic and not (asks_once and not any(isinstance(p, VideoPart) for p in parts)):
        raise InvalidRequest(
            "a critic judges one question about images; drop other messages and videos, or critic",
            "critic",
        )


def check_token_bias(request: AnswerRequest, vocab_size: int) -> None:
    """Raise ``InvalidRequest`` for a bias of a token that the model does not have."""
    for token_id, bias in request.logit_bias.items():
        if not (0 <= token_id < vocab_size and -100 <= bias <= 100):
            raise InvalidRequest(
                f"logit_bias {token_id}: {bias} is not a token of this model's {vocab_size:,} with "
                "a bias from -100 to 100",
                "logit_bias",
            )
