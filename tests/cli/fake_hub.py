"""A server on this machine that speaks as much of the Hugging Face Hub's protocol as a push needs."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN, USER = "hf_of_ann", "ann"
COMMIT = re.compile(r"^/api/(models|datasets)/([\w.-]+/[\w.-]+)/(preupload|commit)/([\w.-]+)$")
BRANCH = re.compile(r"^/api/(models|datasets)/([\w.-]+/[\w.-]+)/branch/([\w.-]+)$")
MODEL = re.compile(r"^/api/models/([\w.-]+/[\w.-]+)$")


@dataclass
class FakeHub:
    """What was asked of the server: ``files`` {(kind, repository, branch): {path: content}}; ``cards`` of its models."""

    url: str = ""
    files: dict[tuple[str, str, str], dict[str, bytes]] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)

    def repository(self, name: str, *, kind: str = "models", branch: str = "main") -> dict[str, bytes]:
        return self.files[kind, f"{USER}/{name}", branch]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """The server, running."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            model = MODEL.match(self.path.partition("?")[0])
            if self.headers["Authorization"] not in (None, f"Bearer {TOKEN}"):
                self._answer({"error": "Invalid username or password."}, status=401)
            elif self.path == "/api/whoami-v2":
                self._answer({"name": USER, "type": "user", "orgs": []})
            elif model is not None and model[1] in hub.cards:
                self._answer({"id": model[1], "cardData": hub.cards[model[1]], "siblings": [], "tags": []})
            else:
                self._answer({"error": "Repository not found"}, status=404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                hub.created.append(asked)
                kind = "datasets/" if asked.get("type") == "dataset" else ""
                self._answer({"url": f"{hub.url}/{kind}{asked.get('organization') or USER}/{asked['name']}"})
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif branch := BRANCH.match(self.path):
                hub.branches.append(branch[3])
                self._answer({})
            elif commit := COMMIT.match(self.path.partition("?")[0]):
                kind, name, step, revision = commit.groups()
                self._answer(self._preupload(body) if step == "preupload" else self._commit((kind, name, revision), body))
            else:
                self._answer({"error": f"not spoken here: {self.path}"}, status=501)

        def _preupload(self, body: bytes) -> dict[str, Any]:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}

        def _commit(self, where: tuple[str, str, str], body: bytes) -> dict[str, Any]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    hub.messages.append(line["value"]["summary"])
                else:
                    content = base64.b64decode(line["value"]["content"])
                    hub.files.setdefault(where, {})[line["value"]["path"]] = content
            return {"commitUrl": f"{hub.url}/{where[1]}/commit/0123abc", "commitOid": "0123abc", "success": True}

        def _answer(self, content: dict[str, Any], *, status: int = 200) -> None:
            payload = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    return Handler
