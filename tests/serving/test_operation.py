"""Health, metrics, the log, and an end in order."""

import http.client
import json
import re
import threading
import time
from dataclasses import replace

import pytest
from fixtures.fake_engine import MODEL, FakeEngine
from fixtures.http_calls import PNG_URI, ask, call, image_part, sse_events, wait_for
from fixtures.servers import running_server

from internvl3_mlx.errors import UserError
from internvl3_mlx.serving.run_server import ServerSettings, open_socket
from internvl3_mlx.serving.thinking import ThinkingSplitter, split_thinking

SECRET = "the patient's name"


@pytest.fixture(scope="module")
def server():
    with running_server(FakeEngine()) as running:
        yield running


def test_a_line_for_each_request_and_nothing_of_its_content(server):
    server.lines.clear()
    ask(server, [{"type": "text", "text": SECRET}, image_part(PNG_URI)], user=SECRET)
    call(server, "GET", "/nowhere?" + "x" * 5000)
    call(server, "GET", "/health")
    assert wait_for(lambda: len(server.lines) == 2)  # written after the answer is sent
    first, second = server.lines
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d 127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d\d s"
        r" · 2041 prompt, 1792 cached, 1 image, 2 answer",
        first,
    )
    assert "GET /nowhere 404" in second
    assert SECRET not in "".join(server.lines)
    assert "square" not in "".join(server.lines)


def test_control_characters_in_a_path_do_not_reach_the_log(server):
    server.lines.clear()
    call(server, "GET", "/%1b%5b31mred%0anext")
    assert wait_for(lambda: server.lines)
    assert "\x1b" not in server.lines[0]
    assert "\n" not in server.lines[0]


def test_health():
    engine = FakeEngine()
    with running_server(engine) as own:
        assert call(own, "GET", "/health").json["status"] == "ok"
        engine.models = (replace(MODEL, loaded=False),)
        assert call(own, "GET", "/health").json["status"] == "loading"
        engine.stopping = True
        answer = call(own, "GET", "/health")
        assert (answer.status, answer.json["status"]) == (503, "stopping")


def test_metrics_are_in_the_format_of_prometheus(server):
    ask(server)
    call(server, "GET", "/some/path/that/is/not/there")
    assert wait_for(lambda: server.lines and "/some/path" in server.lines[-1])
    answer = call(server, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.body.decode().splitlines()
    sample = re.compile(r'internvl3_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+')
    assert all(line.startswith("# ") or sample.fullmatch(line) for line in lines), lines
    assert "internvl3_requests_total 3" in lines
    assert 'internvl3_answers_total{reason="stop"} 2' in lines
    assert 'internvl3_queue{state="running"} 2' in lines
    assert any('route="other",status="404"' in line for line in lines)
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len({*names})


def test_a_stopped_server_ends_running_answers_in_order():
    engine = FakeEngine(pieces=("x",) * 500, pause_s=0.02)
    found = {}
    with running_server(engine) as own:

        def read():
            body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
            connection = http.client.HTTPConnection("127.0.0.1", own.port, timeout=30)
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            found["body"] = connection.getresponse().read()
            connection.close()

        thread = threading.Thread(target=read)
        thread.start()
        while not engine.streams:
            time.sleep(0.01)
        time.sleep(0.1)
        own.stop()
        thread.join(30)
    events = [event for _, event in sse_events(found["body"])]
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert ("stop", 1) in engine.calls


def test_a_port_that_is_taken(server):
    with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1:\d+: Address already in use"):
        open_socket(ServerSettings(port=server.port))


def test_keep_alive_comments_while_nothing_comes(monkeypatch):
    monkeypatch.setattr("internvl3_mlx.serving.streams.KEEP_ALIVE_S", 0.05)
    with running_server(FakeEngine(pause_s=0.3)) as own:
        body = ask(own, stream=True).body
        assert body.count(b": waiting\n\n") >= 2
        text = [e["choices"][0]["delta"].get("content") for _, e in sse_events(body)[:-1]]
        assert "".join(filter(None, text)) == "A red square."


THOUGHT = "<think>\nA dog, I think.\nYes.\n</think>\n\nA dog."


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_chain_of_thought_is_told_from_the_answer(size):
    splitter, pieces = ThinkingSplitter(), []
    for start in range(0, len(THOUGHT), size):
        pieces += splitter.feed(THOUGHT[start : start + size])
    pieces += splitter.feed("", last=True)
    whole = {kind: "".join(t for k, t in pieces if k == kind) for kind in ("thinking", "answer")}
    assert whole == {"thinking": "A dog, I think.\nYes.", "answer": "A dog."}


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("A dog.", "", "A dog."),
        ("", "", ""),
        ("<think>cut off", "cut off", ""),
        ("<thin", "", "<thin"),
        ("I <think> so</think>", "", "I <think> so</think>"),
        ("<think></think>x", "", "x"),
        ("<think>a</thin b</think>c", "a</thin b", "c"),
    ],
)
def test_texts_with_and_without_a_thought(text, thinking, answer):
    assert split_thinking(text) == (thinking, answer)
    splitter = ThinkingSplitter()
    pieces = [piece for letter in text for piece in splitter.feed(letter)]
    pieces += splitter.feed("", last=True)
    assert "".join(t for k, t in pieces if k == "answer") == answer
    assert "".join(t for k, t in pieces if k == "thinking") == thinking


def test_a_chain_of_thought_in_every_api():
    with running_server(FakeEngine(pieces=tuple(THOUGHT))) as own:
        message = ask(own).json["choices"][0]["message"]
        assert message["reasoning_content"] == "A dog, I think.\nYes."
        assert message["content"] == "A dog."
        deltas = [e["choices"][0]["delta"] for _, e in sse_events(ask(own, stream=True).body)[:-1]]
        thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
        assert thought == "A dog, I think.\nYes."
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
        blocks = call(own, "POST", "/v1/messages", body).json["content"]
        assert [block["type"] for block in blocks] == ["thinking", "text"]
        items = call(own, "POST", "/v1/responses", {"input": "x"}).json["output"]
        assert [item["type"] for item in items] == ["reasoning", "message"]
        reply = call(own, "POST", "/api/chat", {**body, "stream": False}).json["message"]
        assert (reply["thinking"], reply["content"]) == ("A dog, I think.\nYes.", "A dog.")


def test_boxes_of_an_answer():
    text = "<ref>the dog</ref><box>[[100, 200, 300, 400]]</box>"
    with running_server(FakeEngine(pieces=(text,))) as own:
        reply = ask(own, [image_part(PNG_URI)], keep_boxes=True).json
        assert own.engine.requests[-1].config.keep_boxes
        expected = {
            "label": "the dog",
            "image": 0,
            "box": [64, 96, 192, 192],
            "relative": [100, 200, 300, 400],
        }
        assert reply["choices"][0]["boxes"] == [expected]
        assert reply["usage"]["images"] == [
            {"width": 640, "height": 480, "tiles": 7, "tokens": 1792}
        ]


def test_an_answer_whose_client_left_before_it_began_is_cancelled():
    """A stream that nobody has begun to read has no generator whose end could cancel it."""
    import asyncio

    from internvl3_mlx.serving.streams import SSE, ClientLeft, StreamedAnswer

    closed = []

    async def pieces():
        yield b"never sent"

    async def on_close():
        closed.append(True)

    async def receive():
        return {"type": "http.disconnect"}

    async def send(_):
        await asyncio.sleep(60)

    answer = StreamedAnswer(pieces(), SSE, on_close)
    with pytest.raises(ClientLeft):
        asyncio.run(answer({"type": "http"}, receive, send))
    assert closed == [True]


def test_how_each_api_tells_of_an_answer_that_was_cut():
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
    with running_server(FakeEngine(finish_reason="length")) as own:
        assert ask(own).json["choices"][0]["finish_reason"] == "length"
        whole = call(own, "POST", "/v1/responses", {"input": "x"}).json
        assert whole["status"] == "incomplete"
        assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
        streamed = call(own, "POST", "/v1/responses", {"input": "x", "stream": True}).body
        assert sse_events(streamed)[-1][0] == "response.incomplete"
        assert call(own, "POST", "/v1/messages", body).json["stop_reason"] == "max_tokens"
        reply = call(own, "POST", "/api/chat", {**body, "stream": False}).json
        assert reply["done_reason"] == "length"
    with running_server(FakeEngine(stop_string="END")) as own:
        reply = call(own, "POST", "/v1/messages", body).json
        assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "END")


def test_housekeeping_is_recognized(server):
    ask(server, "### Task:\nGenerate a concise title\n<chat_history>\n...")
    assert server.engine.requests[-1].housekeeping
    ask(server, "Write a title.")
    assert not server.engine.requests[-1].housekeeping


def test_people_behind_one_address_are_told_apart(server):
    body = {"messages": [{"role": "user", "content": "x"}]}
    call(server, "POST", "/v1/chat/completions", body, {"X-OpenWebUI-User-Id": "anna"})
    assert server.engine.requests[-1].client == "anna"
    ask(server)
    assert server.engine.requests[-1].client == "127.0.0.1"


@pytest.mark.parametrize(
    ("query", "grid"),
    [
        ("width=640&height=480", (4, 3, 13)),
        ("width=100&height=100&max_tiles=1", (1, 1, 1)),
        ("width=1&height=20000", (1, 12, 13)),
    ],
)
def test_tiles_for_the_page(server, query, grid):
    answer = call(server, "GET", f"/chat/tiles?{query}").json
    assert (answer["columns"], answer["rows"], answer["tiles"]) == grid
    assert answer["thumbnail"] is (grid[2] > 1)


@pytest.mark.parametrize(
    "query", ["", "width=0&height=1", "width=a&height=1", "width=9&height=9&max_tiles=9999"]
)
def test_tiles_for_no_size(server, query):
    assert call(server, "GET", f"/chat/tiles?{query}").status == 400
