"""The benchmarks of diagnostics run: what they measure is for people to read, not for tests to judge."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.test_quick import quick_page


def test_hacking_tabulates_three_ways_of_training(tmp_path: Path) -> None:
    written = quick_page("hacking", tmp_path).read_text()
    assert all(
        f"| 0 | {run} |" in written for run in ("64 fixed answers of the teacher, many epochs", "fresh answers of the student")
    )
    assert "The alarm fired on" in written


def test_audit_tabulates_the_clean_twin_and_poisoned_text(tmp_path: Path) -> None:
    written = quick_page("audit", tmp_path).read_text()
    assert "| 0 | none |" in written and "| 0 | 1.00% |" in written


def test_plan_tabulates_what_was_predicted_and_measured(tmp_path: Path) -> None:
    written = quick_page("plan", tmp_path, runs=False).read_text()
    assert "| full | " in written and "| dLLM | " in written and "| process |" in written
