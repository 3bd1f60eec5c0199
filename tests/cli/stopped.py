"""kdlib trajectories in a process of its own that a signal ends between two shards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

# Ends the process, as the system would, once the first shard is on disk.
STOPS = """
import os, sys
from kdlib.data.trajectories.table import RowWriter
put = RowWriter.put

def stopping(self, shard, rows):
    if shard == 1:
        os.kill(os.getpid(), int(os.environ["KDLIB_TEST_SIGNAL"]))
    return put(self, shard, rows)

RowWriter.put = stopping
from kdlib.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def stopped_trajectories(kind: str, options: Mapping[str, Any], *, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """``kdlib trajectories KIND``, sent ``number`` before its second shard is written."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "KDLIB_TEST_SIGNAL": str(int(number))}
    call = [sys.executable, "-c", STOPS, "trajectories", kind, *words]
    return subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
