"""Pictures from the web: a local server plays the good and the bad ones."""

import base64
import socket
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fixtures.image_files import encoded, message, noise, same

from internvl3_mlx.images import download, fetch
from internvl3_mlx.images.download import DownloadPolicy, download_policy
from internvl3_mlx.images.load import open_image

PICTURE = encoded(noise())


class Handler(BaseHTTPRequestHandler):
    """Answer by path: see ``ANSWERS``."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        ANSWERS.get(path, missing)(self)

    def log_message(self, *args):
        """Say nothing."""


def picture(handler, body=PICTURE):
    assert handler.headers["User-Agent"] == "internvl3-mlx"
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def redirect(target):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    return answer


def drip(handler):
    """Send a byte now and then, for longer than anyone waits."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def silent(handler):
    time.sleep(0.6)


def endless(*lines, body=b"", pause=0.0):
    """Answer with ``lines`` and then ``body`` over and over, until the other side hangs up."""

    def answer(handler):
        handler.wfile.write(b"".join(line + b"\r\n" for line in lines))
        for _ in range(10**6):
            handler.wfile.write(body)
            handler.wfile.flush()
            time.sleep(pause)

    def until_hung_up(handler):
        try:
            answer(handler)
        except OSError:
            handler.close_connection = True

    return until_hung_up


def locked(handler):
    expected = "Basic " + base64.b64encode(b"me:s3:cret").decode()
    if handler.headers["Authorization"] == expected:
        picture(handler)
    else:
        handler.send_error(401)


def elsewhere(handler):
    """Redirect to the same server under another name, which must not get the password."""
    handler.send_response(302)
    handler.send_header("Location", f"http://localhost:{handler.server.server_port}/locked")
    handler.end_headers()


def short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(2 * len(PICTURE)))
    handler.end_headers()
    handler.wfile.write(PICTURE)


def missing(handler):
    handler.send_error(404)


ANSWERS = {
    "/a.png": picture,
    "/a%20b%C3%A9.png": picture,
    "/page": lambda handler: picture(handler, b"<!DOCTYPE html><title>cat</title>"),
    "/large": lambda handler: picture(handler, bytes(5000)),
    "/moved": redirect("/a.png"),
    "/loop": redirect("/loop"),
    "/file": redirect("file:///etc/hosts"),
    "/ftp": redirect("ftp://127.0.0.1/a.png"),
    "/drip": drip,
    "/silent": silent,
    "/redirect-body": endless(b"HTTP/1.0 302 Found", b"Location: /a.png", b"", body=bytes(2**16)),
    "/redirect-drip": endless(
        b"HTTP/1.0 302 Found", b"Location: /a.png", b"", body=b"x", pause=0.05
    ),
    "/header-drip": endless(b"HTTP/1.0 200 OK", b"X: ", body=b"a", pause=0.02),
    "/continue": endless(body=b"HTTP/1.1 100 Continue\r\n\r\n"),
    "/status": endless(b"\x1b]0;pwn\x07\x9b31mHello", b""),
    "/locked": locked,
    "/elsewhere": elsewhere,
    "/short": short,
    "/cut": lambda handler: picture(handler, PICTURE[:60]),
}


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("path", ["/a.png", "/a bé.png", "/a%20b%C3%A9.png", "/moved"])
def test_a_picture_is_fetched(site, path):
    assert same(open_image(site + path), noise())


def test_the_name_keeps_secrets_out(site):
    assert open_image(f"{site}/a.png?token=secret").name == f"{site}/a.png"
    assert "secret" not in message("http://me:secret@127.0.0.1:1/a.png?key=secret")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/no.png", "status 404; check the URL, or save the image"),
        ("/loop", "it redirects in circles or away from http"),
        ("/file", "it redirects in circles or away from http"),
        ("/ftp", "it redirects in circles or away from http"),
        ("/page", "it is a web page; give the URL of the image itself"),
        ("/cut", "the file is truncated"),
    ],
)
def test_bad_answers_are_told(site, path, words):
    line = message(site + path)
    assert f"{site}{path}: {words}" in line


def test_a_large_download_is_stopped(site, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 4000)
    assert "/large: larger than" in message(f"{site}/large")


def test_a_slow_download_is_stopped(site, monkeypatch):
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_S", 0.1)
    assert "/drip: the server is too slow" in message(f"{site}/drip")


def test_a_silent_server_is_given_up(site, monkeypatch):
    monkeypatch.setattr(download, "READ_TIMEOUT_S", 0.1)
    assert "/silent: the server is too slow" in message(f"{site}/silent")


def test_a_server_that_is_not_there_is_told(site):
    assert "cannot download http://127.0.0.1:1/a.png: " in message("http://127.0.0.1:1/a.png")
    assert "cannot download http://127.0.0.1:x/a.png: " in message("http://127.0.0.1:x/a.png")


@pytest.mark.parametrize("path", ["/redirect-body", "/redirect-drip"])
def test_the_body_of_a_redirect_is_never_read(site, path):
    tracemalloc.start()
    assert same(open_image(site + path), noise())
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_header_that_never_ends_meets_the_deadline(site, monkeypatch):
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_S", 0.3)
    start = time.monotonic()
    assert "/header-drip: the server is too slow" in message(f"{site}/header-drip")
    assert time.monotonic() - start < 3


def test_endless_interim_responses_are_bounded(site):
    assert "/continue: the server sends headers without end" in message(f"{site}/continue")


def test_a_hostile_status_line_is_not_repeated(site):
    line = message(f"{site}/status")
    assert "/status: not a valid HTTP answer (BadStatusLine)" in line
    assert line.isprintable()


def test_a_body_shorter_than_promised_is_refused(site):
    assert "bytes too early" in message(f"{site}/short")


def test_user_and_password_are_sent_but_never_shown(site):
    address = site.removeprefix("http://")
    assert same(open_image(f"http://me:s3%3Acret@{address}/locked"), noise())
    line = message(f"http://me:wrong@{address}/locked?token=hidden")
    assert f"http://{address}/locked: status 401" in line
    for url in ("http://me:s3cret@[::1/a.png", "http://me:s3cret@host:port/a.png?key=s3cret"):
        assert "s3cret" not in message(url)


def test_a_password_does_not_follow_a_redirect_to_another_site(site):
    address = site.removeprefix("http://")
    assert "/elsewhere: status 401" in message(f"http://me:s3%3Acret@{address}/elsewhere")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "0.0.0.0", "2130706433", "127.1", "[::1]", "[::ffff:127.0.0.1]",
     "10.0.0.1", "169.254.169.254", "192.168.1.1", "[fe80::1]", "[fd00::1]", "224.0.0.1"],
)  # fmt: skip
def test_private_addresses_can_be_denied(monkeypatch, host):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    with download_policy(DownloadPolicy(allow_private=False)):
        assert "private address, which is not allowed here" in message(f"http://{host}/a.png")


def test_a_redirect_into_the_local_network_is_denied_too(site, monkeypatch):
    port = int(site.rpartition(":")[2])
    places = {"public.example": ("93.184.216.34", port), "127.0.0.1": ("127.0.0.1", port)}
    monkeypatch.setitem(ANSWERS, "/inside", redirect(f"{site}/a.png"))
    connect = socket.socket.connect

    def resolve(host, *_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", places[host])]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(
        socket.socket, "connect", lambda self, _: connect(self, ("127.0.0.1", port))
    )
    with download_policy(DownloadPolicy(allow_private=False)):
        assert same(open_image(f"http://public.example:{port}/a.png"), noise())
        assert "private address" in message(f"http://public.example:{port}/inside")


def test_a_name_is_looked_up_once_and_that_address_is_used(site, monkeypatch):
    port, lookups, reached = int(site.rpartition(":")[2]), [], []
    connect = socket.socket.connect

    def resolve(host, *_, **__):
        lookups.append(host)
        public = ("93.184.216.34", port) if len(lookups) == 1 else ("127.0.0.1", port)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", public)]

    def record(self, address):
        reached.append(address)
        connect(self, ("127.0.0.1", port))

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", record)
    with download_policy(DownloadPolicy(allow_private=False)):
        assert same(open_image(f"http://rebinding.example:{port}/a.png"), noise())
    assert lookups == ["rebinding.example"]
    assert reached == [("93.184.216.34", port)]


def test_a_proxy_is_used_where_the_system_names_one(site, monkeypatch):
    monkeypatch.setitem(ANSWERS, "http://far.example/a.png", picture)
    monkeypatch.setenv("http_proxy", site)
    assert same(open_image("http://far.example/a.png"), noise())
