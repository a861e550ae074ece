"""What flags do with what they are given, beyond checking its type."""

import json
from pathlib import Path
from typing import Any

import click

from internvl3_mlx.errors import UserError


def complete_models(ctx: click.Context, param: click.Parameter, typed: str) -> Any:
    from internvl3_mlx.cli.completion import models

    return models(ctx, param, typed)


def read_schema(_ctx: click.Context, _param: click.Parameter, path: str | None) -> str | None:
    """Read the file now: a mistake in its name must not cost loading a model."""
    if path is None:
        return None
    try:
        text = Path(path).expanduser().read_text("utf-8")
        json.loads(text)
    except OSError as error:
        raise UserError(f"no schema at {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}; correct it") from error
    return text
