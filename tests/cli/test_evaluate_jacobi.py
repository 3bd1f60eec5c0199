"""kdlib evaluate jacobi on checkpoints: what it prints and writes, and what it refuses in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdlib.cli.evaluate import run as evaluate
from kdlib.cli.evaluation.jacobi import run
from kdlib.eval import jacobi_measurement
from tests.cli.conftest import conversation, write_rows
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, base/, stranger/ (another tokenizer), prompts.jsonl, rows.jsonl for bits per byte, tasks/short.yaml."""
    root = tmp_path_factory.mktemp("models")
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer(vocab_size=340)
    for name, words, seed in (("model", tokenizer, 0), ("base", tokenizer, 1), ("stranger", other, 2)):
        tiny_llama(len(words), seed=seed).save_pretrained(root / name)
        words.save_pretrained(root / name)
    write_rows(root / "prompts.jsonl", [{"question": f"What is {i} plus two?"} for i in range(6)])
    write_rows(root / "rows.jsonl", [conversation(f"What is {i} plus two?", f"It is {i + 2}.") for i in range(4)])
    (root / "tasks").mkdir()
    task = {
        "task": "short",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "prompts.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "two",
        "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (root / "tasks" / "short.yaml").write_text(yaml.safe_dump(task))
    return root


def words(models: Path, **options: Any) -> list[str]:
    given = {
        "model": models / "model",
        "prompts": models / "prompts.jsonl",
        "block_size": 4,
        "max_new_tokens": 8,
        "timing": "false",
        **options,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")


def test_before_and_after_with_tasks_and_text(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    asked = words(
        models,
        base=models / "base",
        limit=5,
        timing="true",
        timing_prompts=1,
        tasks="short",
        task_limit=3,
        include_path=models / "tasks",
        dataset_name=models / "rows.jsonl",
        output_path=tmp_path / "out",
    )
    assert evaluate(["jacobi", *asked]) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "jacobi.json").read_text())
    before = content["base"]
    assert content["prompts"] == before["prompts"] == 5 and content["passed"] and before["passed"]
    assert content["model"].endswith("model") and before["model"].endswith("base")
    change = content["tokens_per_forward"]["value"] / before["tokens_per_forward"]["value"] - 1
    assert content["change_of_tokens_per_forward"]["value"] == pytest.approx(change)
    assert f"trained against base: tokens per forward {change:+.1%}" in out
    for side in (content, before):
        greedy, decoded = (side["tasks"][way] for way in ("greedy", "jacobi"))
        assert greedy["tokens_per_forward"] == 1.0 <= decoded["tokens_per_forward"] <= 3
        assert greedy["scores"] == decoded["scores"] and greedy["scores"][0]["n"] == 3
        assert side["bits_per_byte"]["rows"] == 4 and side["timing"]["prompts"] == 1
    change = content["bits_per_byte"]["bits_per_byte"] / before["bits_per_byte"]["bits_per_byte"] - 1
    assert f"bits per byte: {change:+.2%}" in out
    for said in ("trained, greedy", "trained, Jacobi", "base, Jacobi", "5 of 5 prompts identical", "this machine"):
        assert said in out, said
    page = (tmp_path / "out" / "jacobi.html").read_text()
    assert page.count("<svg") == 5  # by block, iterations of both, bars of the task and of bits per byte
    assert not re.search(r"<(script|link|img)|(src|href)=.(?!#)", page)
    for text in ("Tokens per forward by block", "Iterations per block, base", "Accuracy and bits per byte", "What is counted"):
        assert text in page, text


def test_one_model_alone(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words(models, limit=3, output_path=tmp_path)) == 0
    content = json.loads((tmp_path / "jacobi.json").read_text())
    assert not {"base", "tasks", "bits_per_byte", "change_of_tokens_per_forward"} & content.keys()
    assert content["timing"] is None and content["block_size"] == 4
    out = capsys.readouterr().out
    assert "│ tokens per forward" in out and "against" not in out.replace("against greedy", "")
    assert "Accuracy" not in (tmp_path / "jacobi.html").read_text()


def test_early_exit_is_marked_and_no_failure(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words(models, limit=3, max_iterations=1)) == 0
    assert "not lossless: " in capsys.readouterr().out


def test_tokens_that_are_not_those_of_greedy_decoding_fail(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against other tokens than the model's own the check fails, and the command says so."""
    monkeypatch.setattr(jacobi_measurement, "greedy_outputs", lambda request, prompts: [[3] * 8 for _ in prompts])
    assert run(words(models, limit=2)) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": 9}, "block_size 9: choose 1 to max_new_tokens, which is 8"),
        ({"block_size": 0}, "block_size 0"),
        ({"max_new_tokens": 512}, "leaves no room for a prompt"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"init": "lucky"}, "init: expected prompt|init.*lucky"),
        ({"model": "/no/model"}, "/no/model"),
        ({"blok_size": 3}, "unknown option blok_size"),
        ({"max_iterations": 2, "blocks": 2}, "max_iterations is for single blocks"),
    ],
)
def test_a_mistake_is_one_line(models: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        run(words(models, **options))
    assert "\n" not in str(error.value).strip()


def test_a_base_with_another_tokenizer_is_refused(models: Path) -> None:
    with pytest.raises(ValueError, match="model and base have different tokenizers"):
        run(words(models, base=models / "stranger"))


def test_options_and_tasks_are_checked_before_a_model_is_loaded(models: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="block_size 99: choose 1"):
        run(words(models, model="/no/model", block_size=99))
    with pytest.raises(ValueError, match="is not a directory"):
        run(words(models, model="/no/model", tasks="short", include_path=models / "nothing"))


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for said in ("--model", "--base", "--block_size", "--max_iterations", "--tasks", "--dataset_name", "Exit code 1"):
        assert said in out, said
