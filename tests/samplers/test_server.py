"""What is asked of a server, and what is made of its answers; the server is a stand-in (tests/vllm has real ones)."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdlib.samplers import RolloutConfig, ServerSampler
from kdlib.types import SamplingParams

PARAMS = SamplingParams(max_tokens=4, stop_ids=(2,))
Answer = tuple[int, dict[str, Any]]


class StandIn:
    """Answers POSTs with ``answer(path, body)`` and keeps them in ``seen``."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], Answer]) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "student", "root": "student", "max_model_len": 16}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, body))
                self.reply(*answer(self.path, body))

            def reply(self, status: int, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def stand_in() -> Iterator[Callable[..., StandIn]]:
    started: list[StandIn] = []

    def start(answer: Callable[[str, dict[str, Any]], Answer]) -> StandIn:
        started.append(StandIn(answer))
        return started[-1]

    yield start
    for one in started:
        one.http.shutdown()
        one.http.server_close()


def choice(ids: list[int], logp: list[float | None]) -> Answer:
    return 200, {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logp}}]}


def sampler_of(server: StandIn, **options: Any) -> ServerSampler:
    return ServerSampler(server.url, RolloutConfig(engine="server", url=server.url, patience=2.0, timeout=5.0, **options))


def test_a_request_leaves_nothing_to_the_servers_defaults(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in(lambda path, body: choice([body["prompt"][0], 2], [-0.5, -0.25]))
    prompts = [[7, 8], [9] * 14]
    found = sampler_of(server).generate(prompts, PARAMS, seeds=[11, 12])
    assert [completion.ids for completion in found] == [[7, 2], [9, 2]]  # in order, whatever was answered first
    assert found[0].logp == [-0.5, -0.25] and found[0].finish == "stop"
    bodies = {tuple(body["prompt"]): body for _, body in server.seen}
    assert [bodies[tuple(prompt)]["seed"] for prompt in prompts] == [11, 12]
    assert [bodies[tuple(prompt)]["max_tokens"] for prompt in prompts] == [4, 2]  # the context ends at 16
    expected = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "ignore_eos": True}
    assert expected.items() <= bodies[7, 8].items() and bodies[7, 8]["stop_token_ids"] == [2]


def test_bad_rows_are_skipped_and_named(stand_in: Callable[..., StandIn], caplog: pytest.LogCaptureFixture) -> None:
    answers = {
        5: choice([4, 2], [-1.0, -1.0]),
        6: choice([], []),
        7: choice([4, 2], [-1.0, None]),
        8: (500, {"error": {"message": "Out of range float values are not JSON compliant"}}),
    }
    server = stand_in(lambda path, body: answers[body["prompt"][0]])
    with caplog.at_level(logging.WARNING):
        found = sampler_of(server).generate([[5], [6], [7], [8]], PARAMS, seeds=range(4))
    assert [completion.ids for completion in found] == [[4, 2], [], [], []]
    assert [completion.finish for completion in found] == ["stop", "length", "length", "length"]
    for line in ("prompt 1 is skipped: the engine generated nothing", "prompt 2 is skipped: 1 of 2", "prompt 3 is skipped"):
        assert line in caplog.text


def test_log_probs_before_the_filters_are_refused(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in(lambda path, body: choice([4], [-0.7]))
    sampler = sampler_of(server)
    sampler.generate([[5]], PARAMS, seeds=[0])  # without filters there is no difference
    with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
        sampler.generate([[5]], SamplingParams(max_tokens=4, temperature=0.7), seeds=[0])


def test_weights_travel_as_files(stand_in: Callable[..., StandIn], tmp_path: Path) -> None:
    read: list[dict[str, torch.Tensor]] = []

    def answer(path: str, body: dict[str, Any]) -> Answer:
        if path == "/collective_rpc":
            read.append(load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors"))
        return 200, {"success": True}

    server = stand_in(answer)
    sampler = sampler_of(server, transfer="files", transfer_dir=str(tmp_path))
    for value in (1.0, 2.0, 3.0):
        sampler.load(iter([("a.weight", torch.full((2, 3), value).T), ("b.bias", torch.zeros(2, dtype=torch.bfloat16))]))
    assert [tensors["a.weight"][0, 0].item() for tensors in read] == [1.0, 2.0, 3.0]
    assert read[0]["a.weight"].shape == (3, 2) and read[0]["b.bias"].dtype == torch.bfloat16
    assert [path for path, _ in server.seen] == ["/collective_rpc", "/reset_prefix_cache"] * 3
    assert len(list(tmp_path.iterdir())) == 1


def test_a_server_without_development_endpoints_is_named(stand_in: Callable[..., StandIn], tmp_path: Path) -> None:
    server = stand_in(lambda path, body: (404, {"detail": "Not Found"}))
    sampler = sampler_of(server, transfer="files", transfer_dir=str(tmp_path))
    with pytest.raises(ValueError, match="restart it with VLLM_SERVER_DEV_MODE=1"):
        sampler.load(iter([("a", torch.zeros(1))]))


def test_cached_prefixes_of_old_weights_are_an_error(stand_in: Callable[..., StandIn], tmp_path: Path) -> None:
    server = stand_in(lambda path, body: (200, {"success": path != "/reset_prefix_cache"}))
    sampler = sampler_of(server, transfer="files", transfer_dir=str(tmp_path))
    with pytest.raises(RuntimeError, match="cached prefixes of the old weights"):
        sampler.load(iter([("a", torch.zeros(1))]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nccl_needs_cuda(stand_in: Callable[..., StandIn]) -> None:
    sampler = sampler_of(stand_in(lambda path, body: choice([4], [-0.5])))
    with pytest.raises(ValueError, match=r"nccl needs a CUDA device here: set rollout\.transfer files"):
        sampler.load(iter([]))


def test_an_unreachable_server_is_named_with_the_line_that_starts_one() -> None:
    config = RolloutConfig(engine="server", url="http://127.0.0.1:9/v1")
    with pytest.raises(
        ValueError, match=r"no vLLM server answers at http://127\.0\.0\.1:9 .*VLLM_SERVER_DEV_MODE=1 vllm serve"
    ):
        ServerSampler("http://127.0.0.1:9/v1", config)
