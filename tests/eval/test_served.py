"""Measuring a server over HTTP: streamed tokens, times, counters, failures, other traffic, and what is said about them.

The server here answers as vLLM does, from a script; tests/vllm/test_served.py has a real one.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kdlib.cli.evaluation.served import run
from kdlib.eval.served import ServedSettings, compared, measure_served
from kdlib.eval.served_load import Reply, load
from kdlib.eval.served_prompts import served_prompts
from kdlib.eval.served_report import remarks, write_served_report
from kdlib.serving.metrics import MeasuredServer

GAMMA = 3


@dataclass
class Scripted:
    """An HTTP server whose completions give one token, then ``rounds`` (accepted drafted tokens each) until max_tokens."""

    rounds: tuple[int, ...] = (3, 0, 1)
    speculates: bool = True
    template: bool = True
    fails: str = ""  # prompts that hold this word are declined
    breaks: str = ""  # those that hold this one break off after the first token
    others: int = 0  # tokens generated for others with every request
    restarts_after: int | None = None  # requests
    late: float = 0.0  # seconds between a last token and its being counted
    model: str = "target"
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    most: int = 0

    def __enter__(self) -> Scripted:
        self.counts, self.created, self.lock, self.now = (
            {"generated": 0, "drafts": 0, "accepted": [0] * GAMMA},
            1.0,
            threading.Lock(),
            0,
        )
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def metrics(self) -> str:
        c = self.counts
        lines = [
            f'vllm:generation_tokens_total{{engine="0"}} {c["generated"]}',
            f"vllm:generation_tokens_created {self.created}",
        ]
        if self.speculates:
            accepted = sum(c["accepted"])
            lines += [f"vllm:spec_decode_num_drafts_total {c['drafts']}"]
            lines += [f"vllm:spec_decode_num_draft_tokens_total {c['drafts'] * GAMMA}"]
            lines += [f"vllm:spec_decode_num_accepted_tokens_total {accepted}"]
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines += [f'{name}{{position="{i}"}} {n}' for i, n in enumerate(c["accepted"])]
        return "\n".join(lines) + "\n"

    def steps(self, max_tokens: int) -> list[int]:
        """Tokens so far after each chunk; counted when they are sent."""
        sizes, script = [1], 0
        while self.speculates and sum(sizes) < max_tokens:
            sizes.append(1 + self.rounds[script % len(self.rounds)])
            script += 1
        sizes += [1] * (max_tokens - sum(sizes))
        return [min(sum(sizes[: i + 1]), max_tokens) for i in range(len(sizes))]

    def count(self, max_tokens: int) -> None:
        with self.lock:
            self.counts["generated"] += max_tokens + self.others
            if self.speculates:
                rounds = len(self.steps(max_tokens)) - 1
                self.counts["drafts"] += rounds
                for script in range(rounds):
                    for position in range(self.rounds[script % len(self.rounds)]):
                        self.counts["accepted"][position] += 1
            if self.restarts_after is not None and len(self.seen) >= self.restarts_after:
                self.counts, self.created = {"generated": 10**6, "drafts": 10**6, "accepted": [10**6] * GAMMA}, 2.0


def _handler(server: Scripted) -> type[BaseHTTPRequestHandler]:
    class Requests(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = {"data": [{"id": "name", "root": server.model, "max_model_len": 64}]}
            self._whole(200, server.metrics() if self.path == "/metrics" else json.dumps(models))

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.seen.append((self.path, payload))
                server.now += 1
                server.most = max(server.most, server.now)
            try:
                self._answer(payload)
            finally:
                with server.lock:
                    server.now -= 1

        def _answer(self, payload: dict[str, Any]) -> None:
            text = payload.get("prompt") or payload["messages"][-1]["content"]
            untaken = "chat" in self.path and not server.template
            if untaken or (server.fails and server.fails in text):
                return self._whole(400, json.dumps({"error": {"message": "declined", "code": 400}}))
            if not payload.get("stream"):
                return self._whole(200, "{}")
            assert payload["stream_options"]["continuous_usage_stats"]
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            for tokens in server.steps(payload["max_tokens"]):
                self._event({"choices": [{}], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})
                time.sleep(0.005)
                if server.breaks and server.breaks in text:
                    return self._event({"error": {"message": "engine died", "code": 500}})
            self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": payload["max_tokens"]}})
            if server.late:
                threading.Timer(server.late, server.count, [payload["max_tokens"]]).start()
            else:
                server.count(payload["max_tokens"])
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        def _event(self, content: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
            self.wfile.flush()

        def _whole(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Requests


def settings(**changes: Any) -> ServedSettings:
    return ServedSettings(**{"concurrency": [1, 3], "max_tokens": 11, **changes})


PROMPTS = [f"prompt {i}" for i in range(6)]


def test_numbers_are_those_of_the_server_and_of_its_stream() -> None:
    """An answer of 11 tokens: 1, then rounds of 4, 1, 2, 4 (the last cut to 3): 4 rounds, 3 + 0 + 1 + 3 accepted."""
    with Scripted(late=0.2) as server:
        found = measure_served(server.url, PROMPTS, settings=settings())
    assert found["speculates"] and found["num_speculative_tokens"] == GAMMA and found["model"] == "target"
    for run_, concurrency in zip(found["runs"], (1, 3), strict=True):
        assert run_["concurrency"] == concurrency and run_["failed"] == 0 and run_["requests"] == 6
        assert run_["completion_tokens"] == run_["server_generation_tokens"] == 66 and run_["unexplained_tokens"] == 0
        assert run_["prompt_tokens"] == 30
        assert (run_["num_drafts"], run_["num_draft_tokens"], run_["num_accepted_tokens"]) == (24, 72, 42)
        assert run_["acceptance_length"] == pytest.approx(1 + 42 / 24) and run_["acceptance_rate"] == pytest.approx(42 / 72)
        assert run_["acceptance_rate_per_position"] == pytest.approx([3 / 4, 2 / 4, 2 / 4])
        step, first = run_["time_per_output_token_ms"], run_["time_to_first_token_ms"]
        assert 0 < step["p50"] <= step["p99"] and 0 < first["p50"] <= first["p99"]
        assert run_["tokens_per_second"] == pytest.approx(66 / run_["seconds"])
    assert remarks(found) == []


def test_as_many_requests_at_a_time_as_asked_for() -> None:
    with Scripted() as server:
        client = MeasuredServer(server.url, concurrency=4)
        request = ("/v1/completions", {"prompt": "x", "max_tokens": 5})
        for concurrency in (1, 4):
            server.most = 0
            load(client, [request] * 8, concurrency=concurrency)
            assert server.most == concurrency


def test_time_per_output_token_leaves_the_first_chunk_out() -> None:
    reply = Reply(sent=0.0, first=1.0, first_tokens=2, last=3.0, tokens=12)
    assert reply.time_per_output_token == pytest.approx(0.2)
    assert Reply(sent=0.0, first=1.0, first_tokens=1, last=1.0, tokens=1).time_per_output_token is None


def test_requests_that_fail_are_counted_and_left_out_of_speed() -> None:
    prompts = [*PROMPTS, "a bad one", "a worse one"]
    with Scripted(fails="bad", breaks="worse") as server:
        found = measure_served(server.url, prompts, settings=settings(concurrency=[2]))
    run_ = found["runs"][0]
    assert run_["requests"] == 8 and run_["failed"] == 2 and run_["failures"] == {"declined": 1, "engine died": 1}
    assert run_["completion_tokens"] == 66
    assert any("2 of 8 requests failed" in line for line in remarks(found))


def test_a_server_that_declines_everything_is_an_error() -> None:
    with Scripted(fails="prompt") as server, pytest.raises(ValueError, match="answers none of 6 requests: declined"):
        measure_served(server.url, PROMPTS, settings=settings())


def test_other_traffic_is_noticed() -> None:
    with Scripted(others=5) as server:
        found = measure_served(server.url, PROMPTS, settings=settings(concurrency=[2]))
    assert found["runs"][0]["unexplained_tokens"] == 30
    assert any("generated 30 tokens for requests that were not ours" in line for line in remarks(found))


def test_a_restart_in_between_is_an_error() -> None:
    with Scripted(restarts_after=9) as server, pytest.raises(ValueError, match="counters began again"):
        measure_served(server.url, PROMPTS, settings=settings(concurrency=[1]))


def test_a_server_without_speculation_is_measured_and_says_so() -> None:
    with Scripted(speculates=False) as server:
        found = measure_served(server.url, PROMPTS, settings=settings())
    assert not found["speculates"] and found["num_speculative_tokens"] is None
    assert found["runs"][0]["acceptance_length"] is None and found["runs"][0]["tokens_per_second"] > 0
    assert "does not speculate" in remarks(found)[0]


def test_both_servers_are_asked_the_same() -> None:
    with Scripted() as server, Scripted(speculates=False) as baseline:
        found = measure_served(server.url, PROMPTS, settings=settings(), baseline_server=baseline.url)

        def asked(one: Scripted) -> list[str]:
            return sorted(json.dumps(request, sort_keys=True) for request in one.seen)

        assert asked(server) == asked(baseline)
    assert found["baseline"]["runs"][1]["completion_tokens"] == 66 and not found["baseline"]["speculates"]
    for index, ratio in enumerate(found["speedup"]):
        ours, theirs = found["runs"][index], found["baseline"]["runs"][index]
        assert ratio["tokens_per_second"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])


@pytest.mark.parametrize(
    ("speeds", "stops", "said"),
    [
        ((2.0, 1.5, 0.9), 32, "stops paying at concurrency 32 (0.90x at 32"),
        ((2.0, 1.5, 1.0), None, "pays at every concurrency"),
        ((0.5, 0.4, 0.3), 1, "pays at no concurrency measured (0.50x at 1, 0.40x at 8, 0.30x at 32"),
    ],
)
def test_where_speculation_stops_paying(speeds: tuple[float, ...], stops: int | None, said: str) -> None:
    def runs(values: tuple[float, ...]) -> list[dict[str, Any]]:
        step = {"time_per_output_token_ms": {"p50": 10.0, "p99": 12.0}}
        return [{"concurrency": c, "tokens_per_second": v, **step} for c, v in zip((1, 8, 32), values, strict=True)]

    found = compared(runs(tuple(100 * speed for speed in speeds)), runs((100.0, 100.0, 100.0)))
    assert found["stops_paying_at"] == stops
    facts = {"server": "here", "model": "m", "speculates": True}
    nothing = {"failed": 0, "unexplained_tokens": 0, "requests": 99, "num_drafts": 9, "num_accepted_tokens": 0}
    quiet = [{**run_, **nothing, "server_generation_tokens": 99} for run_ in runs(speeds)]
    whole = {**facts, "runs": quiet, "baseline": {**facts, "speculates": False, "runs": quiet}, **found}
    assert said in remarks(whole)[0] and len(remarks(whole)) == 1


def test_rounds_without_a_draft_are_said() -> None:
    with Scripted() as server:
        found = measure_served(server.url, PROMPTS, settings=settings(concurrency=[1]))
    found["runs"][0] |= {"num_drafts": 12, "num_accepted_tokens": 18}
    assert any("rounds with a draft gave 50% of the tokens" in line for line in remarks(found))


def test_texts_go_where_the_server_can_take_them() -> None:
    for template, asked, path in (
        (True, None, "/v1/chat/completions"),
        (False, None, "/v1/completions"),
        (True, False, "/v1/completions"),
    ):
        with Scripted(template=template) as server:
            measure_served(server.url, PROMPTS, settings=settings(concurrency=[1], apply_chat_template=asked))
            assert {seen for seen, payload in server.seen if payload.get("stream")} == {path}


def test_prompts_are_read_from_every_kind_of_row(tmp_path: Path) -> None:
    def read(name: str, row: dict[str, Any], **options: Any) -> list[Any]:
        (tmp_path / name).write_text((json.dumps(row) + "\n") * 3)
        return served_prompts(str(tmp_path / name), **options)

    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert read("a.jsonl", {"prompt": "text"}) == ["text"] * 3
    assert read("b.jsonl", {"question": "q", "answer": "a"}, limit=2) == ["q"] * 2
    assert read("c.jsonl", {"turns": ["first", "second"]}) == ["first"] * 3
    assert read("d.jsonl", {"messages": [user, answer]}) == [[user]] * 3
    assert read("e.jsonl", {"prompt": [user]}) == [[user]] * 3
    with pytest.raises(ValueError, match="rename one to `prompt`"):
        read("f.jsonl", {"other": "x"})
    with pytest.raises(ValueError, match="row 1: an empty prompt"):
        read("g.jsonl", {"prompt": " "})
    with pytest.raises(ValueError, match="starts with its answer"):
        read("h.jsonl", {"messages": [answer]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": []}, "concurrency"),
        ({"concurrency": [0, 2]}, "concurrency"),
        ({"max_tokens": 1}, "max_tokens is at least 2"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_nothing_at_the_address_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"no vLLM server answers at http://127\.0\.0\.1:9"):
        measure_served("http://127.0.0.1:9/v1", PROMPTS, settings=settings())


def test_the_command_prints_a_table_and_writes_json_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    with Scripted() as server, Scripted(speculates=False, model="another") as baseline:
        words = ["--server", server.url, "--baseline-server", baseline.url, "--prompts", str(tmp_path / "p.jsonl")]
        words += ["--concurrency", "1,2", "--max_tokens", "11", "--output_path", str(tmp_path / "out")]
        assert run(words) == 0
    shown = capsys.readouterr().out
    assert "acceptance_length" in shown and "2.75" in shown and "serve different models: target and another" in shown
    found = json.loads((tmp_path / "out" / "served_acceptance.json").read_text())
    assert [run_["acceptance_length"] for run_ in found["runs"]] == [2.75, 2.75]
    page = (tmp_path / "out" / "served_acceptance.html").read_text()
    assert page.count("<svg") == 3 and "2.75" in page and "<script" not in page


def test_the_page_needs_no_baseline_and_no_speculation(tmp_path: Path) -> None:
    with Scripted(speculates=False) as server:
        found = measure_served(server.url, PROMPTS, settings=settings())
    page = write_served_report(tmp_path / "page.html", found).read_text()
    assert page.count("<svg") == 2 and "does not speculate" in page
