"""A server on loopback that answers only the requests that the page needs."""

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skipdit.app.config import AppOptions
from skipdit.app.downloads import PREFIX, Downloads
from skipdit.app.jobs import Jobs
from skipdit.app.models import Models

if TYPE_CHECKING:
    from gradio import Blocks, Theme

LOOPBACK = ("127.0.0.1", "localhost", "::1")
API = "/gradio_api"
# what the page asks for; Gradio has many more routes, for files, uploads, proxies and editing, which it does not need
READ = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(?:static|assets|svelte)/.*|/download/[\w-]+/[\w.-]+"
    rf"|{API}/(?:info|app_id|startup-events|theme\.css|queue/data|heartbeat/\w+)"
)
MAX_BODY = 2**20  # bytes of a request
WRITTEN = re.compile(rf"{API}/(?:queue/join|run/predict|cancel|reset)/?")
HEADERS = {
    # the page's own scripts and styles, and pictures that are in the page itself
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
        "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def is_loopback(host: str) -> bool:
    return host in LOOPBACK


def refusal(method: str, path: str, host: str, origin: str | None, *, loopback: bool) -> int | None:
    """Return the status code if a request is refused; `None` if it is answered.

    host, origin: of the request's headers. Another site's script cannot reach a page on loopback by a name that it
    makes point there, nor send it anything.
    """
    try:
        name, sender = urlsplit(f"//{host}").hostname or "", origin and urlsplit(origin).netloc
    except ValueError:  # not an address
        return 400
    if loopback and not is_loopback(name):
        return 403
    if method in ("GET", "HEAD"):
        return None if READ.fullmatch(path) else 404
    if method != "POST" or not WRITTEN.fullmatch(path):
        return 404
    return None if origin is None or sender == host else 403


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first returns a body that was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


async def body_of(receive: Receive) -> bytes | None:
    """Return the body of a request; `None` if it is larger than `MAX_BODY`, or the sender has left."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def is_plain(body: bytes) -> bool:
    """Return True if the values of a form are texts, numbers and lists of them. Gradio would copy a file that an object
    names, or download it."""
    try:
        content = json.loads(body)
        values = list(content.get("data") or ())
    except (ValueError, RecursionError, AttributeError, TypeError):
        return False
    while values:
        match values.pop():
            case dict():
                return False
            case list() as entries:
                values += entries
    return True


class Guard:
    """Refuses requests by `refusal` and `is_plain`, and adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp, *, loopback: bool) -> None:
        self.app, self.loopback = app, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page has no web sockets
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        status = refusal(scope["method"], scope["path"], host, origin, loopback=self.loopback)

        if status is None and scope["method"] == "POST":
            body = await body_of(receive)
            status = None if body is not None and is_plain(body) else 400
            receive = replayed(body or b"", receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = self.app if status is None else Response(status_code=status)
        await answer(scope, receive, send_with_headers)


def make_app(
    blocks: "Blocks", downloads: Downloads, *, loopback: bool, theme: "Theme | None" = None, css: str = ""
) -> FastAPI:
    """Return the page as a web application."""
    import gradio

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, loopback=loopback)

    @app.get(f"{PREFIX}{{token}}/{{name}}")
    def download(token: str, name: str) -> Response:
        file = downloads.get(token)
        if file is None or file.name != name:
            return Response(status_code=404)
        return Response(
            file.content, media_type=file.kind, headers={"Content-Disposition": f'attachment; filename="{file.name}"'}
        )

    blocks.queue(default_concurrency_limit=4, api_open=False)
    return gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        max_file_size=1,
        ssr_mode=False,
        show_error=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme,
        css=css,
    )


@contextmanager
def private_gradio() -> Iterator[None]:
    """Keep Gradio offline, and its files in a temporary folder, inside the block. Enter it before Gradio is
    imported."""
    with TemporaryDirectory(prefix="skipdit-app-") as folder:
        settings = {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_SSR_MODE": "False",
        }
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket. `ValueError` if that fails."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}): give another --port or --host") from error


def serve(options: AppOptions) -> None:
    """Serve the page until it is stopped. `ValueError` or `OSError` if a model or the port is unavailable."""
    loopback = is_loopback(options.host)
    with listen(options.host, options.port) as bound, private_gradio():
        port = bound.getsockname()[1]
        if not loopback:
            print(
                f"skipdit: warning: everyone who can reach port {port} of this machine can use the page: it has no "
                "password",
                file=sys.stderr,
            )
        from skipdit.app.page import Page, css, make_theme

        jobs, downloads = Jobs(), Downloads()
        try:
            page = Page(Models(options.models, options.device, options.dtype), jobs, downloads, options.results)
            app = make_app(page.build(), downloads, loopback=loopback, theme=make_theme(), css=css())
            settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
            name = f"[{options.host}]" if ":" in options.host else options.host
            print(f"the page is at http://{name}:{port} (Ctrl-C stops it)", flush=True)
            uvicorn.Server(settings).run(sockets=[bound])
        finally:
            jobs.close()
