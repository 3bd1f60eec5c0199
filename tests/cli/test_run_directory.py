"""Whether a command may start, resume or must refuse in a directory, and what it writes there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdlib.cli.run_directory import RunDirectory, Stage
from kdlib.trainers.callbacks import STATE_FILE
from tests.cli.conftest import tree

CONFIG: dict[str, Any] = {"model": "m", "max_steps": 4, "overwrite": False, "num_processes": None, "output_dir": "o"}
WORDS = ["distill", "--model", "a b"]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has begun and reached its first checkpoint."""
    directory = RunDirectory(tmp_path / "run")
    directory.begin(CONFIG, words=WORDS, plan={"rows": 3}, stage=Stage.NEW)
    (directory.path / "checkpoint-2").mkdir()
    (directory.path / "checkpoint-2" / STATE_FILE).write_text("{}")
    return directory


def test_a_directory_that_is_missing_or_empty_is_new(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path / "missing").stage(CONFIG, overwrite=False) is Stage.NEW
    assert RunDirectory(tmp_path).stage(CONFIG, overwrite=False) is Stage.NEW
    assert not (tmp_path / "missing").exists()


def test_the_same_run_resumes_and_is_done_when_final_is_there(run: RunDirectory) -> None:
    assert run.stage(CONFIG, overwrite=False) is Stage.RESUME
    run.final.mkdir()
    assert run.stage(CONFIG, overwrite=False) is Stage.DONE
    assert run.stage(CONFIG, overwrite=True) is Stage.NEW


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_with_other_files_is_refused_even_to_overwrite(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds no kdlib run \(thesis.txt ...\): choose another output_dir"):
        RunDirectory(tmp_path).stage(CONFIG, overwrite=overwrite)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: choose a directory"):
        RunDirectory(tmp_path / "file").stage(CONFIG, overwrite=False)


def test_another_run_is_refused_with_what_differs(run: RunDirectory) -> None:
    before = tree(run.path)
    changed = {**CONFIG, "max_steps": 5, "model": {"Name": {"x": 1.0}}}
    with pytest.raises(ValueError, match=r"model: m -> \{Name: \{x: 1.0\}\}; max_steps: 4 -> 5\)") as error:
        run.stage(changed, overwrite=False)
    assert "--overwrite true" in str(error.value) and "\n" not in str(error.value)
    assert tree(run.path) == before


def test_how_a_run_is_carried_out_or_looked_at_may_change(run: RunDirectory) -> None:
    other = {**CONFIG, "num_processes": 8, "overwrite": True, "output_dir": "./o", "report_to": "wandb"}
    assert run.stage(other, overwrite=False) is Stage.RESUME


def test_an_option_that_an_older_version_did_not_have_is_no_change(run: RunDirectory) -> None:
    assert run.stage({**CONFIG, "new_option": 1}, overwrite=False) is Stage.RESUME


def test_a_run_that_never_trained_can_be_typed_again_with_other_options(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.begin(CONFIG, words=WORDS, plan={}, stage=Stage.NEW)
    assert directory.stage({**CONFIG, "max_steps": 5}, overwrite=False) is Stage.NEW
    (directory.path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="max_steps"):
        directory.stage({**CONFIG, "max_steps": 5}, overwrite=False)


def test_beginning_writes_what_describes_the_run(run: RunDirectory) -> None:
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {"model": "m", "max_steps": 4, "output_dir": "o"}
    assert (run.path / "command.txt").read_text() == "kdlib distill --model 'a b'\n"
    assert json.loads((run.path / "plan.json").read_text()) == {"rows": 3}
    assert "torch" in json.loads((run.path / "environment.json").read_text())["packages"]


def test_resuming_adds_the_command_and_keeps_the_rest(run: RunDirectory) -> None:
    run.begin(CONFIG, words=WORDS, plan={}, stage=Stage.RESUME)
    assert len((run.path / "command.txt").read_text().splitlines()) == 2
    assert run.checkpoint == run.path / "checkpoint-2"


def test_starting_anew_deletes_the_run_and_nothing_else(run: RunDirectory) -> None:
    run.final.mkdir()
    (run.path / "notes.txt").write_text("mine")
    run.begin(CONFIG, words=WORDS, plan={}, stage=Stage.NEW)
    assert run.checkpoint is None and not run.done
    assert (run.path / "notes.txt").read_text() == "mine"
    assert len((run.path / "command.txt").read_text().splitlines()) == 1


def test_an_empty_directory_is_removed_and_one_with_files_is_not(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunDirectory(tmp_path / "empty").remove_if_empty()
    run.remove_if_empty()
    assert not (tmp_path / "empty").exists() and run.path.exists()
