"""The live page of a run, for this machine alone unless another address is asked for: it has no password.

It serves the page and the run's images of completions, nothing else of the folder. On loopback it answers only who has
asked for this machine by its own names: another site's page in the same browser can't read it under a name of its own.
"""

import hashlib
import ipaddress
import re
import socket
import threading
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from vogue.report.completions import Logged
from vogue.report.page import live_page
from vogue.report.runs import Run
from vogue.run.folder import IMAGES
from vogue.settings import ConfigError
from vogue.watch.following import Follower, Seen

HOST, PORT = "127.0.0.1", 6007
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
IMAGE = re.compile(rf"/{IMAGES}/([\w-]+\.webp)")


class Page:
    """The page as it is now, made anew where the run has gone on; for several requests at a time."""

    def __init__(self, follower: Follower):
        self.folder = follower.folder
        self._follower, self._lock = follower, threading.Lock()
        self._seen: tuple | None = None
        self._made = b""
        self.version = ""

    def now(self) -> tuple[bytes, str]:
        """The page and its version. Raises `ConfigError` where the run's folder can't be read."""
        with self._lock:
            seen = self._follower.look()
            state = f"{seen.state}: {seen.steps} of {seen.config.trainer.steps} steps"
            last = seen.completions[-1] if seen.completions else None
            key = (state, len(seen.metrics), len(seen.evaluations), last, tuple(seen.alarms))
            if key != self._seen:
                self._seen, self._made = key, live_page(_run(seen), seen.completions, seen.alarms, state).encode()
                self.version = f'"{hashlib.sha256(self._made).hexdigest()[:20]}"'
            return self._made, self.version


class Server(ThreadingHTTPServer):
    """Serves a run's page at `address`; port 0 is a free one. Raises `ConfigError` where that can't be listened on."""

    daemon_threads = True

    def __init__(self, follower: Follower, host: str = HOST, port: int = PORT):
        self.page = Page(follower)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"--host {host} --port {port}: {why}") from None
        self.is_local = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}/"


def serve(follower: Follower, host: str, port: int, console: Console) -> None:
    """Serve the run's page until Ctrl-C. Raises `ConfigError` where it can't be read, or not listened there."""
    follower.look()
    with Server(follower, host, port) as server:
        console.print(f"{server.address}  (Ctrl-C ends it)", soft_wrap=True)
        if not server.is_local:
            console.print("whoever reaches that address can read the run's questions and completions", style="yellow")
        with suppress(KeyboardInterrupt):  # how one ends it
            server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "vogue", ""
    timeout = 30  # seconds that a silent connection is kept for

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if self.server.is_local and self._host() not in LOCAL_NAMES:
            self._send(HTTPStatus.FORBIDDEN, b"this page is for this machine")
        elif path == "/":
            self._send_page()
        elif found := IMAGE.fullmatch(path):
            self._send_image(self.server.page.folder / IMAGES / found[1])
        else:
            self._send(HTTPStatus.NOT_FOUND, b"there is no such page")

    def _host(self) -> str:
        """The name that the client has asked for, without the port."""
        return re.sub(r":[0-9]*$", "", self.headers.get("Host", ""))

    def _send_page(self) -> None:
        try:
            page, version = self.server.page.now()
        except ConfigError as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode())
            return
        if self.headers.get("If-None-Match") == version:
            self._send(HTTPStatus.NOT_MODIFIED, b"", version=version)
        else:
            self._send(HTTPStatus.OK, page, "text/html; charset=utf-8", version)

    def _send_image(self, path: Path) -> None:
        try:
            self._send(HTTPStatus.OK, path.read_bytes(), "image/webp")
        except FileNotFoundError:
            self._send(HTTPStatus.NOT_FOUND, b"there is no such image")

    def _send(
        self, status: HTTPStatus, content: bytes, kind: str = "text/plain; charset=utf-8", version: str = ""
    ) -> None:
        headers = {"Content-Type": kind, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
        headers |= {"X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
        headers |= {"ETag": version} if version else {}
        headers |= {} if status == HTTPStatus.NOT_MODIFIED else {"Content-Length": str(len(content))}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args) -> None:
        """Leave the terminal alone: every few seconds the page asks for what is new."""


def _run(seen: Seen) -> Run:
    name = seen.folder.resolve().name
    return Run(
        seen.folder, name, seen.config, seen.metrics, seen.evaluations, Logged(seen.folder / "completions.jsonl")
    )
