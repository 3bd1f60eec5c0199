"""HTTP to one vLLM server, or to several that serve the same model; needs neither vLLM nor torch's devices."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests
from tenacity import (
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
    wait_exponential,
)

from kdlib.serving.connection import Connection, FailingError, NoAnswerError, Payload
from kdlib.serving.errors import ServerAwayError, ServerFailedError

_logger = logging.getLogger("kdlib.serving")
_TRIES_OF_A_FAILING_REQUEST = 3
_AVOID_SECONDS = 30.0  # how long a replica that is away is asked only when no other answers


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model of a server: what requests call it, the checkpoint it was loaded from, and its longest row in tokens."""

    name: str
    root: str
    max_model_len: int | None


class ServerClient:
    """Requests to ``url``, with or without /v1, or to each of a list of replicas in turn (one that is away is passed over).

    timeout: seconds for one answer. patience: seconds for which an unreachable or overloaded server is tried again, with
    growing pauses, before ServerAwayError. concurrency: requests at a time. The variable KDLIB_API_KEY is the bearer token.
    """

    def __init__(
        self, url: str | Sequence[str], *, timeout: float = 120.0, patience: float = 300.0, concurrency: int = 8
    ) -> None:
        self.urls = [_base(one) for one in ([url] if isinstance(url, str) else url)]
        if not self.urls or concurrency < 1:
            raise ValueError("a served model needs at least one URL and a concurrency of at least 1")
        self.timeout, self.patience, self.concurrency = timeout, patience, concurrency
        self._connection = Connection(timeout=timeout, concurrency=concurrency)
        self._slots = threading.BoundedSemaphore(concurrency)  # several threads may ask at the same time
        self._turn = itertools.count()
        self._avoided: dict[str, float] = {}  # replicas that are away, and until when they are passed over
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return ", ".join(self.urls)

    def each(self) -> list[ServerClient]:
        """One client for each replica that was not away when it was last asked."""
        settings = {"timeout": self.timeout, "patience": self.patience}
        return [ServerClient(url, concurrency=self.concurrency, **settings) for url in self.urls if url not in self._avoided]

    def models(self, *, command: str = "") -> list[Served]:
        """What every reachable replica serves, asked once: ValueError, naming ``command``, when none can be reached."""
        answers, problems = [], []
        for url in self.urls:
            try:
                answers.append(self._connection.send(url, "/v1/models").json()["data"])
            except (NoAnswerError, requests.JSONDecodeError, KeyError) as problem:
                problems.append(f"{url} ({problem})")
                self._leave(url)
        if not answers:
            hint = f"start it with `{command}`" if command else "is it running?"
            raise ValueError(f"no vLLM server answers at {', '.join(problems)}: {hint}")
        if problems:
            _logger.warning("%s cannot be reached; going on with the other replicas", "; ".join(problems))
        shared = set.intersection(*({entry["id"] for entry in answer} for answer in answers))
        if not shared:
            raise ValueError(f"the replicas {self.name} serve different models: a teacher is one model")
        return [_served(entry["id"], answers) for entry in answers[0] if entry["id"] in shared]

    def get_text(self, path: str) -> str:
        """What the first replica answers to a GET, asked once; ConnectionError or ServerRefusedError when there is nothing."""
        return self._connection.send(self.urls[0], path).text

    def lines(self, path: str, payload: Payload) -> Generator[bytes]:
        """The lines of the first replica's answer, asked once, each as it arrives.

        ConnectionError when it goes away, ServerRefusedError for what it declines.
        """
        return self._connection.lines(self.urls[0], path, payload=payload)

    def post(self, path: str, payload: Payload) -> requests.Response:
        """The answer to one request. ServerAwayError, ServerRefusedError or ServerFailedError when there is none."""
        return self._post(path, payload, threading.Event())

    def map(self, path: str, payloads: Sequence[Payload]) -> list[requests.Response]:
        """The answers in the order of ``payloads``, ``concurrency`` requests at a time; the first error ends it."""
        return self._mapped(self._post, path, payloads)

    def outcomes(self, path: str, payloads: Sequence[Payload]) -> list[requests.Response | ServerFailedError]:
        """As ``map``, with the error in place of the answer where a healthy server fails on a request."""
        return self._mapped(self._outcome, path, payloads)

    def _mapped(self, call: Callable[..., Any], path: str, payloads: Sequence[Payload]) -> list[Any]:
        stop = threading.Event()
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(call, path, payload, stop) for payload in payloads]
            try:
                return [future.result() for future in futures]
            except BaseException:  # Ctrl-C too: what waits for a server must not hold up the end
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _outcome(self, path: str, payload: Payload, stop: threading.Event) -> requests.Response | ServerFailedError:
        try:
            return self._post(path, payload, stop)
        except ServerFailedError as error:
            return error

    def _post(self, path: str, payload: Payload, stop: threading.Event) -> requests.Response:
        failures = itertools.count(1)

        def attempt() -> requests.Response:
            try:
                with self._slots:
                    return self._attempt(path, payload)
            except FailingError as error:
                if next(failures) < _TRIES_OF_A_FAILING_REQUEST:
                    raise
                raise ServerFailedError(str(error), status=500) from error

        retrying = Retrying(
            retry=retry_if_exception_type(NoAnswerError),
            stop=stop_after_delay(self.patience) | stop_when_event_set(stop),
            wait=wait_exponential(multiplier=0.25, max=15.0),
            sleep=sleep_using_event(stop),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except NoAnswerError as error:
            raise ServerAwayError(
                f"no answer from {self.name} for {self.patience:.0f} seconds ({error}): the run stops here with a checkpoint; "
                "start the server again, then the same command resumes"
            ) from error

    def _attempt(self, path: str, payload: Payload) -> requests.Response:
        """The first answer of a replica: in turn, those that were away lately last."""
        first, now = next(self._turn) % len(self.urls), time.monotonic()
        turn = self.urls[first:] + self.urls[:first]
        problems: list[NoAnswerError] = []
        for url in sorted(turn, key=lambda url: self._avoided.get(url, 0.0) > now):
            try:
                response = self._connection.send(url, path, payload=payload)
            except FailingError:
                raise
            except NoAnswerError as problem:
                problems.append(problem)
                self._leave(url, problem)
            else:
                self._back(url)
                return response
        raise problems[0]

    def _leave(self, url: str, problem: NoAnswerError | None = None) -> None:
        with self._lock:
            known = url in self._avoided
            self._avoided[url] = time.monotonic() + _AVOID_SECONDS
        if problem is not None and not known:
            _logger.warning("%s does not answer (%s); trying again for up to %.0f seconds", url, problem, self.patience)

    def _back(self, url: str) -> None:
        if url in self._avoided:
            with self._lock:
                known = self._avoided.pop(url, None) is not None
            if known:
                _logger.warning("%s answers again", url)


def is_url(name: object) -> bool:
    """Whether this is a server's address, not a path or Hub id."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))


def _base(url: str) -> str:
    if not is_url(url):
        raise ValueError(f"{url!r} is not a URL: a served model is given as http://HOST:PORT/v1")
    return url.rstrip("/").removesuffix("/v1")


def _served(name: str, answers: Sequence[Sequence[Mapping[str, Any]]]) -> Served:
    """The model ``name`` as all replicas can serve it: the shortest of their limits."""
    entries = [entry for answer in answers for entry in answer if entry["id"] == name]
    limits = [entry["max_model_len"] for entry in entries if entry.get("max_model_len") is not None]
    return Served(name=name, root=entries[0].get("root") or name, max_model_len=min(limits, default=None))
