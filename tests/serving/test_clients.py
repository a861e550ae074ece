"""The official clients against a server with a fake engine: what they send, what they take back."""

import json
import os

import pytest
from fixtures.fake_engine import FakeEngine
from fixtures.http_calls import PNG, PNG_URI
from fixtures.servers import running_server

from internvl3_mlx.serving.requests import ImagePart, TextPart

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # nothing is downloaded
WHOLE = "A red square."
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
WITH_IMAGE = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": PNG_URI, "detail": "low"}},
        ],
    }
]


@pytest.fixture(scope="module")
def server():
    with running_server(FakeEngine()) as running:
        yield running


@pytest.fixture(scope="module")
def openai(server):
    module = pytest.importorskip("openai")
    with module.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic(server):
    module = pytest.importorskip("anthropic")
    with module.Anthropic(base_url=server.url, auth_token="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def ollama(server):
    return pytest.importorskip("ollama").Client(host=server.url)


def last_request(server):
    return server.engine.requests[-1]


def test_openai_chat_with_an_image(server, openai):
    reply = openai.chat.completions.create(
        model="any", messages=WITH_IMAGE, max_completion_tokens=16, seed=1, stop=["\n"],
        temperature=0.5, logprobs=True, top_logprobs=2, extra_body={"v2pe_delta": 0.25, "n": 2},
    )  # fmt: skip
    assert [choice.message.content for choice in reply.choices] == [WHOLE, WHOLE]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens_details.cached_tokens == 1792
    assert reply.usage.completion_tokens == 4  # of both answers
    assert reply.model == "demo"
    request = last_request(server)
    text, image = request.messages[0].parts
    assert isinstance(text, TextPart)
    assert text.text == "What is this?"
    assert isinstance(image, ImagePart)
    assert image.max_tiles == 1
    config = request.config
    assert (config.max_tokens, config.seed, config.stop, config.temperature, config.v2pe_delta) == (
        16, 1, ("\n",), 0.5, 0.25,
    )  # fmt: skip
    assert (request.n, request.logprobs, request.top_logprobs) == (2, True, 2)


def test_openai_chat_streams(openai):
    chunks = [
        *openai.chat.completions.create(
            model="m",
            messages=[{"role": "developer", "content": "Be brief."}, *WITH_IMAGE],
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
        )
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == WHOLE
    assert chunks[1].choices[0].logprobs.content[0].top_logprobs[1].token == "The"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == 2041


def test_openai_chat_without_usage_has_none_in_its_stream(openai):
    chunks = openai.chat.completions.create(model="m", messages=WITH_IMAGE, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_openai_parses_a_model(server):
    client, pydantic = pytest.importorskip("openai"), pytest.importorskip("pydantic")
    form = pydantic.create_model("Form", answer=(str, ...))
    with running_server(FakeEngine(pieces=('{"answer": ', '"red"}'))) as own:
        openai = client.OpenAI(base_url=f"{own.url}/v1", api_key="x")
        reply = openai.chat.completions.parse(model="m", messages=WITH_IMAGE, response_format=form)
        assert reply.choices[0].message.parsed.answer == "red"
        assert own.engine.requests[-1].config.json_schema["required"] == ["answer"]
        parsed = openai.responses.parse(model="m", input="Hi", text_format=form)
        assert parsed.output_parsed.answer == "red"
        assert own.engine.requests[-1].config.json_schema["required"] == ["answer"]


def test_openai_responses(server, openai):
    content = [
        {"type": "input_image", "image_url": PNG_URI, "detail": "auto"},
        {"type": "input_text", "text": "What?"},
    ]
    reply = openai.responses.create(
        model="m", input=[{"role": "user", "content": content}], instructions="Be brief."
    )
    assert reply.output_text == WHOLE
    assert reply.usage.input_tokens_details.cached_tokens == 1792
    assert last_request(server).config.system == "Be brief."
    second = openai.responses.create(model="m", input="Why?", previous_response_id=reply.id)
    assert second.previous_response_id == reply.id
    texts = [message.text for message in last_request(server).messages]
    assert texts == ["What?", WHOLE, "Why?"]
    assert openai.responses.retrieve(reply.id).output_text == WHOLE
    openai.responses.delete(reply.id)
    with pytest.raises(pytest.importorskip("openai").NotFoundError, match="no response"):
        openai.responses.create(model="m", input="Why?", previous_response_id=reply.id)


def test_openai_responses_stream_in_order(openai):
    events = [*openai.responses.create(model="m", input="Hi", stream=True)]
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == [*range(10)]
    assert events[-1].response.output_text == WHOLE


def test_openai_lists_models(openai):
    assert [model.id for model in openai.models.list()] == ["demo"]
    assert openai.models.retrieve("owner/name").id == "demo"  # one model has any name


def test_openai_is_told_of_errors(openai):
    client = pytest.importorskip("openai")
    with pytest.raises(client.BadRequestError, match="tools is not supported") as caught:
        openai.chat.completions.create(
            model="m", messages=WITH_IMAGE, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert caught.value.param == "tools"


def test_anthropic_messages(server, anthropic):
    source = {"type": "base64", "media_type": "image/png", "data": PNG}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    reply = anthropic.messages.create(
        model="m", max_tokens=16, messages=messages, stop_sequences=["\n\nHuman:"],
        system=[{"type": "text", "text": "Be brief."}],
    )  # fmt: skip
    assert [block.text for block in reply.content] == [WHOLE]
    assert reply.stop_reason == "end_turn"
    assert (reply.usage.input_tokens, reply.usage.cache_read_input_tokens) == (249, 1792)
    request = last_request(server)
    assert (request.config.system, request.config.stop) == ("Be brief.", ("\n\nHuman:",))
    with anthropic.messages.stream(model="m", max_tokens=16, messages=messages) as stream:
        assert "".join(stream.text_stream) == WHOLE
        assert stream.get_final_message().usage.output_tokens == 2
    assert anthropic.messages.count_tokens(model="m", messages=messages).input_tokens == 2041
    assert [model.id for model in anthropic.models.list()] == ["demo"]


def test_anthropic_continues_the_last_message(server, anthropic):
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It is"}]
    anthropic.messages.create(model="m", max_tokens=16, messages=messages)
    assert last_request(server).continue_final_message


def test_anthropic_is_told_of_errors(anthropic):
    with pytest.raises(pytest.importorskip("anthropic").BadRequestError, match="role must be"):
        anthropic.messages.create(
            model="m", max_tokens=16, messages=[{"role": "tool", "content": "x"}]
        )


def test_ollama(server, ollama):
    messages = [{"role": "user", "content": "What?", "images": [PNG]}]
    options = {"temperature": 0.5, "num_predict": 16, "seed": 1, "num_ctx": 4096, "stop": "\n"}
    reply = ollama.chat("demo:latest", messages, options=options)
    assert reply.message.content == WHOLE
    assert (reply.prompt_eval_count, reply.eval_count, reply.done_reason) == (2041, 2, "stop")
    config = last_request(server).config
    assert (config.max_tokens, config.seed, config.stop) == (16, 1, ("\n",))
    pieces = [*ollama.chat("demo", messages, stream=True)]
    assert "".join(piece.message.content for piece in pieces) == WHOLE
    assert pieces[-1].total_duration == 730_000_000
    reply = ollama.generate("demo", "What?", images=[PNG], system="Be brief.", format=SCHEMA)
    assert reply.response == WHOLE
    assert last_request(server).config.json_schema == SCHEMA
    assert ollama.list().models[0].model == "demo:latest"
    shown = ollama.show("demo")
    assert shown.capabilities == ["completion", "vision"]
    assert shown.modelinfo["internvl.context_length"] == 2048
    assert ollama.ps().models[0].context_length == 2048


def test_ollama_loads_and_unloads(server, ollama):
    ollama.generate("demo", "")
    assert server.engine.calls[-1] == ("load", "demo")
    ollama.generate("demo", "", keep_alive=0)
    assert server.engine.calls[-1] == ("unload", "demo")


@pytest.mark.parametrize("kind", ["openai", "ollama_chat"])
def test_litellm(server, kind):
    litellm = pytest.importorskip("litellm", reason="LiteLLM is not installed")
    base = f"{server.url}/v1" if kind == "openai" else server.url
    options = {"model": f"{kind}/demo", "api_base": base, "api_key": "x", "messages": WITH_IMAGE}
    assert litellm.completion(**options).choices[0].message.content == WHOLE
    chunks = litellm.completion(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == WHOLE


def test_litellm_messages_over_responses(server):
    litellm = pytest.importorskip("litellm", reason="LiteLLM is not installed")
    import asyncio

    messages = [{"role": "user", "content": "Hi"}]
    call = litellm.anthropic.messages.acreate(
        model="openai/demo", api_base=f"{server.url}/v1", api_key="x", max_tokens=9,
        messages=messages,
    )  # fmt: skip
    assert WHOLE in json.dumps(asyncio.run(call), default=str)


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai", reason="LangChain is not installed")
    chat = langchain.ChatOpenAI(model="demo", base_url=f"{server.url}/v1", api_key="x")
    message = [("user", WITH_IMAGE[0]["content"])]
    assert chat.invoke(message).content == WHOLE
    assert "".join(chunk.content for chunk in chat.stream(message)) == WHOLE
    responses = langchain.ChatOpenAI(
        model="demo", base_url=f"{server.url}/v1", api_key="x", use_responses_api=True
    )
    assert responses.invoke("Hi").text == WHOLE
