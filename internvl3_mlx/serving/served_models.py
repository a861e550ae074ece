"""Which model a request means, and the list of models in the shape of both OpenAI and Anthropic."""

from datetime import datetime, timezone
from typing import Any

from internvl3_mlx.serving.interface import ServingEngine
from internvl3_mlx.serving.ollama import LATEST
from internvl3_mlx.serving.requests import UnknownModel
from internvl3_mlx.serving.status import ModelStatus

OWNER = "internvl3-mlx"


def find_model(engine: ServingEngine, name: str | None) -> ModelStatus:
    """Return the model that a request means.

    Where one model is served, any name means it: clients keep names of other servers. Raises
    ``UnknownModel``.
    """
    models = engine.status().models
    wanted = (name or "").removesuffix(LATEST)
    by_name = {model.name: model for model in models}
    if wanted in by_name:
        return by_name[wanted]
    if not wanted or len(models) == 1:
        return models[0]
    known = ", ".join(by_name)
    raise UnknownModel(f"model {wanted[:80]!r} is not served here; choose from {known}")


def list_models(engine: ServingEngine) -> dict[str, Any]:
    """Return the list of models; one object has the keys of both APIs."""
    models = [describe_model(model) for model in engine.status().models]
    ids = [model["id"] for model in models]
    return {
        "object": "list",
        "data": models,
        "has_more": False,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }


def describe_model(model: ModelStatus) -> dict[str, Any]:
    created = datetime.fromtimestamp(model.created, timezone.utc)
    return {
        "id": model.name,
        "object": "model",
        "type": "model",
        "created": model.created,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "display_name": model.name,
        "owned_by": OWNER,
        "max_model_len": model.context_length or None,
        "input_modalities": ["text", "image", "video"],
        "loaded": model.loaded,
    }
