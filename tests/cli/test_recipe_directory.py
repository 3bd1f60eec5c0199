"""The directory of a recipe's run: markers, changed options, what depends on what, one run at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdlib.cli.recipe.directory import RecipeDirectory, dependents
from kdlib.cli.recipe.gains import Score, scores_of
from kdlib.cli.recipe.process import run_logged
from kdlib.cli.recipe.report import summary_table, write_run_report
from kdlib.cli.recipe.stage import Stage, fingerprint, reference


def stage(name: str, command: str = "distill", *, read: tuple[Stage, ...] = (), **options: Any) -> Stage:
    """A stage that reads what others make."""
    options |= {f"input_{one.name}": reference(one.name, "final") for one in read}
    made = fingerprint(command, options, {one.name: one.fingerprint for one in read})
    return Stage(name=name, command=command, options=options, settings=options, fingerprint=made)


FIRST = stage("sft", learning_rate=1.0)
SECOND = stage("on_policy", read=(FIRST,))
APART = stage("other")


@pytest.fixture
def directory(tmp_path: Path) -> RecipeDirectory:
    """One in which all three stages are done."""
    directory = RecipeDirectory(path=tmp_path / "out")
    with directory.locked():
        pass
    for one in (FIRST, SECOND, APART):
        directory.begin(one)
        (directory.path / one.name / "final").mkdir(parents=True)
        directory.finish(one, seconds=2.0)
    return directory


def test_a_finished_stage_is_known_by_its_marker_and_its_directory(directory: RecipeDirectory) -> None:
    held = directory.done(FIRST)
    assert held is not None and held["options"] == {"learning_rate": 1.0} and held["seconds"] == 2.0
    assert held["makes"] == str(directory.path / "sft" / "final")
    assert directory.config("sft").read_text().startswith(f"# kdlib distill --config {directory.config('sft')}\n")
    directory.check([FIRST, SECOND, APART])
    directory.begin(FIRST)  # done again: until it is finished, it is not
    assert directory.done(FIRST) is None


def test_changed_options_are_listed_and_what_was_read_counts(directory: RecipeDirectory) -> None:
    changed = stage("sft", learning_rate=2.0, max_steps=3)
    with pytest.raises(ValueError, match=r"stage sft .*learning_rate: 1.0 -> 2.0; max_steps: null -> 3.*--overwrite sft"):
        directory.check([changed, SECOND])
    directory.delete(["sft"])  # by hand, and made anew: what was made from it is refused
    assert directory.done(FIRST) is None and not (directory.path / "sft").exists()
    with pytest.raises(ValueError, match=r"stage on_policy .*what it reads has changed: sft.*--overwrite on_policy"):
        directory.check([changed, stage("on_policy", read=(changed,))])


def test_what_depends_on_a_stage() -> None:
    third = stage("evaluate", "evaluate", read=(SECOND,))
    assert dependents([FIRST, APART, SECOND, third], ["sft"]) == ["sft", "on_policy", "evaluate"]
    assert dependents([FIRST, APART, SECOND, third], ["other"]) == ["other"]


def test_what_a_stage_reads_has_to_be_there(directory: RecipeDirectory) -> None:
    rows = stage("generate", "generate")
    reader = replace(FIRST, name="reader", options={"dataset_name": reference("generate", "correct.jsonl")})
    with pytest.raises(ValueError, match="stage reader reads stage generate, which is not done: run it, too"):
        directory.check_inputs(reader, done=[])
    with pytest.raises(ValueError, match=r"correct.jsonl, which stage generate did not make"):
        directory.check_inputs(reader, done=["generate"])
    (directory.path / rows.name).mkdir()
    (directory.path / rows.name / "correct.jsonl").touch()
    with pytest.raises(ValueError, match=r"stage reader has nothing to read: .*correct.jsonl has no row; look at the samples"):
        directory.check_inputs(reader, done=["generate"])
    (directory.path / rows.name / "shard-00000.jsonl").write_text("{}\n")
    directory.check_inputs(replace(reader, options={"dataset_name": reference("generate", "shard-*.jsonl")}), done=["generate"])


@pytest.mark.parametrize(
    ("command", "file", "kept"),
    [("transplant", "config.json", False), ("demo", "train.jsonl", False), ("demo", "demo.json", True), ("distill", "x", True)],
)
def test_what_a_command_cannot_continue_is_cleared_away(command: str, file: str, kept: bool, tmp_path: Path) -> None:
    directory, one = RecipeDirectory(path=tmp_path), stage("first", command)
    directory.begin(one)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / file).touch()
    directory.begin(one)
    assert (tmp_path / "first" / file).exists() == kept


def test_two_runs_do_not_share_a_directory(directory: RecipeDirectory) -> None:
    """The stage holds the lock as well, so that one which outlives a killed run keeps the next one away."""
    with directory.locked() as lock:
        held = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.descriptor])
        lock.say(stage="sft", process=held.pid)
    try:
        with pytest.raises(ValueError, match=rf"another kdlib run works in .* \(stage sft, process {held.pid}\)"):
            directory.locked().__enter__()
    finally:
        held.communicate(b"\n")
    with directory.locked():
        pass


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"is not empty and holds no kdlib run \(thesis.txt ...\)"):
        RecipeDirectory(path=tmp_path).locked().__enter__()
    with pytest.raises(ValueError, match="is a file: choose a directory"):
        RecipeDirectory(path=tmp_path / "thesis.txt").locked().__enter__()


def test_what_a_stage_says_is_kept_and_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log, started = tmp_path / "x.log", list[int]()
    log.write_bytes(b"before\n")
    assert run_logged(["--version"], log=log, descriptors=[], started=started.append) == (0, None)
    assert capfd.readouterr().out.startswith("kdlib ") and log.read_text().startswith("before\nkdlib ") and started
    code, _ = run_logged(["distil"], log=log, descriptors=[], started=started.append)
    assert code == 2 and "no command 'distil'" in log.read_text()


GAINED = {"over": "base", "value": 0.2, "low": 0.1, "high": 0.3}
ROW = {
    "task": "sums",
    "metric": "avg@4",
    "n": 40,
    "higher_is_better": True,
    "values": {"base": {"value": 0.3, "low": 0.2, "high": 0.4}, "sft": {"value": 0.5, "low": 0.4, "high": 0.6}},
    "gains": {"sft": GAINED},
}


@pytest.mark.parametrize(
    ("low", "high", "higher", "said"),
    [
        (0.1, 0.3, True, "better"),
        (-0.1, 0.3, True, "no gain shown"),
        (0.0, 0.0, True, "no gain shown"),
        (-0.3, -0.1, True, "worse"),
        (-0.3, -0.1, False, "better"),
        (0.1, 0.3, None, ""),
        (None, None, True, "no gain shown"),
    ],
)
def test_a_gain_is_judged_by_its_interval(low: float | None, high: float | None, higher: bool | None, said: str) -> None:
    gain = {**GAINED, "low": low, "high": high}
    score = Score(
        model="sft", task="sums", metric="avg@4", n=40, value=ROW["values"]["sft"], gain=gain, higher_is_better=higher
    )
    assert score.verdict == said


def test_the_report_has_a_line_for_each_stage_with_its_gain(directory: RecipeDirectory) -> None:
    evaluate = stage("evaluate", "evaluate", read=(FIRST,))
    later = stage("later")
    (directory.path / "evaluate").mkdir()
    (directory.path / "evaluate" / "comparison.json").write_text(json.dumps({"models": ["base", "sft"], "rows": [ROW]}))
    (directory.path / "evaluate" / "comparison.html").touch()
    directory.finish(evaluate, seconds=1234.0)
    (directory.path / "sft" / "metrics.jsonl").write_text('{"step": 7, "loss": 0.25, "grad_norm": 1.0}\n')
    found = {line[0]: line[1:] for line in _cells(directory, [FIRST, evaluate, later])}
    assert found["sft"] == [
        "distill",
        "2",
        "7 steps, loss 0.25",
        "0.500 ± 0.100",
        "+0.200 [+0.100, +0.300] over base",
        "better",
    ]
    assert found["evaluate"][:3] == ["evaluate", "1,234", "2 models scored"] and found["later"][1] == "not yet"
    html = write_run_report(directory, [FIRST, evaluate, later], recipe="stages: []", command="kdlib run x").read_text()
    assert '<a href="evaluate/comparison.html">comparison.html</a>' in html and "+0.200 [+0.100, +0.300] over base" in html
    assert [score.model for score in scores_of(directory.path / "evaluate")] == ["base", "sft"]
    assert scores_of(directory.path / "sft") == []


def _cells(directory: RecipeDirectory, stages: list[Stage]) -> list[list[str]]:
    table = summary_table(directory, stages)
    return [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]  # type: ignore[arg-type]
