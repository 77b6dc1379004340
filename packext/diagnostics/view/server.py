"""The live page: runs are read as they grow, and what is new is sent to whoever looks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any
from urllib.parse import parse_qs, urlsplit

import packext as px
from packext.diagnostics._run import RECORD, Replaced
from packext.diagnostics.view.content import Content
from packext.diagnostics.view.page import page, plotly_source

#: A long record appears bit by bit: how many bytes of it are read at once, and for how many seconds for one answer.
PIECE, PATIENCE = 2_000_000, 1.0


class Watched:
    """A run that may not be there yet, may go away, and may come back."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        """Take the folder of the record, and whom to tell that its state has changed."""
        self.path, self.tell = path, tell
        self.lock = Lock()
        self.content: Content | None = None
        self.error: str | None = ""
        self.opened = 0

    def answer(self, opened: int, since: int) -> dict[str, Any]:
        """What is new since the page has looked last.

        Args:
            opened: which opening of the record the page knows.
            since: its revision there.

        Returns:
            What `json.dumps` takes.
        """
        with self.lock:
            error, more, progress, message = None, False, 1.0, {}
            try:
                try:
                    more = self._content().update(PIECE)
                except Replaced:
                    self.content = None
                    more = self._content().update(PIECE)
                end = monotonic() + PATIENCE
                while more and since >= 0 and monotonic() < end:  # the first answer comes at once
                    more = self._content().update(PIECE)
                progress = self._content().progress
            except (px.PackextError, OSError) as problem:
                error = str(problem)
                if isinstance(problem, FileNotFoundError) and not (self.path / RECORD).exists():
                    gone = self.content is not None and self.content.revision > 0
                    what = f"the record was deleted ({RECORD})" if gone else f"has no record of a run yet ({RECORD})"
                    self.content, error = None, f"{self.path}: {what}. Waiting for it."
            if self.content is not None and self.content.revision:
                message = self.content.message(since if opened == self.opened else -1)
            if error != self.error:
                self.error = error
                self.tell(error or f"{self.path}: reading the record.")
            shown = {"opened": self.opened, "error": error, "more": more, "progress": progress}
            return {"name": self.path.resolve().name, "path": str(self.path)} | message | shown

    def _content(self) -> Content:
        if self.content is None:
            self.content, self.opened = Content(self.path), self.opened + 1
        return self.content

    def histogram(self, name: str, step: int) -> dict[str, Any] | None:
        """The histogram of a step, or None."""
        with self.lock:
            try:
                return self.content.histogram(name, step) if self.content else None
            except (px.PackextError, OSError) as problem:
                self.tell(str(problem))
                return None


class Server(ThreadingHTTPServer):
    """Serves the page of one run or two, on the loopback address alone.

    Example:
        >>> Server(["runs/first"], port=7070).serve_forever()
    """

    daemon_threads = True

    def __init__(self, paths: Sequence[str | Path], port: int = 0, tell: Callable[[str], None] = print) -> None:
        """Open the port; nothing is read before somebody looks.

        Args:
            paths: folders of records, which need not exist yet.
            port: 0 for any that is free.
            tell: is told when a record appears, disappears, or cannot be read.

        Raises:
            TypeError: for one path that is not in a list.
        """
        if isinstance(paths, (str, Path)):
            raise TypeError(f"paths must be a list of folders, such as [{str(paths)!r}], got {paths!r}.")
        self.plotly = gzip.compress(plotly_source().encode(), 1)
        self.runs = [Watched(Path(path), tell) for path in paths]
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """Answer: the page, plotly.js, what is new in a run, or a histogram of it."""
        # A name of somebody else's that leads here is not ours: pages of other sites are to read nothing.
        if (self.headers.get("Host") or "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
            self.send_error(403)
            return
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        try:
            if url.path == "/":
                names = ", ".join(run.path.resolve().name for run in self.server.runs)
                plotly = '<script src="plotly.js"></script>'
                text = page(f"{names} - packext", plotly, {"live": len(self.server.runs)})
                self._send(gzip.compress(text.encode(), 1), "text/html; charset=utf-8")
            elif url.path == "/plotly.js":
                self._send(self.server.plotly, "text/javascript; charset=utf-8")
            elif url.path == "/data":
                run = self.server.runs[int(query["run"])]
                self._json(run.answer(int(query["opened"]), int(query["since"])))
            elif url.path == "/histogram":
                self._json(self.server.runs[int(query["run"])].histogram(query["name"], int(query["step"])))
            else:
                self.send_error(404)
        except (KeyError, ValueError, IndexError):
            self.send_error(400)
        except ConnectionError:  # the page was closed meanwhile
            self.close_connection = True

    def _json(self, value: Any) -> None:
        text = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
        self._send(gzip.compress(text, 1), "application/json")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        headers = {
            "Content-Type": kind,
            "Content-Encoding": "gzip",
            "Content-Length": len(body),
            "Cache-Control": "no-store",
        }
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing of each request."""
