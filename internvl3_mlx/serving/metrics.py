"""Counters in the text format that Prometheus reads."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from internvl3_mlx.serving.interface import ServingEngine

PREFIX = "internvl3_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
KNOWN_ROUTES = (
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/api/chat",
    "/api/generate",
)
OTHER_ROUTE = "other"  # paths come from clients: unknown ones must not make endless series

# name of the metric -> field of EngineMetrics, help
COUNTERS = {
    "requests_total": ("requests", "Requests given to the engine."),
    "prompt_tokens_total": ("prompt_tokens", "Tokens of prompts."),
    "cached_prompt_tokens_total": ("cached_tokens", "Prompt tokens taken from the prefix cache."),
    "completion_tokens_total": ("completion_tokens", "Generated tokens."),
    "decode_steps_total": ("decode_steps", "Decoding steps of the whole batch."),
    "prefill_seconds_total": ("prefill_seconds", "Seconds spent reading prompts."),
    "decode_seconds_total": ("decode_seconds", "Seconds spent decoding."),
    "vision_seconds_total": ("vision_seconds", "Seconds spent encoding images."),
    "image_features_computed_total": ("image_features_computed", "Images that were encoded."),
    "image_features_reused_total": ("image_features_reused", "Images whose features were cached."),
    "model_loads_total": ("model_loads", "Models loaded."),
}
GAUGES = {
    "prefix_cache_bytes": ("prefix_cache_nbytes", "Bytes of the prefix cache."),
    "feature_cache_bytes": ("feature_cache_nbytes", "Bytes of image features in memory."),
    "kv_cache_bytes": ("kv_nbytes", "Bytes of the KV caches of running answers."),
    "peak_memory_bytes": ("peak_memory_nbytes", "The most memory that arrays took."),
}
STATES = {"waiting": "waiting", "prefilling": "prefilling", "running": "running"}


@dataclass(eq=False)
class HTTPMetrics:
    """Requests by route and status, and how long they took."""

    counts: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    buckets: Counter[float] = field(default_factory=Counter[float])
    seconds: float = 0.0

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self.counts[path if path in KNOWN_ROUTES else OTHER_ROUTE, status] += 1
        self.seconds += seconds
        self.buckets[next((bound for bound in SECONDS if seconds <= bound), float("inf"))] += 1


def prometheus_text(engine: ServingEngine, http: HTTPMetrics) -> str:
    """Return all metrics."""
    return "".join(f"{line}\n" for line in [*_engine_lines(engine), *_http_lines(http)])


def _engine_lines(engine: ServingEngine) -> Iterator[str]:
    metrics, status = engine.metrics(), engine.status()
    for kind, table in (("counter", COUNTERS), ("gauge", GAUGES)):
        for name, (source, about) in table.items():
            yield from _metric(name, kind, about, {"": getattr(metrics, source)})
    finished = {f'reason="{reason}"': count for reason, count in metrics.finished.items()}
    yield from _metric("answers_total", "counter", "Answers by how they ended.", finished)
    rejected = {f'reason="{reason}"': count for reason, count in metrics.rejected.items()}
    yield from _metric("rejected_total", "counter", "Requests that were refused.", rejected)
    load = {f'state="{name}"': getattr(status, source) for name, source in STATES.items()}
    yield from _metric("queue", "gauge", "Requests by what happens to them now.", load)
    loaded = sum(model.loaded for model in status.models)
    yield from _metric("models_loaded", "gauge", "Models in memory.", {"": loaded})
    tps = _rate(metrics.completion_tokens, metrics.decode_seconds)
    yield from _metric("decode_tokens_per_second", "gauge", "Mean speed of decoding.", {"": tps})
    tps = _rate(metrics.prompt_tokens - metrics.cached_tokens, metrics.prefill_seconds)
    yield from _metric("prefill_tokens_per_second", "gauge", "Mean speed of prefill.", {"": tps})


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds else 0.0


def _http_lines(http: HTTPMetrics) -> Iterator[str]:
    counts = {
        f'route="{route}",status="{status}"': count
        for (route, status), count in sorted(http.counts.items())
    }
    yield from _metric("http_requests_total", "counter", "Requests by route and status.", counts)
    name, total = f"{PREFIX}http_request_seconds", 0
    yield f"# HELP {name} How long requests took."
    yield f"# TYPE {name} histogram"
    for bound in (*SECONDS, float("inf")):
        total += http.buckets[bound]
        shown = "+Inf" if bound == float("inf") else f"{bound:g}"
        yield f'{name}_bucket{{le="{shown}"}} {total}'
    yield f"{name}_sum {http.seconds:.6f}"
    yield f"{name}_count {total}"


def _metric(name: str, kind: str, about: str, values: Mapping[str, float]) -> Iterator[str]:
    """Yield a metric's lines. values: by their labels, "" for none."""
    yield f"# HELP {PREFIX}{name} {about}"
    yield f"# TYPE {PREFIX}{name} {kind}"
    for labels, value in values.items():
        braces = f"{{{labels}}}" if labels else ""
        yield f"{PREFIX}{name}{braces} {value}"
