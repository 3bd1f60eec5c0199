"""The HTTP client against servers that fail in every way a real one has been seen to."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from kdlib.serving import ServerAwayError, ServerClient, ServerFailedError, ServerRefusedError
from tests.serving.fake import Answer, FakeServer, refusal


def echo(path: str, payload: Any) -> Answer:
    return 200, {"path": path, "payload": payload}


def failing(*answers: Answer) -> Any:
    """These answers in turn, then the payload."""
    first = iter(answers)
    return lambda path, payload: next(first, (200, {"payload": payload}))


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDLIB_API_KEY", raising=False)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_urls_with_and_without_v1_are_the_same(suffix: str) -> None:
    with FakeServer(echo) as server:
        client = ServerClient(server.url + suffix)
        assert client.post("/v1/completions", {"a": 1}).json() == {"path": "/v1/completions", "payload": {"a": 1}}
        (served,) = client.models()
        assert (served.name, served.root, served.max_model_len) == ("teacher", "/nowhere", 128)


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'localhost:8000' is not a URL.*http://HOST:PORT/v1"):
        ServerClient("localhost:8000")


def test_answers_come_in_the_order_of_the_payloads() -> None:
    arrived = threading.Barrier(4, timeout=10)  # passed only if four requests are under way at once

    def late_first(path: str, payload: Any) -> Answer:
        arrived.wait()
        return 200, payload

    with FakeServer(late_first) as server:
        answers = ServerClient(server.url, concurrency=4).map("/x", [{"n": n} for n in range(16)])
    assert [answer.json()["n"] for answer in answers] == list(range(16))


def test_never_more_requests_at_once_than_allowed() -> None:
    lock, now, most = threading.Lock(), [0], list[int]()

    def count(path: str, payload: Any) -> Answer:
        with lock:
            now[0] += 1
            most.append(now[0])
        threading.Event().wait(0.01)
        with lock:
            now[0] -= 1
        return 200, {}

    with FakeServer(count) as server:
        client = ServerClient(server.url, concurrency=2)
        threads = [threading.Thread(target=client.map, args=("/x", [{}] * 6)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(most) == 18 and max(most) == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_is_away_is_asked_again(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with FakeServer(failing(refusal(status, "not now"), refusal(status, "not now"))) as server:
        server.healthy = status != 500  # a dead engine: its server still answers, with 500, and is not healthy
        with caplog.at_level(logging.WARNING, "kdlib.serving"):
            assert ServerClient(server.url, patience=30).post("/x", {"a": 1}).json() == {"payload": {"a": 1}}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "does not answer (HTTP" in messages[0] and "answers again" in messages[1]


def test_a_server_that_stays_away_is_named_with_what_to_do() -> None:
    server = FakeServer(echo)
    client = ServerClient(server.url, patience=0.5)
    assert client.models()
    server.stop()
    with pytest.raises(ServerAwayError, match=rf"{server.url} for 0 seconds.*no connection.*checkpoint.*same command resumes"):
        client.post("/x", {})
    with pytest.raises(ServerAwayError):
        client.map("/x", [{}] * 20)


def test_a_slow_answer_is_a_time_out() -> None:
    release = threading.Event()

    def slow(path: str, payload: Any) -> Answer:
        release.wait(10)
        return 200, {}

    with FakeServer(slow) as server:
        with pytest.raises(ServerAwayError, match="time-out"):
            ServerClient(server.url, timeout=0.1, patience=0.3).post("/x", {})
        release.set()


def test_a_server_that_was_never_there_is_said_at_once() -> None:
    server = FakeServer(echo)
    server.stop()
    client = ServerClient(server.url, patience=300)
    with pytest.raises(ValueError, match=rf"no vLLM server answers at {server.url} \(no connection\): start it with `do this`"):
        client.models(command="do this")


def test_a_refusal_is_not_repeated_and_keeps_its_first_line() -> None:
    with FakeServer(lambda path, payload: refusal(400, "k is too large\nTraceback")) as server:
        with pytest.raises(ServerRefusedError, match=r"refuses: k is too large$") as error:
            ServerClient(server.url).post("/x", {})
        assert error.value.status == 400 and len(server.seen) == 1


def test_a_request_on_which_a_healthy_server_fails_is_given_up() -> None:
    def picky(path: str, payload: Any) -> Answer:
        if payload["n"] == 1:
            return refusal(500, "index out of range")
        if payload["n"] == 2:
            return refusal(400, "Out of range float values are not JSON compliant")
        return 200, payload

    with FakeServer(picky) as server:
        client = ServerClient(server.url, patience=300)
        found = client.outcomes("/x", [{"n": n} for n in range(4)])
        assert [isinstance(x, ServerFailedError) for x in found] == [False, True, True, False]
        assert "index out of range" in str(found[1]) and "NaN" in str(found[2])
        assert sum(payload["n"] == 1 for _, _, payload in server.seen) == 3
        with pytest.raises(ServerFailedError):
            client.map("/x", [{"n": n} for n in range(4)])


def test_replicas_take_turns_and_a_dead_one_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with FakeServer(echo) as first, FakeServer(echo) as second:
        client = ServerClient([first.url, second.url])
        client.map("/x", [{}] * 10)
        assert len(first.seen) == len(second.seen) == 5
        first.stop()
        with caplog.at_level(logging.WARNING, "kdlib.serving"):
            assert len(client.map("/x", [{}] * 10)) == 10
        assert len(second.seen) == 15 and [one.urls for one in client.each()] == [[second.url]]
        assert "does not answer" in caplog.text
        assert client.models()[0].name == "teacher"


def test_replicas_serve_one_model() -> None:
    with FakeServer(echo, limit=64) as first, FakeServer(echo, limit=32) as second, FakeServer(echo, model="other") as third:
        assert ServerClient([first.url, second.url]).models()[0].max_model_len == 32
        with pytest.raises(ValueError, match="serve different models"):
            ServerClient([first.url, third.url]).models()


def test_the_key_is_sent_and_not_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("KDLIB_API_KEY", "secret-word")
    with caplog.at_level(logging.DEBUG), FakeServer(failing(refusal(503, "busy"), refusal(401, "no"))) as server:
        with pytest.raises(ServerRefusedError) as error:
            ServerClient(server.url, patience=5).post("/x", {})
        assert server.seen[0][1]["Authorization"] == "Bearer secret-word"
    assert "secret-word" not in caplog.text + str(error.value)
