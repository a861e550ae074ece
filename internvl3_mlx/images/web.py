"""Download one picture: http and https only, with limits on size, time and redirects."""

import time
from http.client import HTTPException
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from internvl3_mlx.errors import ImageError
from internvl3_mlx.images.fetch import MAX_BYTES, too_large

SCHEMES = ("http", "https")
SILENCE_S = 20  # longest wait for the next bytes
TOTAL_S = 120  # longest download
MAX_REDIRECTS = 5
CHUNK_BYTES = 2**16
# Characters that are already meant as they stand; the rest, such as spaces, is escaped.
SAFE = "%/:=&?~#+!$,;'@()*[]"
# Some hosts refuse Python's own name.
HEADERS = {"User-Agent": "internvl3-mlx", "Accept": "image/*,*/*;q=0.5"}


class _Redirects(HTTPRedirectHandler):
    """Follow a few redirects, and only to the web."""

    max_redirections = max_repeats = MAX_REDIRECTS

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme.lower() not in SCHEMES:
            raise HTTPError(req.full_url, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(address: str, name: str) -> bytes:
    """Download ``address``; ``name`` is what messages call it."""
    try:
        request = Request(quote(address, safe=SAFE), headers=HEADERS)
        with build_opener(_Redirects).open(request, timeout=SILENCE_S) as response:
            return _read(response, name)
    except HTTPError as error:
        error.close()
        lost = error.code in range(300, 400)
        what = "it redirects in circles or away from the web" if lost else f"answer {error.code}"
        raise _refused(name, what) from error
    except TimeoutError as error:
        raise _refused(name, "the server is too slow") from error
    except URLError as error:
        slow = isinstance(error.reason, TimeoutError)
        raise _refused(name, "the server is too slow" if slow else str(error.reason)) from error
    except (HTTPException, OSError, ValueError) as error:
        raise _refused(name, str(error) or type(error).__name__) from error


def _read(response: IO[bytes], name: str) -> bytes:
    """Read the body piece by piece, so that neither size nor slowness can run away."""
    deadline = time.monotonic() + TOTAL_S
    data = bytearray()
    while piece := response.read1(CHUNK_BYTES):  # type: ignore[attr-defined]
        data += piece
        if len(data) > MAX_BYTES:
            raise too_large(name)
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(data)


def _refused(name: str, what: str) -> ImageError:
    return ImageError(
        f"cannot download {name}: {' '.join(what.split())}; "
        "check the address, or save the picture and give its path"
    )
