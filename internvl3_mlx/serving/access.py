"""Who may call the server: keys, and the checks that keep other web pages out.

A page of another site can send requests to this machine from the user's browser, and with DNS
rebinding even read the answers. It cannot choose the ``Host`` and ``Origin`` headers, so both are
checked: a rebound name is neither an address nor a name of this machine.
"""

import hmac
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internvl3_mlx.serving.errors import FORBIDDEN, UNAUTHORIZED, APIError, dialect_of
from internvl3_mlx.serving.streams import CLOSE, discard_body

LOCAL_NAMES = ("localhost", "host.docker.internal")
DEFAULT_PORTS = {"http": 80, "https": 443}
# What the page itself is made of; everything else needs the key.
OPEN_PATHS = ("/", "/health", "/api/version")
PAGE_PATHS = "/page/"
# No script or style but our own files, and no connection to anywhere else.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "media-src blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
CORS_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "*, Authorization",
    "Access-Control-Max-Age": "600",
    "Vary": "Origin",
}


@dataclass(frozen=True)
class AccessPolicy:
    """Who may call. api_key: None lets everybody in who reaches the port.

    allowed_origins: web pages that may call, such as ``https://chat.example.org``; "*" for all.
    allowed_hosts: names of this machine beside those it has by itself.
    """

    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()


class AccessMiddleware:
    """Checks every request before anything of it is read, and adds the security headers."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy):
        self.app, self.policy = app, policy
        self.names = {*LOCAL_NAMES, *own_names(), *map(str.lower, policy.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        cors = {} if origin is None else self.cors_headers(origin)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update({**SECURITY_HEADERS, **cors})
            await send(message)

        answer = self.refusal(scope, headers)
        if answer is not None:
            await discard_body(receive)
        if answer is None and scope["method"] == "OPTIONS":
            answer = Response(status_code=204)
        await (answer or self.app)(scope, receive, send_with_headers)

    def refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Return the answer to a request that may not be served."""
        path = scope["path"]
        error = self.check_sender(headers)
        if error is None and scope["method"] != "OPTIONS":
            error = self.check_key(path, headers)
        if error is None:
            return None
        body = error.body(dialect_of(path))
        return JSONResponse(body, status_code=error.status, headers={**error.headers, **CLOSE})

    def check_sender(self, headers: Mapping[str, str]) -> APIError | None:
        """Refuse a foreign ``Host``, as in DNS rebinding, and a page of another site."""
        host = headers.get("host", "")
        if not self.is_own_host(host):
            return APIError(
                FORBIDDEN,
                "this is not a name of the server; use its address, or start it with "
                "--allowed-hosts NAME",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is None or self.is_same_origin(origin, host) or self.is_allowed_origin(origin):
            return None
        return APIError(
            FORBIDDEN,
            "web pages of other sites may not call this server; start it with "
            "--allowed-origins ORIGIN to allow one",
            code="origin_not_allowed",
        )

    def check_key(self, path: str, headers: Mapping[str, str]) -> APIError | None:
        key = self.policy.api_key
        if key is None or path in OPEN_PATHS or path.startswith(PAGE_PATHS):
            return None
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else ""
        given = given or headers.get("x-api-key", "")
        if hmac.compare_digest(given.encode(), key.encode()):
            return None
        said = "the key is not valid" if given else "the key of this server is missing"
        return APIError(
            UNAUTHORIZED,
            f"{said}; send the one it was started with as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def is_own_host(self, host: str) -> bool:
        """Tell whether a ``Host`` header is an address or a name of this machine."""
        name = host_name(host)
        return name is not None and (is_address(name) or name.rstrip(".") in self.names)

    def is_same_origin(self, origin: str, host: str) -> bool:
        """Tell whether a page was served by this server, whatever proxy ends its TLS."""
        try:
            parts = urlsplit(origin)
            port = parts.port or DEFAULT_PORTS.get(parts.scheme)
            own = urlsplit(f"{parts.scheme}://{host}")
            own_port = own.port or DEFAULT_PORTS.get(parts.scheme)
        except ValueError:
            return False
        same_host = (parts.hostname or "") == (own.hostname or "") != ""
        return parts.scheme in DEFAULT_PORTS and same_host and port == own_port

    def is_allowed_origin(self, origin: str) -> bool:
        allowed = self.policy.allowed_origins
        return "*" in allowed or origin.rstrip("/") in {each.rstrip("/") for each in allowed}

    def cors_headers(self, origin: str) -> dict[str, str]:
        """Return the headers that let an allowed page read the answer."""
        if not self.is_allowed_origin(origin):
            return {}
        allowed = {"Access-Control-Allow-Origin": origin, **CORS_HEADERS}
        return {**allowed, "Cross-Origin-Resource-Policy": "cross-origin"}


def host_name(host: str) -> str | None:
    """Return the name in a ``Host`` header, lower case and without port; None if it has none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def own_names() -> set[str]:
    """List the names by which this machine is known in its own network."""
    name = socket.gethostname().lower().rstrip(".")
    short = name.partition(".")[0]
    return {each for each in (name, short, f"{short}.local") if each and each != ".local"}


def is_loopback(host: str) -> bool:
    """Tell whether a server bound to ``host`` can be reached from this machine only."""
    if host == "localhost":
        return True
    return is_address(host) and ipaddress.ip_address(host.partition("%")[0]).is_loopback
