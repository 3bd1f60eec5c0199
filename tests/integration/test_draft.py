"""AdaSPEC's choice of rows is that of the whole step, also over processes, by the real command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.runs import SINGLE, TORCHRUN, completed, material, values


def test_two_processes_choose_the_rows_that_one_does(tmp_path: Path) -> None:
    files = material(tmp_path / "material", rows=24, held_out=1)
    words = [*files.words, "--objective", "SelectiveKL", "--reference", files.teacher, "--evaluate.limit", "0"]
    words += ["--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-3", "--save_strategy", "no"]
    one = completed(tmp_path / "one", [*words, "--per_device_train_batch_size", "8"], launcher=SINGLE, name="draft")
    two = completed(tmp_path / "two", [*words, "--per_device_train_batch_size", "4"], launcher=TORCHRUN, name="draft")
    assert values(one, "scored_tokens") == values(two, "scored_tokens")
    assert values(one, "draft_tokens") == values(two, "draft_tokens")
    for key in ("loss", "grad_norm"):
        assert values(two, key) == pytest.approx(values(one, key), rel=1e-5)
