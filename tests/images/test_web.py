"""Pictures from the web: a local server plays the good and the bad ones."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fixtures.image_files import encoded, message, noise, same

from internvl3_mlx.images import fetch
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
    monkeypatch.setattr(fetch, "DOWNLOAD_TIMEOUT_S", 0.1)
    assert "/drip: the server is too slow" in message(f"{site}/drip")


def test_a_silent_server_is_given_up(site, monkeypatch):
    monkeypatch.setattr(fetch, "READ_TIMEOUT_S", 0.1)
    assert "/silent: the server is too slow" in message(f"{site}/silent")


def test_a_server_that_is_not_there_is_told(site):
    assert "cannot download http://127.0.0.1:1/a.png: " in message("http://127.0.0.1:1/a.png")
    assert "cannot download http://127.0.0.1:x/a.png: " in message("http://127.0.0.1:x/a.png")
