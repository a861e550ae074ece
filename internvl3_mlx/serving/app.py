"""The HTTP application: the routes of four APIs and the page over one engine."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import internvl3_mlx
from internvl3_mlx.serving import (
    anthropic,
    ollama,
    openai_chat,
    openai_responses,
    page_routes,
    served_models,
)
from internvl3_mlx.serving.access import AccessMiddleware, AccessPolicy
from internvl3_mlx.serving.answers import RunningAnswer, ServerContext, start_answer
from internvl3_mlx.serving.content import ParsedChat, open_chat
from internvl3_mlx.serving.errors import (
    FAILED,
    NOT_FOUND,
    TOO_LARGE,
    UNAVAILABLE,
    APIError,
    as_api_error,
    dialect_of,
    unsupported,
)
from internvl3_mlx.serving.interface import ServingEngine
from internvl3_mlx.serving.limits import ServerLimits
from internvl3_mlx.serving.metrics import CONTENT_TYPE, HTTPMetrics, prometheus_text
from internvl3_mlx.serving.request_body import read_json
from internvl3_mlx.serving.request_log import NOTE_KEY, RequestLogMiddleware, RequestNote, WriteLine
from internvl3_mlx.serving.requests import AnswerDone, AnswerRequest, ChatMessage, Rejected
from internvl3_mlx.serving.stored_responses import ResponseStore, StoredResponse
from internvl3_mlx.serving.streams import (
    CLOSE,
    NDJSON,
    SSE,
    ClientLeft,
    StreamedAnswer,
    discard_body,
    while_connected,
)

USER_HEADER = "x-openwebui-user-id"  # many people behind one address
Handler = Callable[["Server", Request], Any]


class Reply(Protocol):
    """Formats an answer for one API."""

    def whole(self, answers: Sequence[AnswerDone], running: RunningAnswer) -> dict[str, Any]: ...

    def stream(self, running: RunningAnswer) -> AsyncIterator[bytes]: ...


@dataclass(frozen=True)
class Server:
    """What the routes share. fingerprint: of this version, for OpenAI's clients."""

    context: ServerContext
    responses: ResponseStore
    http: HTTPMetrics
    report_fault: Callable[[BaseException], None]
    fingerprint: str = f"internvl3-mlx-{internvl3_mlx.__version__}"

    @property
    def engine(self) -> ServingEngine:
        return self.context.engine

    @property
    def limits(self) -> ServerLimits:
        return self.context.limits

    async def read(self, request: Request) -> dict[str, Any]:
        return await read_json(request.stream(), request.headers.get("content-length"), self.limits)

    async def submit(
        self,
        request: Request,
        chat: ParsedChat,
        model: str | None,
        make: Callable[[tuple[ChatMessage, ...]], AnswerRequest],
        earlier: tuple[ChatMessage, ...] = (),
    ) -> tuple[AnswerRequest, RunningAnswer]:
        """Open a chat's media and give it to the engine. earlier: messages before those."""

        async def work() -> tuple[AnswerRequest, RunningAnswer]:
            messages = await open_chat(chat, self.limits)
            made = replace(make((*earlier, *messages)), model=name, client=client_of(request))
            return made, await start_answer(self.context, made, note_of(request))

        name = served_models.find_model(self.engine, model).name
        return await while_connected(request, work())

    async def reply(
        self, request: Request, running: RunningAnswer, reply: Reply, *, streams: bool, kind: str
    ) -> ASGIApp:
        if streams:
            pieces = reply.stream(running)
            return StreamedAnswer(pieces, kind, running.close, keep_alive=kind == SSE)
        try:
            answers = await while_connected(request, running.finish())
        finally:
            await running.close()
        return JSONResponse(reply.whole(answers, running))


def note_of(request: Request) -> RequestNote:
    note: RequestNote = request.scope[NOTE_KEY]
    return note


def client_of(request: Request) -> str:
    """Return whom a request is from, for a fair order."""
    host = request.client.host if request.client else ""
    return request.headers.get(USER_HEADER, "")[:100] or host


async def chat_completions(server: Server, request: Request) -> ASGIApp:
    body, chat = openai_chat.parse_body(await server.read(request))
    make = partial(make_with, openai_chat.make_request, body, chat, server.limits)
    made, running = await server.submit(request, chat, body.model, make)
    reply = openai_chat.ChatReply(made.model, server.fingerprint, body)
    return await server.reply(request, running, reply, streams=bool(body.stream), kind=SSE)


def make_with(
    make: Callable[..., AnswerRequest],
    body: Any,
    chat: ParsedChat,
    limits: ServerLimits,
    messages: tuple[ChatMessage, ...],
) -> AnswerRequest:
    return make(body, chat.system, messages, limits)


async def create_response(server: Server, request: Request) -> ASGIApp:
    body, chat = openai_responses.parse_body(await server.read(request))
    before: tuple[ChatMessage, ...] = ()
    if body.previous_response_id is not None:
        before = server.responses.get(body.previous_response_id).messages
    make = partial(make_with, openai_responses.make_request, body, chat, server.limits)
    made, running = await server.submit(request, chat, body.model, make, before)
    reply = openai_responses.ResponseReply(made.model, body)
    if body.store is not False:
        reply.on_end = partial(store_response, server.responses, made.messages)
    return await server.reply(request, running, reply, streams=bool(body.stream), kind=SSE)


def store_response(
    store: ResponseStore, messages: tuple[ChatMessage, ...], content: Mapping[str, Any], text: str
) -> None:
    """Keep a response with its conversation, the answer included."""
    answer = openai_responses.answer_message(text)
    store.add(content["id"], StoredResponse(content, (*messages, answer)))


async def get_response(server: Server, request: Request) -> ASGIApp:
    stored = server.responses.get(request.path_params["id"], "response_id")
    return JSONResponse(dict(stored.content))


async def delete_response(server: Server, request: Request) -> ASGIApp:
    id = request.path_params["id"]
    server.responses.remove(id)
    return JSONResponse({"id": id, "object": "response", "deleted": True})


async def create_message(server: Server, request: Request) -> ASGIApp:
    body, chat = anthropic.parse_body(await server.read(request))
    make = partial(make_with, anthropic.make_request, body, chat, server.limits)
    made, running = await server.submit(request, chat, body.model, make)
    reply = anthropic.MessageReply(made.model)
    return await server.reply(request, running, reply, streams=bool(body.stream), kind=SSE)


async def count_message_tokens(server: Server, request: Request) -> ASGIApp:
    body, chat = anthropic.parse_count_body(await server.read(request))
    name = served_models.find_model(server.engine, body.model).name

    async def work() -> int:
        messages = await open_chat(chat, server.limits)
        made = anthropic.make_count_request(body, chat.system, messages)
        return await server.engine.count_tokens(replace(made, model=name))

    return JSONResponse({"input_tokens": await while_connected(request, work())})


async def ollama_answer(server: Server, request: Request, *, generates: bool) -> ASGIApp:
    body, chat = ollama.parse_body(await server.read(request))
    if chat is None:
        return await ollama_load(server, body, generates)
    make = partial(make_with, ollama.make_request, body, chat, server.limits)
    made, running = await server.submit(request, chat, body.model, make)
    reply = ollama.OllamaReply(body.model or made.model, generates)
    return await server.reply(request, running, reply, streams=body.streams, kind=NDJSON)


async def ollama_load(server: Server, body: ollama.OllamaBody, generates: bool) -> ASGIApp:
    """Load a model, or put it away: requests without a question ask for that."""
    name = served_models.find_model(server.engine, body.model).name
    puts_away = body.keep_alive in (0, "0", "0s")
    if puts_away:
        await server.engine.unload(name)
    else:
        await server.engine.load(name)
    reply = ollama.OllamaReply(body.model or name, generates)
    return JSONResponse(reply.loaded("unload" if puts_away else "load"))


async def ollama_tags(server: Server, request: Request) -> ASGIApp:
    models = server.engine.status().models
    return JSONResponse({"models": [ollama.describe_model(model) for model in models]})


async def ollama_running(server: Server, request: Request) -> ASGIApp:
    loaded = [model for model in server.engine.status().models if model.loaded]
    return JSONResponse({"models": [ollama.describe_running(model) for model in loaded]})


async def ollama_show(server: Server, request: Request) -> ASGIApp:
    content = await server.read(request)
    name = content.get("model") or content.get("name")
    if name is not None and not isinstance(name, str):
        raise unsupported("model", "give it as text")
    return JSONResponse(ollama.show_model(served_models.find_model(server.engine, name)))


async def ollama_version(server: Server, request: Request) -> ASGIApp:
    return JSONResponse({"version": ollama.API_VERSION})


async def list_models(server: Server, request: Request) -> ASGIApp:
    return JSONResponse(served_models.list_models(server.engine))


async def get_model(server: Server, request: Request) -> ASGIApp:
    model = served_models.find_model(server.engine, request.path_params["name"])
    return JSONResponse(served_models.describe_model(model))


async def health(server: Server, request: Request) -> ASGIApp:
    """Tell whether the server works: 503 where it is stopping or its engine has ended."""
    status = server.engine.status()
    word = "stopping" if status.stopping else "ok" if status.alive else "failed"
    if word == "ok" and not any(model.loaded for model in status.models):
        word = "loading"
    content = {"status": word, "version": internvl3_mlx.__version__}
    return JSONResponse(content, 200 if word in ("ok", "loading") else UNAVAILABLE)


async def metrics(server: Server, request: Request) -> ASGIApp:
    return PlainTextResponse(prometheus_text(server.engine, server.http), media_type=CONTENT_TYPE)


async def page_settings(server: Server, request: Request) -> ASGIApp:
    return JSONResponse(page_routes.describe_page(server.context))


async def page_tiles(server: Server, request: Request) -> ASGIApp:
    return page_routes.count_tiles(request, server.context)


ROUTES: Sequence[tuple[str, str, Handler]] = (
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/chat/completions", chat_completions),
    ("POST", "/v1/responses", create_response),
    ("POST", "/responses", create_response),
    ("GET", "/v1/responses/{id}", get_response),
    ("DELETE", "/v1/responses/{id}", delete_response),
    ("POST", "/v1/messages", create_message),
    ("POST", "/v1/messages/count_tokens", count_message_tokens),
    ("GET", "/v1/models", list_models),
    ("GET", "/models", list_models),
    ("GET", "/v1/models/{name:path}", get_model),
    ("POST", "/api/chat", partial(ollama_answer, generates=False)),
    ("POST", "/api/generate", partial(ollama_answer, generates=True)),
    ("GET", "/api/tags", ollama_tags),
    ("GET", "/api/ps", ollama_running),
    ("POST", "/api/show", ollama_show),
    ("GET", "/api/version", ollama_version),
    ("GET", "/health", health),
    ("GET", "/metrics", metrics),
    ("GET", "/chat/settings", page_settings),
    ("GET", "/chat/tiles", page_tiles),
)


def make_app(
    engine: ServingEngine,
    limits: ServerLimits,
    policy: AccessPolicy,
    *,
    write_line: WriteLine,
    report_fault: Callable[[BaseException], None],
) -> ASGIApp:
    """Make the application over an engine that whoever runs it starts and stops.

    write_line: takes the line of each request. report_fault: takes what nobody foresaw.
    """
    server = Server(ServerContext(engine, limits), ResponseStore(), HTTPMetrics(), report_fault)

    return Starlette(
        routes=[
            *(Route(path, guarded(server, serve), methods=[m]) for m, path, serve in ROUTES),
            Route("/", page_routes.show_page),
            Route("/page/samples/{name}", page_routes.show_sample),
            Route("/page/{name}", page_routes.show_page_file),
        ],
        middleware=[
            Middleware(RequestLogMiddleware, write_line=write_line, count=server.http.count),
            Middleware(AccessMiddleware, policy=policy),
        ],
        exception_handlers={
            APIError: partial(error_answer, server),
            HTTPException: answer_http_error,
        },
    )


def guarded(server: Server, serve: Handler) -> Callable[[Request], Any]:
    """Wrap a handler: any exception becomes an answer in the shape of its API."""

    async def endpoint(request: Request) -> ASGIApp:
        try:
            answer: ASGIApp = await serve(server, request)
        except ClientLeft:
            raise
        except Exception as fault:  # noqa: BLE001  no request may end without an answer
            return await error_answer(server, request, fault)
        return answer

    return endpoint


async def error_answer(server: Server, request: Request, fault: Exception) -> Response:
    """Return the response for an error; an unforeseen one is reported."""
    error = as_api_error(fault)
    headers = dict(error.headers)
    if error.status >= FAILED and not isinstance(fault, APIError | Rejected):
        note_of(request).fault = type(fault).__name__
        server.report_fault(fault)
    if error.unread:
        headers |= CLOSE
        if error.status == TOO_LARGE:
            await discard_body(request.receive)
    return JSONResponse(error.body(dialect_of(request.url.path)), error.status, headers=headers)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: an unknown path or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    message = f"this server has no {method} {path[:80]}; its guide lists what it has"
    if error.status_code != NOT_FOUND:
        message = f"{path[:80]} does not take {method}"
    made = APIError(error.status_code, message, headers=error.headers or {})
    return JSONResponse(made.body(dialect_of(path)), made.status, headers=dict(made.headers))
