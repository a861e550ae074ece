"""Download one file over HTTP within bounds: one deadline, from the lookup of the name to the end.

The body of a redirect is never read, and heads, interim responses included, are limited in size. A
policy says whether private addresses may be reached; the address that was checked is the one that
is connected to, so a name that changes its address in between gains nothing.
"""

import io
import ipaddress
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

READ_TIMEOUT_S = 20  # for the next bytes
DOWNLOAD_TIMEOUT_S = 120  # for everything
MAX_REDIRECTS = 5
MAX_HEAD_BYTES = 2**18  # of one response: status, headers and interim responses
CHUNK_BYTES = 2**16
WEB_SCHEMES = ("http", "https")
REDIRECTS = (301, 302, 303, 307, 308)
OK = 200
# Characters that are left as they are; others, such as spaces, are escaped.
URL_SAFE_CHARACTERS = "%/:=&?~+!$,;'@()*[]"
# Some hosts reject Python's default user agent.
REQUEST_HEADERS = {"User-Agent": "internvl3-mlx", "Accept": "image/*,*/*;q=0.5"}


@dataclass(frozen=True)
class DownloadPolicy:
    """What may be downloaded. allow_private: also from this machine and its local network."""

    allow_private: bool = True


class DownloadRefused(Exception):
    """A download that failed; the message holds no part of the address."""


class DownloadTooLarge(Exception):
    """A body beyond the limit."""


ALLOW_ALL = DownloadPolicy()
_policy: ContextVar[DownloadPolicy] = ContextVar("download_policy", default=ALLOW_ALL)


@contextmanager
def download_policy(policy: DownloadPolicy) -> Iterator[None]:
    """Apply a policy to all downloads in the block, in this thread or asyncio task.

    The commands allow private addresses, since their user types the URL. A program that takes URLs
    from others should deny them.
    """
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


def download(url: str, limit: int) -> bytes:
    """Return the bytes behind ``url``, at most ``limit``.

    Raises DownloadRefused, DownloadTooLarge.
    """
    budget = _Budget(time.monotonic() + DOWNLOAD_TIMEOUT_S)
    try:
        return _follow(quote(url.partition("#")[0], safe=URL_SAFE_CHARACTERS), limit, budget)
    except TimeoutError as error:
        raise DownloadRefused("the server is too slow") from error
    except HTTPException as error:
        raise DownloadRefused(f"not a valid HTTP answer ({type(error).__name__})") from error
    except OSError as error:
        raise DownloadRefused(error.strerror or type(error).__name__) from error
    except ValueError as error:  # from urllib, whose words may repeat a password
        raise DownloadRefused("the URL is not valid") from error


class _Budget:
    """What is left of the time and bytes of a download."""

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.bytes_left = 0

    def seconds(self) -> float:
        """Return how long the next step may take; raise TimeoutError when no time is left."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, READ_TIMEOUT_S)


class _BoundedStream(io.RawIOBase):
    """The bytes of a socket, each read within the budget."""

    def __init__(self, connected: socket.socket, budget: _Budget):
        self.connected = connected
        self.raw = connected.makefile("rb", buffering=0)  # keeps the socket open until read
        self.budget = budget

    def close(self) -> None:
        self.raw.close()
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.budget.bytes_left <= 0:
            raise DownloadTooLarge
        self.connected.settimeout(self.budget.seconds())
        count = self.raw.readinto(memoryview(buffer)[: self.budget.bytes_left]) or 0
        self.budget.bytes_left -= count
        return count


class _BoundedSocket:
    """What ``HTTPResponse`` needs of a socket."""

    def __init__(self, connected: socket.socket, budget: _Budget):
        self.stream = _BoundedStream(connected, budget)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self.stream)


class _BoundedResponse(HTTPResponse):
    def __init__(self, connected: socket.socket, *given: Any, budget: _Budget, **named: Any):
        bounded: Any = _BoundedSocket(connected, budget)
        super().__init__(bounded, *given, **named)


def _follow(url: str, limit: int, budget: _Budget) -> bytes:
    """Request ``url`` and what it redirects to, and read the first body that is the file."""
    origin = urlsplit(url)
    for _ in range(MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme.lower() not in WEB_SCHEMES or not parts.hostname:
            break
        headers = dict(REQUEST_HEADERS)
        if parts.username is not None:
            headers["Authorization"] = _basic_auth(parts)
        elif origin.username is not None and _same_site(parts, origin):
            headers["Authorization"] = _basic_auth(origin)
        with (
            closing(_connect(parts, budget)) as connection,
            closing(_request(connection, parts, headers, budget)) as response,
        ):
            if response.status == OK:
                return _read(response, limit, budget)
            target = response.getheader("Location")
        if response.status not in REDIRECTS:
            raise DownloadRefused(f"status {response.status}")
        if not target:
            break
        url = quote(urljoin(url, target), safe=URL_SAFE_CHARACTERS)
    raise DownloadRefused("it redirects in circles or away from http")


def _request(
    connection: HTTPConnection, parts: SplitResult, headers: dict[str, str], budget: _Budget
) -> HTTPResponse:
    target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
    proxied = connection.host != parts.hostname and parts.scheme.lower() == "http"
    if proxied:
        host = parts.netloc.rpartition("@")[2]
        target = f"http://{host}{target}"
        headers = {**headers, "Host": host}
    budget.bytes_left = MAX_HEAD_BYTES
    try:
        connection.request("GET", target, headers=headers)
        return connection.getresponse()
    except DownloadTooLarge as error:
        raise DownloadRefused("the server sends headers without end") from error


def _read(response: HTTPResponse, limit: int, budget: _Budget) -> bytes:
    """Read the body in chunks. A body shorter than its stated length is refused."""
    data = bytearray()
    budget.bytes_left = 2 * limit + MAX_HEAD_BYTES  # chunk headers count too
    while piece := response.read1(CHUNK_BYTES):
        data += piece
        if len(data) > limit:
            raise DownloadTooLarge
    if response.length:
        raise DownloadRefused(f"the connection ended {response.length} bytes too early")
    return bytes(data)


def _connect(parts: SplitResult, budget: _Budget) -> HTTPConnection:
    """Prepare a connection, through a proxy where the system names one."""
    secure = parts.scheme.lower() == "https"
    host, port = str(parts.hostname), parts.port or (443 if secure else 80)
    policy = _policy.get()
    proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme.lower())
    if proxy and policy.allow_private:
        place = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        connection = (HTTPSConnection if secure else HTTPConnection)(
            str(place.hostname), place.port or 80
        )
        if secure:
            connection.set_tunnel(host, port)
        policy = ALLOW_ALL
    else:
        connection = (HTTPSConnection if secure else HTTPConnection)(host, port)
    connection._create_connection = partial(_open_socket, policy, budget)  # type: ignore[attr-defined]
    connection.response_class = partial(_BoundedResponse, budget=budget)  # type: ignore[assignment]
    budget.bytes_left = MAX_HEAD_BYTES  # of a proxy's answer
    return connection


def _open_socket(
    policy: DownloadPolicy, budget: _Budget, place: tuple[str, int], *_: Any
) -> socket.socket:
    """Look the name up once, check its addresses, and connect to the first that answers."""
    problem: OSError = OSError("the name has no address")
    for family, address in _addresses(place, budget):
        if not policy.allow_private and not _is_public(str(address[0])):
            raise DownloadRefused("it leads to a private address, which is not allowed here")
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            opened.settimeout(budget.seconds())
            opened.connect(address)
            opened.settimeout(budget.seconds())
        except OSError as error:
            opened.close()
            problem = error
            continue
        return opened
    raise problem


def _addresses(place: tuple[str, int], budget: _Budget) -> list[tuple[int, tuple[Any, ...]]]:
    """Resolve a name. The system's resolver has no timeout, so a thread waits for it."""
    found: list[tuple[int, tuple[Any, ...]]] = []
    problems: list[OSError] = []

    def resolve() -> None:
        try:
            for family, _, _, _, address in socket.getaddrinfo(*place, type=socket.SOCK_STREAM):
                found.append((family, address))
        except (OSError, UnicodeError) as error:
            problems.append(error if isinstance(error, OSError) else OSError("not a host name"))

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(budget.seconds())
    if thread.is_alive():
        raise TimeoutError
    if problems:
        raise problems[0]
    return found


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    return all(each.is_global and not each.is_multicast for each in (parsed, mapped or parsed))


def _basic_auth(parts: SplitResult) -> str:
    secret = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return f"Basic {b64encode(secret.encode()).decode()}"


def _same_site(one: SplitResult, other: SplitResult) -> bool:
    """Return whether a password for ``other`` may be sent to ``one``."""
    return (one.scheme, one.hostname, one.port) == (other.scheme, other.hostname, other.port)
