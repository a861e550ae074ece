"""``internvl3 serve``: the HTTP server and its chat page."""

import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from internvl3_mlx.cli import console, launchd, options
from internvl3_mlx.cli.flags import Decorator, SectionedCommand, apply_flags, flag, flags_from
from internvl3_mlx.cli.qr_code import qr_lines
from internvl3_mlx.cli.system_info import report_kernel_fallbacks
from internvl3_mlx.errors import InternVL3Error, MissingExtraError, UserError
from internvl3_mlx.files import cache_folder
from internvl3_mlx.serving.limits import ServerLimits
from internvl3_mlx.serving.settings import EngineSettings

LIBRARIES = ("starlette", "uvicorn", "pydantic", "segno", "llguidance")
LOOPBACK, ANY_HOST = ("localhost", "127.0.0.1", "::1"), ("0.0.0.0", "::")
ELSEWHERE = ("192.0.2.1", 9)  # reserved for documentation: nothing is sent there
FEATURES = "server-features"
NETWORK_FLAGS: Mapping[str, Decorator] = {
    "host": flag(
        "Network", "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
        help="Address to listen on; 0.0.0.0 lets other machines in, with a key.",
    ),
    "port": flag(
        "Network", "--port", type=click.IntRange(0, 65535), default=8080, show_default=True,
        help="Port to listen on; 0 for a free one.",
    ),
    "api_key": flag(
        "Network", "--api-key", metavar="KEY", envvar=launchd.KEY_VARIABLE, show_envvar=True,
        help="Key that clients must send; made up where other machines can connect.",
    ),
    "no_auth": flag(
        "Network", "--no-auth", is_flag=True, help="Let other machines in without a key.",
    ),
    "allowed_origins": flag(
        "Network", "--allowed-origins", metavar="ORIGINS", default="",
        help="Web pages that may call the server, such as https://chat.example.org.",
    ),
    "allowed_hosts": flag(
        "Network", "--allowed-hosts", metavar="NAMES", default="",
        help="Further names of this machine, as behind a proxy.",
    ),
}  # fmt: skip
MODEL_FLAGS: Mapping[str, Decorator] = {
    "model": options.LOAD_FLAGS["model"],
    "quantize": options.LOAD_FLAGS["quantize"],
    "more_models": flag(
        "Model", "--add-model", "more_models", multiple=True, metavar="NAME=MODEL",
        help="Serve a further model under a name; loaded when it is first asked for.",
    ),
    "adapters": flag(
        "Model", "--add-adapter", "adapters", multiple=True, metavar="NAME=PATH|REPO",
        help="Serve an adapter, as MODEL:NAME.",
    ),
}  # fmt: skip


def own_flags(command: Any) -> Any:
    return apply_flags([*MODEL_FLAGS.values(), *NETWORK_FLAGS.values()], command)


@click.command(
    cls=SectionedCommand,
    short_help="Serve a model over HTTP, with a chat page.",
    examples=(
        ("internvl3 serve --model 2b", "then open http://127.0.0.1:8080"),
        ("internvl3 serve --host 0.0.0.0", "for a phone in the same network; prints a QR code"),
        ("internvl3 serve --install", "start with every login (macOS)"),
    ),
    suggestions={"-p": "--port", "--max-num-seqs": "--max-batch"},
)
@own_flags
@flags_from(EngineSettings)
@flags_from(ServerLimits)
@flag("Run", "--install", is_flag=True, help="Start the server with every login (macOS).")
@flag("Output", "--quiet", is_flag=True, help="No line for each request.")
@options.debug_flag
def serve_command(install: bool, quiet: bool, **given: Any) -> None:
    """Serve a model over HTTP: a chat page, and the APIs of OpenAI, Anthropic and Ollama.

    Only this machine can connect unless --host says otherwise. The guide (docs/guide/serving.md)
    shows how to connect Open WebUI, VS Code, LangChain and scripts.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    limits = ServerLimits(**fields_of(ServerLimits, chosen))
    api_key = choose_key(chosen["host"], chosen.get("api_key"), no_auth=chosen["no_auth"])
    if install:
        install_server(chosen, api_key)
        return
    require_libraries()
    settings = engine_settings(chosen)
    run(settings, limits, api_key, chosen, quiet=quiet)


def fields_of(
    cls: type[EngineSettings] | type[ServerLimits], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """Return those of the flags that are fields of a dataclass."""
    return {entry.name: chosen[entry.name] for entry in fields(cls) if entry.name in chosen}


def require_libraries() -> None:
    """Raise MissingExtraError unless the server's libraries are installed."""
    if any(find_spec(name) is None for name in LIBRARIES):
        raise MissingExtraError("internvl3 serve", " ".join(LIBRARIES), "server")


def choose_key(host: str, given: str | None, *, no_auth: bool) -> str | None:
    """Return the key that clients must send: a new one where others can connect and none is given.

    Raises UserError for a key together with --no-auth.
    """
    if no_auth:
        if given:
            raise UserError("--no-auth and a key contradict each other; drop one of them")
        return None
    if given:
        if not given.isascii() or not given.isprintable() or " " in given:
            raise UserError("the key has characters that HTTP cannot send; use letters and digits")
        return given
    return None if host in LOOPBACK else secrets.token_urlsafe(18)


def engine_settings(chosen: Mapping[str, Any]) -> EngineSettings:
    """Name the models, and find the first one before anything else starts."""
    model = chosen.get("model")
    if model is None:
        model = find_default_model(chosen.get("quantize"))
    models = {Path(model).name: model, **read_pairs(chosen["more_models"], "--add-model")}
    options = {
        **fields_of(EngineSettings, chosen),
        "models": models,
        "adapters": read_pairs(chosen["adapters"], "--add-adapter"),
        "feature_folder": cache_folder(FEATURES),
        "kv_bits": int(chosen["kv_bits"]) if "kv_bits" in chosen else None,
    }
    return EngineSettings(**options)


def find_default_model(quantize: int | None) -> str:
    """Return the default size, or the demo where it is neither here nor can be downloaded."""
    from internvl3_mlx.loading.fetch_model import fetch_model
    from internvl3_mlx.loading.resolve import DEFAULT_MODEL, DEMO, DEMO_FOLDER

    with console.spinner("finding the model") as notify:
        local = fetch_model(None, quantize, notify=notify)
    return DEMO if local.folder == DEMO_FOLDER else DEFAULT_MODEL


def read_pairs(pairs: tuple[str, ...], name: str) -> dict[str, str]:
    """Read NAME=VALUE pairs; raise UserError for one without a name or a value."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key or not value or ":" in key:
            raise UserError(f"{name} is {pair!r}; give it as NAME=VALUE, NAME without a colon")
        found[key] = value
    return found


def run(
    settings: EngineSettings,
    limits: ServerLimits,
    api_key: str | None,
    chosen: Mapping[str, Any],
    *,
    quiet: bool,
) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    from internvl3_mlx.serving.access import AccessPolicy
    from internvl3_mlx.serving.app import make_app
    from internvl3_mlx.serving.engine import Engine
    from internvl3_mlx.serving.run_server import ServerSettings, run_server

    report_kernel_fallbacks(quiet=quiet)
    debug = bool(click.get_current_context().meta.get(options.DEBUG_KEY))
    policy = AccessPolicy(
        api_key, split_names(chosen["allowed_origins"]), split_names(chosen["allowed_hosts"])
    )
    engine = Engine(settings, notify=console.note)

    def report_fault(fault: BaseException) -> None:
        if debug:
            console.print_traceback(fault)
        console.error(describe_failure(fault))

    def write_line(line: str) -> None:
        if not quiet:
            console.hint(line)

    app = make_app(engine, limits, policy, write_line=write_line, report_fault=report_fault)
    host = chosen["host"]

    def on_ready(port: int) -> None:
        show_addresses(host, port, api_key)

    console.hint(f"loading {next(iter(settings.models))}")
    run_server(app, engine, ServerSettings(host, chosen["port"]), on_ready)
    console.hint("stopped")


def describe_failure(fault: BaseException) -> str:
    """Say what failed; words that are not ours may hold a part of the request."""
    if isinstance(fault, InternVL3Error):
        return str(fault)
    return f"{type(fault).__name__} while answering; start with --debug for the traceback"


def split_names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.replace(",", " ").split() if name)


def show_addresses(host: str, port: int, api_key: str | None) -> None:
    """Say where the server is, and for a phone in a QR code."""
    shown = own_address() if host in ANY_HOST else host
    base = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    page = base if api_key is None else f"{base}/#key={api_key}"
    key = {} if api_key is None else {"key": api_key}
    shown_as = {"chat page": page, "OpenAI": f"{base}/v1", "Anthropic, Ollama": base, **key}
    width = max(map(len, shown_as))
    for name, address in shown_as.items():
        console.hint(f"{name:{width}}  {address}")
    if host not in LOOPBACK and console.is_interactive(sys.stderr):
        for line in qr_lines(page):
            console.hint(line)
    console.hint("Ctrl-C stops the server")


def own_address() -> str:
    """Return this machine's address in its network: the one that a connection would come from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def install_server(chosen: Mapping[str, Any], api_key: str | None) -> None:
    """Write the agent that starts the server with every login, with the flags given now."""
    arguments = [word for word in sys.argv[2:] if word != "--install"]
    path = launchd.install_agent(without_key(arguments), api_key, Path.home())
    for line in launchd.describe_agent(path):
        console.write_line(line)


def without_key(arguments: list[str]) -> list[str]:
    """Drop the key from a command line: other users could read it there."""
    kept: list[str] = []
    skip = False
    for word in arguments:
        if skip or word.startswith("--api-key="):
            skip = False
            continue
        if word == "--api-key":
            skip = True
            continue
        kept.append(word)
    return kept
