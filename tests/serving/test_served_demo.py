"""The demo model behind the real engine, asked by real clients over HTTP."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from fixtures.browsers import WAIT_S, open_browser, require_browser
from fixtures.http_calls import ask, call, image_part, post, sse_events, wait_for
from fixtures.servers import running_server
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from internvl3_mlx.loading.resolve import DEMO_FOLDER
from internvl3_mlx.serving.engine import Engine
from internvl3_mlx.serving.limits import ServerLimits
from internvl3_mlx.serving.settings import EngineSettings

SAMPLES = DEMO_FOLDER / "samples"
TABLE = json.loads((SAMPLES / "samples.json").read_text("utf-8"))
CLIENTS, REQUESTS = 24, 48


def uri(name):
    data = base64.b64encode((SAMPLES / name).read_bytes()).decode()
    return f"data:image/jpeg;base64,{data}"


URIS = {sample["file"]: uri(sample["file"]) for sample in TABLE}


@pytest.fixture(scope="module")
def server():
    engine = Engine(EngineSettings(models={"demo": "demo"}))
    with running_server(engine, ServerLimits(max_tokens=24)) as running:
        yield running


def content(sample):
    return [image_part(URIS[sample["file"]]), {"type": "text", "text": sample["question"]}]


@pytest.mark.parametrize("sample", TABLE, ids=[sample["file"] for sample in TABLE])
def test_openai_gets_the_answers_of_the_samples(server, sample):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        messages = [{"role": "user", "content": content(sample)}]
        reply = client.chat.completions.create(model="demo", messages=messages)
        assert reply.choices[0].message.content == sample["answer"]
        chunks = [*client.chat.completions.create(model="demo", messages=messages, stream=True)]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == sample["answer"]


def test_other_clients_get_the_same(server):
    anthropic, ollama = pytest.importorskip("anthropic"), pytest.importorskip("ollama")
    data = URIS["dog.jpg"].partition(",")[2]
    with anthropic.Anthropic(base_url=server.url, auth_token="x") as client:
        source = {"type": "base64", "media_type": "image/jpeg", "data": data}
        parts = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": parts}]
        with client.messages.stream(model="demo", max_tokens=9, messages=messages) as stream:
            assert "".join(stream.text_stream) == "dog"
        counted = client.messages.count_tokens(model="demo", messages=messages).input_tokens
        reply = client.messages.create(model="demo", max_tokens=9, messages=messages)
        assert counted == reply.usage.input_tokens + reply.usage.cache_read_input_tokens
    client = ollama.Client(host=server.url)
    reply = client.chat("demo", [{"role": "user", "content": "What is this?", "images": [data]}])
    assert reply.message.content == "dog"
    body = {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": URIS["dog.jpg"]},
        {"type": "input_text", "text": "What is this?"}]}]}  # fmt: skip
    first = post(server, "/v1/responses", body).json
    assert first["output"][0]["content"][0]["text"] == "dog"
    again = {"input": "What is this?", "previous_response_id": first["id"]}
    assert post(server, "/v1/responses", again).json["usage"]["input_tokens_details"][
        "cached_tokens"
    ]


def test_a_second_turn_reads_only_itself(server):
    question = [{"role": "user", "content": content(TABLE[0])}]
    first = post(server, "/v1/chat/completions", {"messages": question}).json
    said = first["choices"][0]["message"]
    more = [*question, {"role": "assistant", "content": said["content"]}]
    more += [{"role": "user", "content": "What is this?"}]
    before = call(server, "GET", "/metrics").body
    second = post(server, "/v1/chat/completions", {"messages": more}).json
    usage = second["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 1
    computed = b"internvl3_image_features_computed_total"
    after = call(server, "GET", "/metrics").body
    assert [line for line in before.splitlines() if line.startswith(computed)] == [
        line for line in after.splitlines() if line.startswith(computed)
    ]


def test_many_clients_at_once_each_get_their_own_answer(server):
    def one(number):
        sample = TABLE[number % len(TABLE)]
        answer = ask(server, content(sample), stream=number % 2 == 0)
        if answer.status != 200 or number % 2:
            return answer.status, answer.json["choices"][0]["message"]["content"]
        events = [event for _, event in sse_events(answer.body)[:-1]]
        return 200, "".join(e["choices"][0]["delta"].get("content", "") for e in events)

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [*pool.map(one, range(REQUESTS))]
    expected = [(200, TABLE[number % len(TABLE)]["answer"]) for number in range(REQUESTS)]
    assert answers == expected


def test_frames_of_a_video_and_pages_of_a_pdf_are_read(server):
    pytest.importorskip("pypdfium2")
    pictures = [Image.open(SAMPLES / sample["file"]).resize((90, 70)) for sample in TABLE[:3]]
    animation, document = io.BytesIO(), io.BytesIO()
    pictures[0].save(animation, "GIF", save_all=True, append_images=pictures[1:])
    pictures[0].save(document, "PDF", save_all=True, append_images=pictures[1:])
    film, pages = (base64.b64encode(file.getvalue()).decode() for file in (animation, document))
    video = {"type": "video_url", "video_url": {"url": f"data:image/gif;base64,{film}"}}
    reply = ask(server, [video, {"type": "text", "text": "What is this?"}], num_frames=2)
    assert [image["tiles"] for image in reply.json["usage"]["images"]] == [1, 1]
    source = {"type": "base64", "media_type": "application/pdf", "data": pages}
    parts = [{"type": "document", "source": source}, {"type": "text", "text": "What is this?"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 5}
    assert len(post(server, "/v1/messages", body).json["usage"]["images"]) == 3


def test_a_json_schema_is_kept(server):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["dog", "cat"]}, "sure": {"type": "boolean"}},
        "required": ["kind", "sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}
    reply = ask(server, content(TABLE[0]), response_format=wanted).json
    assert json.loads(reply["choices"][0]["message"]["content"]).keys() == {"kind", "sure"}
    wanted["json_schema"]["schema"] = {"type": "nonsense"}
    answer = ask(server, "Hi", response_format=wanted)
    assert answer.status == 400
    assert "json_schema is not valid" in answer.message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((SAMPLES / "dog.jpg").read_bytes()[:3000], "truncated"),
        (b"GIF89a nonsense, not an image", "cannot read image bytes"),
    ],
)
def test_a_damaged_image_is_refused(server, data, message):
    answer = ask(server, [image_part("data:;base64," + base64.b64encode(data).decode())])
    assert answer.status == 400
    assert message in answer.message
    assert ask(server, content(TABLE[0])).json["choices"][0]["message"]["content"] == "dog"


def test_a_prompt_longer_than_the_context(server):
    answer = ask(server, "What is this? " * 5000)
    assert answer.status == 400
    assert answer.json["error"]["code"] == "context_length_exceeded"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
PART = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url", "video_url", "file", "input_text", "image"])
        | JSON,
        "text": st.text(max_size=9) | JSON,
        "image_url": st.sampled_from([URIS["dog.jpg"], "data:,x", "file:///x"])
        | st.fixed_dictionaries({"url": JSON}, optional={"detail": JSON})
        | JSON,
        "source": st.fixed_dictionaries({"type": st.just("base64")}, optional={"data": JSON})
        | JSON,
    },
)  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]) | JSON,
        "content": st.text(max_size=9) | st.lists(PART, max_size=3) | JSON,
        "images": st.lists(st.just(URIS["dog.jpg"]) | JSON, max_size=2) | JSON,
    },
)
FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "seed", "n",
    "stop", "logprobs", "top_logprobs", "logit_bias", "stream", "stream_options", "tools",
    "response_format", "v2pe_delta", "max_tiles", "min_tiles", "best_of", "critic", "think",
    "keep_boxes", "num_frames", "system", "thinking", "format", "options", "keep_alive", "prompt",
    "instructions", "text", "previous_response_id", "store", "stop_sequences", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "continue_final_message", "model", "guided_json",
    "guided_regex", "guided_choice", "max_output_tokens", "user", "metadata", "housekeeping",
)  # fmt: skip
BODY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3) | JSON, "input": st.text(max_size=9) | JSON},
    optional={name: st.integers(-2, 9) | st.floats(-1, 2) | JSON for name in FIELDS},
)
PATHS = (
    "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/api/chat", "/api/generate", "/api/show",
)  # fmt: skip


@seed(20261130)
@settings(
    max_examples=150, deadline=None, database=None, derandomize=False,
    phases=[Phase.generate], suppress_health_check=[*HealthCheck],
)  # fmt: skip
@given(path=st.sampled_from(PATHS), body=BODY)
def test_no_body_is_answered_with_a_fault(server, path, body):
    """Whatever a client sends, the answer is a 2xx or a plain 4xx."""
    answer = post(server, path, json.dumps(body).encode())
    assert answer.status < 500, (path, body, answer.body)
    assert server.faults == []
    if answer.status >= 400:
        assert answer.message


def test_the_page_asks_the_demo(server):
    require_browser()
    with open_browser() as driver:
        driver.get(server.url)
        ready = "return document.documentElement.dataset.ready"
        assert wait_for(lambda: driver.execute_script(ready), WAIT_S)
        driver.find_element("css selector", ".sample").click()
        # read in one step: the page replaces its nodes while the answer arrives
        texts = (
            "return [...document.querySelectorAll('.assistant .markdown')].map(n => n.innerText)"
        )
        assert wait_for(lambda: driver.execute_script(texts) == ["dog"], WAIT_S)
