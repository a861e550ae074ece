"""``/best N`` of the chat: answer the last question again with the best of N candidates."""

from dataclasses import replace
from typing import TYPE_CHECKING

from internvl3_mlx.cli import console
from internvl3_mlx.cli.best_of import (
    MAX_CANDIDATES,
    BestOfRequest,
    describe_result,
    load_critic,
    run_best_of,
)
from internvl3_mlx.cli.chat_session import ANSWER_UNCHANGED, ChatSession, make_answer_writer
from internvl3_mlx.errors import UserError

if TYPE_CHECKING:
    from internvl3_mlx.generation.exchange import Exchange
    from internvl3_mlx.generation.generation_config import GenerationConfig
    from internvl3_mlx.test_time_scaling.best_of import BestOfResult
    from internvl3_mlx.test_time_scaling.critic import Critic

DEFAULT_CANDIDATES = 8


def answer_best(session: ChatSession, argument: str) -> None:
    """Replace the last answer by the best of N; a stopped one leaves it unchanged."""
    last = session.conversation.last_exchange()
    request = replace(session.best_of or BestOfRequest(), n=parse_count(argument))
    critic = get_critic(session, last, request)
    session.log_question_again()
    try:
        result = find_best(session, last, request, critic)
    except KeyboardInterrupt:
        console.end_line()
        console.hint(ANSWER_UNCHANGED)
        return
    session.conversation.replace_last_answer(result.answer)
    if session.log is not None:
        session.log.add_text(result.answer.text)
    writer = make_answer_writer()
    writer.add(result.answer.text)
    writer.finish()
    if not session.quiet:
        console.hint(describe_result(result))


def parse_count(argument: str) -> int:
    if not argument:
        return DEFAULT_CANDIDATES
    if not argument.isdecimal() or not 1 <= int(argument) <= MAX_CANDIDATES:
        raise UserError(f"/best needs a number from 1 to {MAX_CANDIDATES}, not {argument}")
    return int(argument)


def get_critic(session: ChatSession, last: "Exchange", request: BestOfRequest) -> "Critic | None":
    """Return the critic of the chat, loaded at its first use; None to choose without one.

    Raises UserError where it cannot judge what was asked.
    """
    if request.critic is None:
        return None
    if last.videos:
        raise UserError("a critic judges images alone, and this question has a video")
    if session.critic is None:
        session.critic = load_critic(request, quiet=session.quiet)
    ours, theirs = (
        (one.config.force_image_size, one.config.num_image_token)
        for one in (session.conversation.runner, session.critic.runner)
    )
    if last.images and ours != theirs:
        raise UserError(
            f"the critic cuts images into tiles of {theirs[0]} pixels, this model of {ours[0]}; "
            "use internvl3 generate --best-of"
        )
    return session.critic


def candidate_config(config: "GenerationConfig") -> "GenerationConfig":
    """Return the options of the chat with what candidates need where nothing is set."""
    from internvl3_mlx.test_time_scaling.candidates import BEST_OF_DEFAULTS as DEFAULTS

    seed = int(DEFAULTS["seed"]) if config.seed is None else config.seed
    alone = replace(config, seed=seed, lookup=False, draft_model=None)
    if config.temperature:
        return alone
    return replace(alone, temperature=DEFAULTS["temperature"], top_p=DEFAULTS["top_p"])


def find_best(
    session: ChatSession, last: "Exchange", request: BestOfRequest, critic: "Critic | None"
) -> "BestOfResult":
    """Write the candidates after the conversation so far, and choose."""
    from internvl3_mlx.generation.exchange import Exchange
    from internvl3_mlx.test_time_scaling.best_of import (
        BestOfConfig,
        BestOfQuestion,
        best_of_events,
        default_method,
    )

    conversation = session.conversation
    config = candidate_config(conversation.generation_config)
    asked = BestOfQuestion(last.question, last.processed_images, config)
    method = request.method or default_method(critic is not None)
    how = BestOfConfig(n=request.n, method=method, critic_mode=request.critic_mode)
    again = Exchange(last.question, last.images, last.videos)
    inputs = conversation.build_inputs(conversation.exchanges[:-1], again, config)
    conversation.runner.check_context_length(inputs, config)
    events = best_of_events(
        asked, how, conversation.runner, critic, inputs=inputs, cache=conversation.prompt_cache
    )
    stream = conversation.stream_exclusively(conversation.exchanges, events)
    return run_best_of(stream, quiet=session.quiet)
