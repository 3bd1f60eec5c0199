"""A local HTTP server whose answers a test writes; it looks like vLLM's to a client."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Answer = tuple[int, Any]  # status, JSON body (or bytes with a metadata header as a (dict, bytes) pair)
Handler = Callable[[str, Any], Answer]


class FakeServer:
    """Serves ``model`` at ``url``; ``answer(path, payload)`` answers POST requests, ``seen`` keeps (path, headers, payload)."""

    def __init__(self, answer: Handler, *, model: str = "teacher", root: str = "/nowhere", limit: int | None = 128) -> None:
        self.answer, self.seen, self.healthy = answer, list[tuple[str, dict[str, str], Any]](), True
        self.models = [{"id": model, "root": root, "max_model_len": limit}]
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def refusal(status: int, message: str) -> Answer:
    """An error as vLLM writes it."""
    return status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


def _handler(fake: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Requests(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                return self._send((200 if fake.healthy else 503, {}))
            self._send((200, {"object": "list", "data": fake.models}))

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.seen.append((self.path, dict(self.headers), payload))
            self._send(fake.answer(self.path, payload))

        def _send(self, answer: Answer) -> None:
            status, body = answer
            metadata, content = body if isinstance(body, tuple) else (None, json.dumps(body).encode())
            self.send_response(status)
            if metadata is not None:
                self.send_header("metadata", json.dumps(metadata))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Requests
