"""kdlib evaluate with real vLLM engines, in processes of their own and behind a URL: scores are those of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdlib.cli.main import main
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.vllm

Serve = Callable[..., Any]
ENGINE = {"backend": "vllm", "max_model_len": 128, "enforce_eager": "true"}
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: [two, four, nine]\ndoc_to_target: 1\n"
    "metric_list: [{metric: acc}]\n",
    "written": "output_type: generate_until\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: [zzz], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with rows.jsonl, a verifier and two lm-eval tasks over the rows."""
    root = tmp_path_factory.mktemp("problems")
    rows = [{"question": f"What is {i} plus two?", "answer": str(i + 2)} for i in range(6)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "own.py").write_text("def even(completion, row):\n    return len(completion) % 2 == 0\n")
    for name, rest in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {root / 'rows.jsonl'}}}}}\ntest_split: test\n"
        (root / f"{name}.yaml").write_text(f"task: {name}_task\n{data}doc_to_text: '{{{{question}}}}'\n{rest}")
    return root


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_checkpoint, with other weights."""
    directory = tmp_path_factory.mktemp("checkpoint") / "other"
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer), hidden=128, tie_word_embeddings=False, seed=3).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def scores(problems: Path, output_path: Path, **options: Any) -> dict[str, Any]:
    """comparison.json of one call: greedy answers to the problems, and both tasks."""
    given = {"problems": problems / "rows.jsonl", "verify": f"{problems / 'own.py'}:even", "max_completion_length": 12}
    given |= {"tasks": "choice_task,written_task", "include_path": problems, "dtype": "float32", "output_path": output_path}
    words = [word for name, value in {**given, **options}.items() for word in (f"--{name}", str(value))]
    assert main(["evaluate", *words]) == 0
    found: dict[str, Any] = json.loads((output_path / "comparison.json").read_text())
    return found


def completions(output_path: Path, name: str) -> list[Any]:
    lines = (output_path / name / "problems" / "shard-00000.jsonl").read_text().splitlines()
    return [json.loads(line)["input_ids"] for line in lines]


def test_engines_of_their_own_processes(tiny_checkpoint: Path, other_checkpoint: Path, problems: Path, tmp_path: Path) -> None:
    """Two models and two kinds of scores are four engines, one at a time."""
    models = {"model": tiny_checkpoint, "compare.base": other_checkpoint}
    engine = scores(problems, tmp_path / "vllm", **models, **ENGINE)
    ours = scores(problems, tmp_path / "hf", **models, device="cpu")
    assert engine == ours and engine["models"] == ["base", "student"]
    assert {row["task"] for row in engine["rows"]} == {"rows", "choice_task", "written_task"}
    for name in ("base", "student"):
        assert completions(tmp_path / "vllm", name) == completions(tmp_path / "hf", name)
    assert completions(tmp_path / "vllm", "base") != completions(tmp_path / "vllm", "student")

    # a finished evaluation starts no engine, which a context of one token could not have
    assert scores(problems, tmp_path / "vllm", **models, **{**ENGINE, "max_model_len": 1}) == engine


def test_what_fails_in_an_engines_process_is_one_line(
    tiny_checkpoint: Path, problems: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"model": tiny_checkpoint, "problems": problems / "rows.jsonl", "verify": "exact_number", **ENGINE}
    given |= {"output_path": tmp_path / "out", "max_model_len": 2}
    assert main(["evaluate", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]) == 2
    assert "no row has a usable prompt" in capfd.readouterr().err.splitlines()[-1]


def test_a_server_behind_a_url(tiny_checkpoint: Path, problems: Path, serve: Serve, tmp_path: Path) -> None:
    """The URL is all it takes, beside a model in this process."""
    server = serve(tiny_checkpoint, "--dtype", "float32", "--enforce-eager", "--max-model-len", "128")
    found = scores(problems, tmp_path / "out", **{"model": tiny_checkpoint, "compare.served": f"{server.url}/v1"})
    for row in found["rows"]:
        assert row["values"]["served"] == row["values"]["student"], row
        assert row["gains"]["student"]["value"] == 0
    assert completions(tmp_path / "out", "served") == completions(tmp_path / "out", "student")
