"""The command `serve`. Whatever needs torch or a server is imported inside it."""

import logging
import os
import re
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from qwenvl_ft.cli.options import MaxPixels, MinPixels, SettingsOf, ThinkingOption, note_quantized, read_chat_settings
from qwenvl_ft.console import print_line, print_note
from qwenvl_ft.data.fetch import is_address, is_loopback
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.serve.api import Backend, Bounds
from qwenvl_ft.serve.middleware import SPARE_CONNECTIONS

if TYPE_CHECKING:
    from qwenvl_ft.infer.engine import Engine


def serve(
    context: typer.Context,
    model: Annotated[Path | None, typer.Argument(help="The model's folder.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="NAME=DIR: an adapter beside the base, by its name; several times.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="A name of the base; several times. Default: its folder's name.")
    ] = None,
    config: SettingsOf = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    thinking: ThinkingOption = None,
    host: Annotated[str, typer.Option(help="Where to listen; anywhere but on this machine needs --api-key-env.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="LISTENING_PORT", min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key_env: Annotated[str | None, typer.Option(metavar="VAR", help="The environment variable that holds the key.")] = None,
    admin_key_env: Annotated[
        str | None, typer.Option(metavar="VAR", help="Its key adds and takes away adapters (/v1/load_lora_adapter) while it runs.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Pictures are fetched from its URLs; several times. Default: none.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Pages of it, such as https://example.com, may ask from a browser; several times."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests answered at a time.")] = 16,
    prefix_mib: Annotated[
        int, typer.Option(min=0, help="Memory for what was read last; a question that begins like it, picture included, reads on.")
    ] = 1024,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; one more gets status 429.")] = 64,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Size of a request's body.")] = Bounds.body_bytes >> 20,
    max_pictures: Annotated[int, typer.Option(min=1, help="Pictures and frames of a request.")] = Bounds.pictures,
    max_megapixels: Annotated[
        int, typer.Option(min=1, help="Of one picture, before it is resized; all of a request may have twice as many.")
    ] = Bounds.picture_pixels // 1_000_000,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a question, pictures included.")] = Bounds.prompt_tokens,
    max_answer_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer; a request for more is capped, and told.")
    ] = Bounds.answer_tokens,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for a request, waiting included.")] = Bounds.seconds,
    root_path: Annotated[str, typer.Option(help="Answer below this path, too: /api/predict/NAME behind a gateway.")] = "",
    public_url: Annotated[str, typer.Option(help="Where clients reach the server, for DashScope's uploads.")] = "",
    engine: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="vllm starts `vllm serve`, as installed, behind this server.")
    ] = "transformers",
    engine_url: Annotated[
        list[str] | None,
        typer.Option(help="A vLLM that runs already, such as http://127.0.0.1:8001, in place of MODEL; several serve the same."),
    ] = None,
    engine_arg: Annotated[list[str] | None, typer.Option(help="An argument for `vllm serve`; several times.")] = None,
) -> None:
    """Serve a model and its adapters in OpenAI's and DashScope's dialects, and as a PAI EAS service.

    Example: qwenvl-ft serve data/tiny --adapter demo=runs/demo --port 8000
    """
    key, admin_key = callers_key(api_key_env, host), _key_of("--admin-key-env", admin_key_env)
    origins = [*map(partial(_origin, key), allowed_origin or [])]
    listening = context.with_resource(bind(host, port))  # closed at the command's end, however it comes
    bounds = Bounds(max_body_mib << 20, max_pictures, max_megapixels * 1_000_000, max_prompt_tokens, max_answer_tokens, timeout)
    from qwenvl_ft.serve.open_request import Opener

    opener = Opener(bounds, map(_host, allow_host or []))
    folders = dict(map(_adapter, adapter or []))
    if (model is None) == (not engine_url):
        raise typer.BadParameter("give the model's folder, or --engine-url", param_hint="MODEL")
    chat_settings = read_chat_settings(config, min_pixels, max_pixels, thinking)
    if engine_url and (adapter or name or engine_arg or any(chat_settings)):
        raise typer.BadParameter("the server there has its own models and arguments", param_hint="--engine-url")
    if engine_arg and engine != "vllm":
        raise typer.BadParameter("it is for --engine vllm", param_hint="--engine-arg")
    names = name or ([model.resolve().name] if model else [])
    if doubled := set(names) & set(folders):
        raise UserError(Problem("--adapter", f"{', '.join(doubled)} names the base, too", "give the adapter another name"))
    backend: Backend
    if model is None or engine == "vllm":
        from qwenvl_ft.serve.vllm_backend import VllmBackend, start_vllm

        if model:
            backend = start_vllm(model, names, folders, engine_arg or [], opener, chat_settings, admin_key is not None)
        else:
            first, *others = engine_url or [""]
            backend = VllmBackend(first, opener, others=others)
    else:
        from qwenvl_ft.infer.engine import check_folders, open_adapter, open_beside

        engines = open_beside(model, folders, chat_settings)
        print_note(*engines[None].chat.notes)
        from qwenvl_ft.serve.transformers_backend import TransformersBackend

        named = dict.fromkeys(names, engines[None]) | {name: engines[name] for name in folders}
        base: Path = model

        def opens(beside: "Engine", folder: Path, slot: str) -> "Engine":
            check_folders(base, [folder])
            return open_adapter(beside, base, folder, slot, chat_settings)

        backend = TransformersBackend(named, opener, max_batch, prefix_mib << 20, opens, folders)
    note_quantized(folders.values())
    from qwenvl_ft.serve.app import make_app

    max_requests, prefix = max_batch + max_waiting, f"/{root_path.strip('/')}".rstrip("/")
    app = make_app(backend, opener, max_requests, key, prefix, public_url, origins, admin_key)
    _run(app, listening, timeout, backend.names, max_requests)


def _run(app: Any, listening: socket.socket, timeout: float, names: Sequence[str], max_requests: int) -> None:
    """Serves until SIGTERM or SIGINT; then what has begun is finished, and nothing else begins."""
    import uvicorn

    from qwenvl_ft.serve.timeouts import TimeoutProtocol

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = uvicorn.Config(
        app, http=TimeoutProtocol, ws="none", lifespan="on", log_level="warning", access_log=False, server_header=False,
        limit_concurrency=max_requests + 2 * SPARE_CONNECTIONS, timeout_graceful_shutdown=int(timeout) + 15,
    )  # fmt: skip
    host, port = listening.getsockname()[:2]
    print_line(f"{', '.join(names)} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 and /api/v1; stop with Ctrl-C")
    uvicorn.Server(config).run(sockets=[listening])


def _adapter(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not name or not equals or not folder:
        raise typer.BadParameter(f"{text} is not NAME=DIR", param_hint="--adapter")
    return name, Path(folder)


def _key_of(flag: str, variable: str | None) -> str | None:
    """The key in a variable. Raises UserError where it holds none."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise UserError(Problem(f"{flag} {variable}", "is not set, or empty", f"export {variable}=... first"))
    if not (key.isascii() and key.isprintable()):
        what = "has letters that no header can carry"
        raise UserError(Problem(f"{flag} {variable}", what, "use printable ASCII, such as `openssl rand -hex 32`"))
    return key or None


def callers_key(variable: str | None, host: str) -> str | None:
    """The key that callers must have. Raises UserError where one is needed and there is none."""
    key = _key_of("--api-key-env", variable)
    if not key and not is_loopback(host):
        what = "would answer everyone who reaches this machine, without a key"
        raise UserError(Problem(f"--host {host}", what, "put a key into the environment and name it with --api-key-env VAR"))
    return key


def _host(text: str) -> str:
    """A host as it is found in URLs. Raises UserError for what never is: a URL, a port, a pattern."""
    host = text.lower().strip("[]")
    if not (is_address(host) or re.fullmatch(r"[\w-]+(\.[\w-]+)*", host)):
        fix = "write the host alone, such as images.example.com, once for each that there is"
        raise UserError(Problem(f"--allow-host {text}", "is no host", fix))
    return host


def _origin(key: str | None, text: str) -> str:
    """An origin as browsers send it. Raises UserError for what is none, and for any page at all where there is no key."""
    origin = text.lower()
    if origin == "*" and not key:
        raise UserError(
            Problem("--allowed-origin *", "would answer every page on the web, without a key", "name the page's origin")
        )
    parts = urlsplit(origin)
    if origin != "*" and (not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
        raise UserError(
            Problem(f"--allowed-origin {text}", "is no origin", "write https://example.com, with the port if it has one")
        )
    return origin


def bind(host: str, port: int) -> socket.socket:
    """The socket, before the model is loaded, so that a port in use is said at once. It listens once the server runs."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(Problem(f"{host}:{port}", f"cannot be listened on ({error.strerror})", "choose another --port")) from error
    return listening
