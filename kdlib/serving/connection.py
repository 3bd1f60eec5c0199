"""HTTP requests that are sent once, and what servers mean by their answers."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import requests

from kdlib.serving.errors import ServerFailedError, ServerRefusedError

API_KEY_VARIABLE = "KDLIB_API_KEY"

Payload = Mapping[str, Any]

_NOT_A_NUMBER = "not JSON compliant"  # what a server says (HTTP 400) whose answer holds NaN
_BUSY = (429, 502, 503, 504)  # HTTP statuses of a server that will answer later
_CONNECT_SECONDS = 10.0


class NoAnswerError(ConnectionError):
    """No answer now; there may be one later."""


class FailingError(NoAnswerError):
    """HTTP 500 while /health is fine."""


class Connection:
    """Requests to any server, with the variable KDLIB_API_KEY as the bearer token; threads may share one.

    timeout: seconds for one answer. concurrency: connections that are kept for a server.
    """

    def __init__(self, *, timeout: float, concurrency: int) -> None:
        self._timeout = (min(_CONNECT_SECONDS, timeout), timeout)
        self._session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=concurrency)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        if API_KEY_VARIABLE in os.environ:
            self._session.headers["Authorization"] = f"Bearer {os.environ[API_KEY_VARIABLE]}"

    def send(self, url: str, path: str, *, payload: Payload | None = None) -> requests.Response:
        """The answer to a POST of ``payload``, to a GET without one.

        NoAnswerError when there is none now, ServerRefusedError or ServerFailedError for what is declined.
        """
        with _unreachable():
            method = "GET" if payload is None else "POST"
            response = self._session.request(method, url + path, json=payload, timeout=self._timeout)
        if response.status_code < 400:
            return response
        message = _message(response)
        if response.status_code == 500 and self._healthy(url):
            raise FailingError(message)
        if response.status_code >= 500 or response.status_code in _BUSY:
            raise NoAnswerError(f"HTTP {response.status_code}: {message}")
        if _NOT_A_NUMBER in message:
            raise ServerFailedError(f"its answer holds NaN or infinity ({message})", status=response.status_code)
        raise ServerRefusedError(f"{url} refuses: {message}", status=response.status_code)

    def lines(self, url: str, path: str, *, payload: Payload) -> Generator[bytes]:
        """The lines of an answer, each as it arrives; NoAnswerError or, for any HTTP error, ServerRefusedError."""
        with _unreachable(), self._session.post(url + path, json=payload, stream=True, timeout=self._timeout) as response:
            if response.status_code >= 400:
                raise ServerRefusedError(_message(response), status=response.status_code)
            yield from response.iter_lines()

    def _healthy(self, url: str) -> bool:
        with _unreachable():
            return self._session.get(f"{url}/health", timeout=self._timeout[0]).ok


@contextmanager
def _unreachable() -> Iterator[None]:
    try:
        yield
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        kind = "time-out" if isinstance(error, requests.Timeout) else "no connection"
        raise NoAnswerError(kind) from error


def _message(response: requests.Response) -> str:
    """The one line in which a server says what is wrong."""
    try:
        body = response.json()
    except requests.JSONDecodeError:
        body = response.text
    if isinstance(body, dict):
        body = body["error"]["message"] if isinstance(body.get("error"), dict) else body.get("detail", body)
    return (str(body).strip().splitlines() or [response.reason])[0][:300]
