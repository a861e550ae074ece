"""What cannot be served gets one plain line, and the next request is answered."""

import base64
import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fixtures.fake_engine import MODEL, FakeEngine
from fixtures.http_calls import (
    PNG,
    PNG_URI,
    ask,
    call,
    image_part,
    post,
    send_raw,
    sse_events,
    wait_for,
)
from fixtures.servers import running_server
from PIL import Image

from internvl3_mlx.errors import GPUError, MissingExtraError
from internvl3_mlx.serving.limits import ServerLimits
from internvl3_mlx.serving.requests import (
    AnswerFailed,
    ContextTooLong,
    InvalidRequest,
    QueueFull,
    RequestTooLarge,
    VideoPart,
)

LIMITS = ServerLimits(
    max_body_mb=2, max_images=3, max_megapixels=1, body_timeout=0.6, max_tokens=100
)


@pytest.fixture(scope="module")
def server():
    with running_server(FakeEngine(), LIMITS) as running:
        yield running


@pytest.fixture(autouse=True)
def the_next_request_works(server):
    yield
    assert ask(server).status == 200


def png(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def uri(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def bomb():
    """A PNG whose header says 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools is not supported; leave it out"),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
        ({"modalities": ["text", "audio"]}, "modalities is not supported"),
        ({"ignore_eos": True}, "ignore_eos is not supported"),
        ({"temperature": "hot"}, "temperature is not valid"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": 1e999}, "temperature is not valid|not JSON"),
        ({"max_tokens": 0}, "max_tokens is 0; choose 1"),
        ({"max_tokens": 10**400}, ""),  # as many as the server allows
        ({"max_tokens": "many"}, "max_tokens is not valid"),
        ({"max_tokens": True}, "max_tokens is not valid"),
        ({"n": 0}, "n is not valid"),
        ({"top_logprobs": 21}, "top_logprobs is not valid"),
        ({"stop": ["x"] * 17}, "stop has more than 16"),
        ({"stop": 5}, "^stop is not valid: input should be a valid string or a valid list$"),
        ({"stop": [1]}, "^stop is not valid: input should be a valid string"),
        ({"seed": -5}, "seed is -5"),
        ({"logit_bias": {"word": 1}}, "logit_bias must have token ids"),
        ({"response_format": {"type": "xml"}}, "response_format.type is not known"),
        ({"response_format": {"type": "json_schema"}}, "must be a JSON schema"),
        ({"v2pe_delta": {}}, "^v2pe_delta is not valid"),
        ({"best_of": 1000}, "best_of is not valid"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "mutually exclusive"),
    ],
)
def test_a_field_is_honored_or_refused_by_name(server, fields, message):
    answer = ask(server, **fields)
    if not message:
        assert answer.status == 200
        assert server.engine.requests[-1].config.max_tokens == 100
        return
    assert answer.status == 400
    import re

    assert re.search(message, answer.message), answer.message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_our_own_fields_in_every_api(server, path, body):
    own = {"v2pe_delta": "auto", "max_tiles": 5, "best_of": 3, "critic": "prm", "think": True}
    assert post(server, path, {**body, **own}).status == 200
    request = server.engine.requests[-1]
    config = request.config
    assert (config.v2pe_delta, config.max_tiles) == ("auto", 5)
    assert (request.best_of, request.critic, request.think) == (3, "prm", True)


def test_neutral_and_unknown_fields_are_ignored(server):
    answer = ask(
        server, tools=[], tool_choice="none", modalities=["text"], user="me", store=True,
        reasoning_effort="high", service_tier="auto", metadata={}, seed=-1, stop=["", "x"],
        add_generation_prompt=True, n=None, top_k=-1,
    )  # fmt: skip
    assert answer.status == 200
    config = server.engine.requests[-1].config
    assert (config.seed, config.stop, config.top_k) == (None, ("x",), 0)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages has no user's message"),
        ([{"role": "system", "content": "x"}], "messages has no user's message"),
        ("hi", "messages is not valid"),
        (["hi"], r"messages[0] must be an object"),
        ([{"role": "tool", "content": "x"}], "messages[0].role is tool"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role is missing"),
        ([{"role": "user", "content": 5}], "messages[0].content must be text"),
        ([{"role": "user", "content": [5]}], "messages[0].content[0] must be an object"),
        (
            [{"role": "user", "content": [{"type": "audio"}]}],
            "content[0].type is audio; use one of",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "content[0].text must be text"),
        ([{"role": "user", "content": [image_part(5)]}], "image_url must be a data URI"),
        ([{"role": "user", "content": [image_part(PNG_URI, detail="max")]}], "detail is not known"),
        ([{"role": "assistant", "content": [image_part(PNG_URI)]}], "only a user's message"),
        ([{"role": "system", "content": [image_part(PNG_URI)]}], "only a user's message"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "tool_calls is not supported"),
    ],
)
def test_malformed_messages(server, messages, message):
    answer = post(server, "/v1/chat/completions", {"messages": messages})
    assert answer.status == 400
    assert message in answer.message


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "file URLs are not read by the server"),
        ("/etc/passwd", "paths are not read by the server"),
        ("clipboard", "paths are not read by the server"),
        ("-", "paths are not read by the server"),
        ("ftp://example.org/a.png", "ftp URLs are not read"),
        ("data:image/png;base64", "a data URI needs a comma"),
        ("data:image/png;base64,$$$", "not valid base64"),
        (uri(b""), "it is empty"),
        (uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "it is an SVG drawing"),
        (uri(b"%PDF-1.7 nonsense"), "damaged or not a PDF"),
        (uri(png(2000, 900)), "has 2000x900 pixels, more than the server's 1 million"),
        (uri(bomb()), "megapixels"),
        ("http://127.0.0.1:1/a.png", "a private address"),
        ("http://[::1]/a.png", "a private address"),
        ("http://169.254.169.254/latest/meta-data", "a private address"),
        ("http://localhost:1/a.png", "a private address"),
        ("http://2130706433/a.png", "a private address"),
        ("http://[::ffff:10.0.0.1]/a.png", "a private address"),
        ("http://", "cannot download"),
    ],
)
def test_images_that_are_not_read(server, url, message):
    answer = ask(server, [image_part(url)])
    assert answer.status == 400
    assert message in answer.message
    assert "messages[0].content[0]" in answer.message


def test_a_redirect_to_a_private_address_is_not_followed(server, monkeypatch):
    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:1/secret")
            self.end_headers()

        def log_message(self, *_):
            pass

    site = HTTPServer(("127.0.0.1", 0), Redirect)
    thread = threading.Thread(target=site.handle_request)
    thread.start()
    from internvl3_mlx.images import download

    public = iter([True])  # the first address counts as public, what it leads to does not
    monkeypatch.setattr(download, "_is_public", lambda _: next(public, False))
    answer = ask(server, [image_part(f"http://127.0.0.1:{site.server_port}/a.png")])
    thread.join()
    site.server_close()
    assert answer.status == 400
    assert "a private address" in answer.message


def test_private_addresses_can_be_allowed():
    class Picture(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(7, 5))

        def log_message(self, *_):
            pass

    site = HTTPServer(("127.0.0.1", 0), Picture)
    thread = threading.Thread(target=site.handle_request)
    thread.start()
    with running_server(FakeEngine(), replace(LIMITS, allow_private_urls=True)) as own:
        assert ask(own, [image_part(f"http://127.0.0.1:{site.server_port}/a.png")]).status == 200
        assert own.engine.requests[-1].messages[0].parts[0].image == png(7, 5)
    thread.join()
    site.server_close()


def test_too_many_images(server):
    answer = ask(server, [image_part(PNG_URI)] * 4)
    assert answer.status == 400
    assert "4 images, pages and videos, but the server takes at most 3" in answer.message


def test_pages_of_a_document_count_as_images(server):
    file = io.BytesIO()
    pages = [Image.new("RGB", (9, 7), color) for color in ("red", "green", "blue", "white")]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    answer = ask(server, [image_part(uri(file.getvalue(), "image/tiff"))])
    assert answer.status == 400
    assert "4 images" in answer.message


def test_a_pdf_becomes_its_pages():
    pytest.importorskip("pypdfium2")
    file = io.BytesIO()
    pages = [Image.new("RGB", (90, 70), color) for color in ("red", "green")]
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:])
    part = {"type": "file", "file": {"filename": "a.pdf", "file_data": uri(file.getvalue())}}
    with running_server(FakeEngine()) as own:
        assert ask(own, [part, {"type": "text", "text": "?"}]).status == 200
        shown = own.engine.requests[-1].messages[0].parts
        assert [getattr(part, "image", None) is not None for part in shown] == [True, True, False]


def test_a_video_is_passed_on(server):
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    assert ask(server, [part]).status == 200
    assert isinstance(server.engine.requests[-1].messages[0].parts[0], VideoPart)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b"\xff", b'{"a": NaN}', b"[" * 5000, b'{"messages": 1}']
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/show"]
)
def test_a_body_that_is_no_request(server, path, body):
    if (path, body) == ("/api/show", b'{"messages": 1}'):
        pytest.skip("a request without a model")
    answer = call(server, "POST", path, body)
    assert answer.status == 400
    assert answer.message


def test_a_body_that_is_too_large(server):
    answer = ask(server, "x" * 3_000_000)
    assert answer.status == 413
    assert "larger than 2 MB" in answer.message
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
    assert b" 413 " in send_raw_until(server, head, b"larger than")


def send_raw_until(server, data, wanted):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        received = b""
        while wanted not in received:
            piece = connection.recv(65536)
            assert piece, received
            received += piece
        return received


def test_a_body_without_end(server):
    """A chunked body has no stated length: it is counted, and what follows is not waited for."""
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head)
        sent = 0
        try:
            while time.monotonic() - started < 15:
                connection.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
                sent += 0x8000
                time.sleep(0.002)
        except OSError:
            pass  # the server has closed the connection
    assert sent > 2 * 2**20
    assert time.monotonic() - started < 10


def test_a_body_that_is_too_slow(server):
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
    assert b" 408 " in send_raw_until(server, head, b"did not arrive within 0.6 seconds")


def test_headers_that_never_end(server, monkeypatch):
    monkeypatch.setattr("internvl3_mlx.serving.run_server.HEADER_TIMEOUT_S", 0.3)
    started = time.monotonic()
    assert send_raw(server, b"GET /health HTTP/1.1\r\nX-A: b\r\n", timeout=20) == b""
    assert time.monotonic() - started < 10
    assert b"400" in send_raw(server, b"nonsense\r\n\r\n")
    with contextlib.suppress(ConnectionResetError):
        send_raw(server, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 200_000)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (InvalidRequest("wrong", "stop"), 400, None),
        (ContextTooLong("too long"), 400, "context_length_exceeded"),
        (RequestTooLarge("never fits"), 413, None),
        (MissingExtraError("a video", "av", "video"), 400, None),
        (QueueFull("full", 7), 503, None),
    ],
)
def test_what_the_engine_refuses(fault, status, code):
    with running_server(FakeEngine(fault=fault)) as own:
        answer = ask(own)
        assert (answer.status, answer.json["error"]["code"]) == (status, code)
        assert answer.message == str(fault)
        assert answer.headers.get("retry-after") == ("7" if status == 503 else None)
        assert post(own, "/api/chat", {"messages": [{"role": "user", "content": "x"}]}).json == {
            "error": str(fault)
        }
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
        kind = {503: "overloaded_error", 413: "request_too_large"}.get(
            status, "invalid_request_error"
        )
        assert post(own, "/v1/messages", body).json["error"]["type"] == kind


def test_a_failure_of_the_gpu_is_told(server):
    with running_server(FakeEngine(fault=GPUError("the GPU ran out of memory"))) as own:
        answer = ask(own)
        assert (answer.status, answer.message) == (500, "the GPU ran out of memory")
        assert [str(fault) for fault in own.faults] == ["the GPU ran out of memory"]
        own.faults.clear()


def test_what_nobody_foresaw_has_no_details(server):
    with running_server(FakeEngine(fault=ZeroDivisionError("secret"))) as own:
        answer = ask(own)
        assert answer.status == 500
        assert "secret" not in answer.body.decode()
        own.faults.clear()


def test_a_failure_in_the_middle_ends_each_stream_in_its_own_way():
    with running_server(FakeEngine(late_fault=AnswerFailed("it broke"))) as own:
        messages = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        events = sse_events(post(own, "/v1/chat/completions", messages).body)
        assert events[-1][1]["error"]["message"] == "it broke"
        events = sse_events(post(own, "/v1/responses", {"input": "x", "stream": True}).body)
        assert events[-1][0] == "response.failed"
        assert events[-1][1]["response"]["error"]["message"] == "it broke"
        events = sse_events(post(own, "/v1/messages", {**messages, "max_tokens": 9}).body)
        assert (events[-1][0], events[-1][1]["error"]["message"]) == ("error", "it broke")
        lines = post(own, "/api/chat", messages).body.splitlines()
        assert json.loads(lines[-1]) == {"error": "it broke"}


def test_an_answer_has_its_time():
    limits = replace(LIMITS, answer_timeout=0.3)
    with running_server(FakeEngine(pause_s=5), limits) as own:
        answer = ask(own)
        assert answer.status == 504
        assert "more than 0.3 seconds" in answer.message
        assert own.engine.streams[0].closed
        own.faults.clear()


def test_a_client_that_leaves_cancels_its_answer():
    with running_server(FakeEngine(pieces=("x",) * 1000, pause_s=0.01)) as own:
        for number, body in enumerate(({"stream": True}, {})):
            content = {"messages": [{"role": "user", "content": "x"}], **body}
            connection = http.client.HTTPConnection("127.0.0.1", own.port)
            connection.request("POST", "/v1/chat/completions", json.dumps(content))
            if body:
                connection.getresponse().read(200)
            assert wait_for(lambda wanted=number + 1: len(own.engine.streams) == wanted)
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            stream = own.engine.streams[-1]
            assert wait_for(lambda stream=stream: stream.closed)
            assert not stream.finished
        assert wait_for(lambda: len([line for line in own.lines if " 499 " in line]) == 2)


def test_an_unknown_model_is_named():
    models = (replace(MODEL, name="2b"), replace(MODEL, name="ocr"))
    with running_server(FakeEngine(models=models)) as own:
        answer = ask(own, model="gpt-4o")
        assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")
        assert answer.message == "model 'gpt-4o' is not served here; choose from 2b, ocr"
        assert ask(own, model="ocr").json["model"] == "ocr"
        assert ask(own, model="ocr:latest").json["model"] == "ocr"
        assert ask(own).json["model"] == "2b"


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/embeddings", 404, "this server has no GET /v1/embeddings"),
        ("POST", "/api/pull", 404, "this server has no POST /api/pull"),
        ("GET", "/v1/chat/completions", 405, "does not take GET"),
        ("POST", "/v1/messages/batches", 404, "this server has no POST"),
        ("GET", "/page/../../pyproject.toml", 404, "no"),
        ("GET", "/page/%2e%2e%2fapp.py", 404, "no"),
        ("GET", "/page/samples/..%2fmodel.safetensors", 404, "no"),
    ],
)
def test_unknown_paths(server, method, path, status, words):
    answer = call(server, method, path)
    assert answer.status == status
    assert words in answer.message


def test_base64_of_ollama_may_be_a_data_uri(server):
    for image in (PNG, PNG_URI):
        messages = [{"role": "user", "content": "x", "images": [image]}]
        assert post(server, "/api/chat", {"messages": messages}).status == 200
        assert server.engine.requests[-1].messages[0].parts[0].image == base64.b64decode(PNG)
    for image in (5, "", "file:///etc/passwd", "http://127.0.0.1:1/a.png"):
        messages = [{"role": "user", "content": "x", "images": [image]}]
        assert post(server, "/api/chat", {"messages": messages}).status == 400
