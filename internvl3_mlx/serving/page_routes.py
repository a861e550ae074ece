"""The chat page: its three files, what it needs to know, and the tiles that it draws."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from internvl3_mlx.errors import UserError
from internvl3_mlx.images.tiling import TilePolicy, tile_count
from internvl3_mlx.loading.resolve import DEMO, DEMO_FOLDER
from internvl3_mlx.serving.answers import ServerContext
from internvl3_mlx.serving.errors import NOT_FOUND, APIError, invalid
from internvl3_mlx.serving.limits import MB
from internvl3_mlx.serving.served_models import find_model

PAGE_TYPES = {"index.html": "text/html", "style.css": "text/css", "chat.js": "text/javascript"}
OLLAMA_GREETING = "Ollama is running"  # what its clients look for at the root
MAX_SIDE = 1_000_000


@cache
def page_file(name: str) -> bytes:
    return (files("internvl3_mlx.serving") / "page" / name).read_bytes()


@cache
def sample_table() -> tuple[dict[str, str], ...]:
    """List the demo's sample images, each with a question."""
    return tuple(json.loads((DEMO_FOLDER / "samples" / "samples.json").read_text("utf-8")))


async def show_page(request: Request) -> Response:
    """Send the page to a browser, and Ollama's greeting to its clients."""
    accepted = request.headers.get("accept", "")
    if "text/html" not in accepted:
        return PlainTextResponse(OLLAMA_GREETING)
    return page_response("index.html")


async def show_page_file(request: Request) -> Response:
    return page_response(request.path_params["name"])


def page_response(name: str) -> Response:
    if name not in PAGE_TYPES:
        raise APIError(NOT_FOUND, "the page has no such file")
    headers = {"Cache-Control": "no-cache"}
    return Response(page_file(name), media_type=PAGE_TYPES[name], headers=headers)


async def show_sample(request: Request) -> Response:
    """Send one of the demo's sample images, named in its table and by no path."""
    name = request.path_params["name"]
    if name not in [entry["file"] for entry in sample_table()]:
        raise APIError(NOT_FOUND, "there is no such sample")
    return FileResponse(DEMO_FOLDER / "samples" / name)


def describe_page(context: ServerContext) -> dict[str, Any]:
    """Return what the page needs to know beside the models. samples: for the demo model only."""
    limits = context.limits
    first = context.engine.status().models[0]
    samples = sample_table() if first.name == DEMO else ()
    return {
        "max_images": limits.max_images,
        "max_body_bytes": limits.max_body_mb * MB,
        "max_tokens": limits.max_tokens,
        "samples": [
            {"url": f"/page/samples/{entry['file']}", "question": entry["question"]}
            for entry in samples
        ],
    }


def count_tiles(request: Request, context: ServerContext) -> JSONResponse:
    """Answer how the model cuts an image of some size, for the page to draw over it."""
    model = find_model(context.engine, request.query_params.get("model"))
    width, height = (read_number(request, name, MAX_SIDE) for name in ("width", "height"))
    most = read_number(request, "max_tiles", MAX_SIDE, model.max_tiles or 12)
    try:
        policy = TilePolicy(tile_size=model.tile_size or 448, max_tiles=most)
        columns, rows = grid = policy.grid(width, height)
    except UserError as error:
        raise invalid(str(error)) from error
    tiles = tile_count(grid, policy.thumbnail)
    size = {"columns": columns, "rows": rows, "tiles": tiles}
    return JSONResponse({**size, "thumbnail": tiles > columns * rows})


def read_number(request: Request, name: str, most: int, default: int | None = None) -> int:
    """Read a whole number from 1 to ``most`` from the query."""
    text = request.query_params.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= most:
        raise invalid(f"{name} must be a whole number from 1 to {most}", name)
    return int(text[:9])
