"""Models behind a vLLM server or engine: the HTTP client, the engine in this process, and the command that starts a server."""

from __future__ import annotations

from kdlib.serving.client import ServerClient
from kdlib.serving.command import serve_command
from kdlib.serving.engine import start_engine, stop_engine
from kdlib.serving.errors import BadRowsError, ServerAwayError, ServerFailedError, ServerRefusedError

__all__ = [
    "BadRowsError",
    "ServerAwayError",
    "ServerClient",
    "ServerFailedError",
    "ServerRefusedError",
    "serve_command",
    "start_engine",
    "stop_engine",
]
