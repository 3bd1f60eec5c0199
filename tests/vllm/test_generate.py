"""kdlib generate with real vLLM engines: in this process, and behind a URL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kdlib.cli.main import main

pytestmark = pytest.mark.vllm

Serve = Callable[..., Any]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {i} plus two?", "answer": str(i + 2)}) + "\n" for i in range(6)))
    return path


def generated(output_dir: Path, **options: Any) -> list[dict[str, Any]]:
    """The traces of one call, greedy unless ``options`` say otherwise."""
    options = {"num_generations": 1, "rollout.temperature": 0, "max_completion_length": 12, "rows_per_shard": 4} | options
    options |= {"output_dir": output_dir, "dtype": "float32", "verify": "exact_number"}
    assert main(["generate", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]) == 0
    return [json.loads(line) for path in sorted(output_dir.glob("shard-*.jsonl")) for line in path.read_text().splitlines()]


def same_up_to_rounding(traces: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    names = ("prompt_id", "generation", "completion", "input_ids", "labels", "finish", "correct", "tokens")
    assert [[trace[name] for name in names] for trace in traces] == [[trace[name] for name in names] for trace in expected]
    assert [trace["logp_sum"] for trace in traces] == pytest.approx([trace["logp_sum"] for trace in expected], abs=1e-3)


def test_an_engine_in_this_process(tiny_checkpoint: Path, questions: Path, tmp_path: Path) -> None:
    """Greedy traces are those of Hugging Face, and sampled ones hold the ids that the engine drew."""
    asked = {"model": tiny_checkpoint, "dataset_name": questions}
    engine = {"rollout.engine": "vllm", "rollout.max_model_len": 128, "rollout.enforce_eager": "true"}
    greedy = generated(tmp_path / "vllm", **asked, **engine)
    same_up_to_rounding(greedy, generated(tmp_path / "hf", **asked, device="cpu"))

    drawn = generated(tmp_path / "drawn", **asked, **engine, **{"rollout.temperature": 1.0, "num_generations": 3})
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert sum(trace["count"] for trace in drawn) == 18
    for trace in drawn:
        ids = trace["input_ids"][-trace["tokens"] :]
        assert (
            trace["labels"][-trace["tokens"] :] == ids
            and tokenizer.decode(ids, skip_special_tokens=True) == trace["completion"]
        )
        assert (ids[-1] == tokenizer.eos_token_id) == (trace["finish"] == "stop") and trace["logp_sum"] < 0


def test_a_server_behind_a_url(tiny_checkpoint: Path, questions: Path, serve: Serve, tmp_path: Path) -> None:
    """The URL is all it takes: model and tokenizer are those that the server names."""
    server = serve(tiny_checkpoint, "--dtype", "float32", "--enforce-eager", "--max-model-len", "128")
    served = generated(tmp_path / "served", model=f"{server.url}/v1", dataset_name=questions)
    same_up_to_rounding(served, generated(tmp_path / "hf", model=tiny_checkpoint, dataset_name=questions, device="cpu"))
