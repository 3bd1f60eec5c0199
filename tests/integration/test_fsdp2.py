"""FSDP2 on two processes: the student's head is read where it is whole, and gradients equal the unsharded student's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_gradients_of_a_sharded_student_equal_the_plain_ones() -> None:
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.integration.fsdp2_worker"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
