"""The benchmark scripts run: what they measure is for people to read, not for tests to judge."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("liger_kernel")
LOSS = Path(__file__).parents[2] / "benchmarks" / "loss.py"


def quick_page(script: str, directory: Path, *words: str, runs: bool = True) -> Path:
    """The page that ``script --quick`` writes; ``runs``: it keeps models, in ``directory``."""
    page = directory / f"{script}.md"
    kept = ["--runs", str(directory / "runs")] if runs else []
    command = [sys.executable, str(LOSS.with_name(f"{script}.py")), "--quick", *words, *kept, "--output", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return page


def test_loss_compares_every_method_for_both_objectives(tmp_path: Path) -> None:
    report = tmp_path / "loss.md"
    command = [sys.executable, str(LOSS), "--quick", "--threads", "1", "--output", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = report.read_text()
    for text in (done.stdout, written):
        assert "ForwardKL, V = 512" in text and "GeneralizedJSD(0.5), V = 512" in text
        for method in ("floor", "kdlib chunked", "naive", "TRL", "Liger", "Liger, same chunk"):
            lines = re.findall(rf"^[|│] {method} +[|│]", text, flags=re.MULTILINE)
            assert len(lines) == 2, f"{method} is missing in:\n{text}"
    assert "| method | seconds |" in written and "seed 0; torch " in written


def test_cache_measures_sizes_and_rates() -> None:
    command = [sys.executable, str(LOSS.with_name("cache.py")), "--tokens", "3000", "--k", "8", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "151936" in done.stdout


def test_demo_tabulates_its_seeds(tmp_path: Path) -> None:
    report = quick_page("demo", tmp_path)
    assert "| seed | teacher | student, fine-tuned | student, distilled | seconds |" in report.read_text()


@pytest.mark.parametrize("script", ["on_policy", "on_policy_demo"])
def test_on_policy_compares_with_others(script: str, tmp_path: Path) -> None:
    report = tmp_path / "table.md"
    runs = ["--runs", str(tmp_path / "runs")] if script == "on_policy_demo" else []
    command = [sys.executable, str(LOSS.with_name(f"{script}.py")), "--quick", *runs, "--output", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {
        "on_policy": ("| kdlib, hf engine |", "| TRL 1.16 |"),
        "on_policy_demo": ("| on-policy, reverse KL |", "| off-policy"),
    }
    assert all(line in report.read_text() for line in expected[script])


needs_shared = pytest.mark.skipif(
    not (LOSS.parents[2] / "shared" / "models" / "gsm8k-lm").is_dir(), reason="no ../shared beside the project"
)


@needs_shared
def test_speculative_checks_tokens_and_the_clock(tmp_path: Path) -> None:
    report = quick_page("speculative", tmp_path, runs=False)
    written = report.read_text()
    assert "| least likely | 4 | 4 of 4 |" in written and "| 6 layers | 4 layers | 2 | 3.00 |" in written


@needs_shared
def test_drafts_compares_methods(tmp_path: Path) -> None:
    report = quick_page("drafts", tmp_path)
    assert "| SFT |" in report.read_text() and "| AdaSPEC, 0.4 |" in report.read_text()


@needs_shared
def test_gsm8k_compares_both_students(tmp_path: Path) -> None:
    report = quick_page("gsm8k", tmp_path, "--seeds", "0")
    assert "| fine-tuning |" in report.read_text() and "| forward KL |" in report.read_text()


def test_sinkhorn_compares_with_plain_torch_and_pot(tmp_path: Path) -> None:
    written = quick_page("sinkhorn", tmp_path, runs=False).read_text()
    for cost in ("L1", "squared Euclidean", "L1, top 64", "sample-wise, top 32"):
        for method in ("kdlib", "plain torch", "POT"):
            assert f"| {cost} | {method} |" in written
    assert "| KL alone |" in written and "error against float64" in written


@needs_shared
def test_sinkhorn_gsm8k_compares_students_from_two_starts(tmp_path: Path) -> None:
    written = quick_page("sinkhorn_gsm8k", tmp_path).read_text()
    assert "| KL + Sinkhorn, batch-wise, T = 2 |" in written and "| KL + Sinkhorn, sample-wise, T = 2 |" in written
    assert "| before |" in written and "| forward KL |" in written


@needs_shared
def test_jacobi_compares_before_and_after(tmp_path: Path) -> None:
    report = quick_page("jacobi", tmp_path)
    lines = dict(re.findall(r"^\| (before training|Jacobi Forcing) \|(.*)\|$", report.read_text(), flags=re.MULTILINE))
    assert lines.keys() == {"before training", "Jacobi Forcing"}
    assert all("8 of 8" in line for line in lines.values()), lines  # Jacobi decoding gives greedy decoding's tokens
    assert "tokens per forward" in report.with_suffix(".svg").read_text()


def test_jacobi_demo_scores_both_ways_of_decoding(tmp_path: Path) -> None:
    report = quick_page("jacobi_demo", tmp_path)
    assert (
        len(re.findall(r"^\| (?:before training|Jacobi Forcing) \|.* 1 of 1 \|", report.read_text(), flags=re.MULTILINE)) == 2
    )


@needs_shared
def test_the_jacobi_example_runs(tmp_path: Path) -> None:
    root, rows = LOSS.parents[1], tmp_path / "rows"
    shared = root / ".." / "shared"
    subprocess.run([sys.executable, "examples/gsm8k_rows.py", str(shared / "data/gsm8k"), str(rows)], cwd=root, check=True)
    words = [str(shared / "models/gsm8k-lm"), str(rows), "--rows", "8", "--steps", "2", "--max_new_tokens", "32"]
    command = [sys.executable, "examples/jacobi.py", *words, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "before tokens per forward" in done.stdout and "after tokens per forward" in done.stdout
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


@needs_shared
def test_trajectories_compares_ways_of_collecting(tmp_path: Path) -> None:
    report = quick_page("trajectories", tmp_path, runs=False)
    assert "| packed |" in report.read_text() and "| CLLM's way |" in report.read_text()


def test_diffusion_demo_compares_teacher_and_students(tmp_path: Path) -> None:
    written = quick_page("diffusion_demo", tmp_path).read_text()
    assert "| teacher |" in written and "| certainty forcing |" in written
    assert "LowConfidence(steps=32)" in written and "torch " in written
    assert (tmp_path / "diffusion_demo.svg").read_text().startswith("<?xml")


@needs_shared
def test_diffusion_gsm8k_compares_teacher_and_student(tmp_path: Path) -> None:
    written = quick_page("diffusion_gsm8k", tmp_path).read_text()
    assert "| certainty forcing |" in written and "bits per byte" in written and "torch " in written


@needs_shared
def test_alignment_compares_with_trl(tmp_path: Path) -> None:
    assert "spans and alignment" in quick_page("alignment", tmp_path, runs=False).read_text()


@needs_shared
def test_cross_tokenizer_gsm8k_compares_methods_and_transfers(tmp_path: Path) -> None:
    written = quick_page("cross_tokenizer_gsm8k", tmp_path).read_text()
    assert "| Unigram | HybridULD |" in written and "gap closed" in written and "torch " in written
