"""kdlib trajectories jacobi with greedy outputs from a real vLLM engine; their states always come from transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdlib.cli.main import main
from kdlib.data.trajectories import TrajectoryIndex, read_trajectories

pytestmark = pytest.mark.vllm


def written(output_dir: Path, **options: Any) -> list[dict[str, Any]]:
    options = {"max_completion_length": 12, "block_size": 4, "rows_per_shard": 4, "max_repeat": 20} | options
    options |= {"output_dir": output_dir, "dtype": "float32", "device": "cpu"}
    assert main(["trajectories", "jacobi", *(w for name, value in options.items() for w in (f"--{name}", str(value)))]) == 0
    return [dict(row) for row in read_trajectories(output_dir)]


def test_outputs_of_an_engine_in_this_process_have_the_same_trajectories(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is {i} plus two?"}) + "\n" for i in range(6)))
    asked = {"model": tiny_checkpoint, "dataset_name": rows}
    engine = {"rollout.engine": "vllm", "rollout.max_model_len": 128, "rollout.enforce_eager": "true"}
    ours = written(tmp_path / "hf", **asked)
    assert written(tmp_path / "vllm", **asked, **engine) == ours and len(ours) == 6
    index = TrajectoryIndex.load(tmp_path / "vllm")
    assert index.settings["rollout.engine"] == "vllm" and not index.summary["dropped_rows"]
