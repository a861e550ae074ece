"""Who may call: keys, other web pages, names of other machines, and what the page may run."""

import re

import pytest
from fixtures.fake_engine import FakeEngine
from fixtures.http_calls import ask, call, post, send_raw
from fixtures.servers import running_server

from internvl3_mlx.serving.access import AccessPolicy, is_loopback

BODY = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def server():
    with running_server(FakeEngine()) as running:
        yield running


@pytest.fixture(scope="module")
def locked():
    policy = AccessPolicy("s3cret", ("https://chat.example.org/",), ("box.example.org",))
    with running_server(FakeEngine(), policy=policy) as running:
        yield running


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]:8080", "192.168.1.7"]
)
def test_own_names_are_served(server, host):
    assert call(server, "GET", "/v1/models", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example.org", "localhost.evil.example.org", "127.0.0.1.nip.io:8080", "[::1", ""]
)
def test_a_rebound_name_is_refused(server, host):
    answer = call(server, "GET", "/v1/models", headers={"Host": host})
    assert answer.status == 403
    assert "not a name of the server" in answer.message
    assert post(server, "/api/chat", BODY, Host=host).json == {"error": answer.message}


def test_a_request_without_a_host_is_refused(server):
    assert b" 403 " in send_raw(server, b"GET /v1/models HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize(
    "origin", ["https://evil.example.org", "null", "http://localhost:1", "file://", "http://["]
)
def test_pages_of_other_sites_are_refused(server, origin):
    answer = post(server, "/v1/chat/completions", BODY, Origin=origin)
    assert answer.status == 403
    assert "web pages of other sites" in answer.message
    assert "access-control-allow-origin" not in answer.headers
    preflight = call(server, "OPTIONS", "/v1/chat/completions", headers={"Origin": origin})
    assert preflight.status == 403


def test_our_own_page_may_call(server):
    origin = f"http://127.0.0.1:{server.port}"
    assert post(server, "/v1/chat/completions", BODY, Origin=origin).status == 200


def test_an_allowed_page_may_call_and_read(locked):
    headers = {"Origin": "https://chat.example.org", "Authorization": "Bearer s3cret"}
    answer = post(locked, "/v1/chat/completions", BODY, **headers)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "https://chat.example.org"
    preflight = call(
        locked, "OPTIONS", "/v1/chat/completions", headers={"Origin": "https://chat.example.org"}
    )
    assert preflight.status == 204
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    assert call(locked, "GET", "/health", headers={"Host": "box.example.org"}).status == 200


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "the key of this server is missing"),
        ({"Authorization": "Bearer wrong"}, "the key is not valid"),
        ({"Authorization": "Basic s3cret"}, "missing"),
        ({"Authorization": "Bearer"}, "missing"),
        ({"x-api-key": "s3cret "}, None),
        ({"Authorization": "bearer s3cret"}, None),
        ({"x-api-key": "s3cre\u00e9"}, "not valid"),
    ],
)
def test_a_key_is_needed(locked, headers, words):
    for path, body in (("/v1/chat/completions", BODY), ("/v1/messages", {**BODY, "max_tokens": 1})):
        answer = post(locked, path, body, **headers)
        if words is None:
            assert answer.status == 200
        else:
            assert answer.status == 401
            assert words in answer.message


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/api/tags", "/chat/settings"])
def test_everything_but_the_page_needs_the_key(locked, path):
    assert call(locked, "GET", path).status == 401


@pytest.mark.parametrize("path", ["/", "/page/chat.js", "/page/style.css", "/health"])
def test_the_page_itself_is_open(locked, path):
    assert call(locked, "GET", path, headers={"Accept": "text/html"}).status == 200


def test_the_page_runs_no_script_but_its_own(server):
    answer = call(server, "GET", "/", headers={"Accept": "text/html"})
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    html = answer.body.decode()
    assert [*re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)] == [""]
    assert not re.search(r"\son\w+=|style=|javascript:", html)
    scripts = call(server, "GET", "/page/chat.js").body.decode()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", scripts)
    loaded = re.findall(r"""(?:src|href)=["']([^"'#]+)""", html)
    assert all(address.startswith(("/page/", "data:image/svg+xml")) for address in loaded)


def test_a_client_of_ollama_is_greeted_at_the_root(server):
    assert call(server, "GET", "/").body == b"Ollama is running"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.0.1", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.7", False), ("box.local", False)],
)  # fmt: skip
def test_what_only_this_machine_reaches(host, loopback):
    assert is_loopback(host) is loopback


def test_a_large_body_with_a_wrong_key_is_answered(locked):
    answer = post(locked, "/v1/chat/completions", b"x" * 5_000_000)
    assert answer.status == 401


def test_asking_still_works(server):
    assert ask(server).status == 200
