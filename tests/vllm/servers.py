"""Real vLLM servers for tests: started on a free port of this machine, killed and restarted on the same one, always ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class ServedModel:
    """One ``vllm.entrypoints.openai.api_server`` process (and its engine's) at ``url``; what it prints goes to ``log``."""

    def __init__(self, model: str | Path, *, port: int, log: Path, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.port, self.log, self.url = port, log, f"http://127.0.0.1:{port}"
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self._command = [*module, "--host", "127.0.0.1", "--port", str(port), *arguments]
        self._env = {**os.environ, **_ENVIRONMENT, **env}
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:  # a session of its own, so that the engine's process can be ended with it
            return subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log, start_new_session=True)

    def wait(self, *, timeout: float = 400.0) -> ServedModel:
        """Returns when /health answers; RuntimeError with the end of the log when the process ends before that."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except requests.RequestException:
                pass
            time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"the vLLM server did not start; the end of {self.log}:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """SIGKILL for the server and its engine, as when a machine goes away."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def start(self) -> None:
        """The same server on the same port again, without waiting for it."""
        assert self.process.poll() is not None, "kill it first"
        self.process = self._started()


@contextmanager
def serving(
    model: str | Path, *arguments: str, log: Path, env: Mapping[str, str] | None = None, wait: bool = True
) -> Iterator[ServedModel]:
    """A server for the checkpoint ``model`` with these command-line arguments; ended when the block is left."""
    server = ServedModel(model, port=_free_port(), log=log, arguments=arguments, env=env or {})
    try:
        yield server.wait() if wait else server
    finally:
        server.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
