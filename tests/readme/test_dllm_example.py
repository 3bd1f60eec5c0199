"""examples/dllm.py on the demo's rows and a model without training: it runs from end to end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoConfig

from kdlib.cli.demo_data import write_data
from kdlib.decoding import DiffusionDecoder
from kdlib.diffusion import spec_of

ROOT = Path(__file__).parents[2]


def test_the_example_runs(tmp_path: Path) -> None:
    write_data(tmp_path / "demo", seed=0, quick=True)
    words = [str(tmp_path / "demo" / name) for name in ("blank-teacher", "train.jsonl", "test.jsonl")]
    words += ["--rows", "4", "--steps", "2", "2", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "examples/dllm.py", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.findall(
        r"^(teacher|student), (.+): accuracy [01]\.\d{3}, (\d+\.\d+) tokens per forward$", done.stdout, re.MULTILINE
    )
    assert [(who, how) for who, how, _ in said] == [
        (who, how) for how in ("one token a pass", "threshold 0.9") for who in ("teacher", "student")
    ]
    assert all(0 <= float(speed) <= DiffusionDecoder().block_length for *_, speed in said)
    config = AutoConfig.from_pretrained(tmp_path / "run" / "student" / "final")
    assert spec_of(config).shift and not config.is_causal
