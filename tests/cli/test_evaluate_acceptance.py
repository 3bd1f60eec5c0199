"""kdlib evaluate acceptance on checkpoints: what it prints and writes, and what it refuses in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kdlib.cli.evaluation.acceptance import run
from kdlib.eval import losslessness
from tests.cli.conftest import write_rows
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/, draft/ (the target disturbed), baseline/ (another model), stranger/ (another tokenizer), rows.jsonl."""
    root = tmp_path_factory.mktemp("models")
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer(vocab_size=340)
    target = tiny_llama(len(tokenizer), seed=0)
    target.save_pretrained(root / "target")
    with torch.no_grad():
        for weight in target.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    target.save_pretrained(root / "draft")
    tiny_llama(len(tokenizer), seed=1).save_pretrained(root / "baseline")
    for name in ("target", "draft", "baseline"):
        tokenizer.save_pretrained(root / name)
    other.save_pretrained(root / "stranger")
    tiny_llama(len(other), seed=2).save_pretrained(root / "stranger")
    rows = [{"question": f"What is {i} plus two?", "domain": "odd" if i % 2 else "even"} for i in range(6)]
    write_rows(root / "rows.jsonl", rows)
    return root


def words(models: Path, *more: str, **options: Any) -> list[str]:
    given = {"target": models / "target", "draft": models / "draft", "prompts": models / "rows.jsonl"} | options
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")


def test_sampling_with_a_baseline(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(
        words(
            models,
            baseline_draft=models / "baseline",
            num_speculative_tokens="1,3",
            temperature=0.8,
            top_p=0.95,
            max_new_tokens=8,
            limit=5,
            timing_prompts=1,
            output_path=tmp_path / "out",
        )
    )
    out = capsys.readouterr().out
    assert code == 0
    assert "acceptance_length" in out and "draft against baseline" in out and "z-test" in out and "FAILED" not in out
    content = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert content["prompts"] == 5 and content["temperature"] == 0.8 and content["top_p"] == 0.95
    assert [(run["draft_sample_method"], run["num_speculative_tokens"]) for run in content["empirical"]] == [
        ("probabilistic", 1),
        ("probabilistic", 3),
        ("greedy", 1),
        ("greedy", 3),
    ]
    for one in content["empirical"]:
        assert len(one["acceptance_rate_per_position"]) == one["num_speculative_tokens"]
        assert one["acceptance_length"]["value"] == pytest.approx(1 + one["num_accepted_tokens"] / one["num_drafts"])
        assert one["acceptance_rate"]["value"] == pytest.approx(one["num_accepted_tokens"] / one["num_draft_tokens"])
    better, worse = (side["expected"]["probabilistic"] for side in (content, content["baseline"]))
    assert better["acceptance_rate"]["low"] > worse["acceptance_rate"]["high"]
    change = content["changes"][0]
    assert change["metric"] == "expected acceptance_rate" and change["change"]["low"] > 0
    assert {check["check"] for check in content["checks"]} == {"sampling_z_test"}
    assert {"target_tokens_per_second", "costs", "speeds", "best"} <= content["timing"].keys()
    assert set(better["by_domain"]) == {"odd", "even"}


def test_the_page_is_self_contained(models: Path, tmp_path: Path) -> None:
    run(words(models, num_speculative_tokens="2", max_new_tokens=6, limit=3, timing="false", output_path=tmp_path / "out"))
    page = (tmp_path / "out" / "acceptance.html").read_text()
    assert page.count("<svg") == 4  # along the response, by domain, by position, tokens per round
    assert not re.search(r"<(script|link|img)|(src|href)=.(?!#)", page)
    for text in ("By position in the draft", "By domain", "Along the response", "bonus token", "draft_sample_method"):
        assert text in page, text


def test_several_gammas_can_be_written_in_each_way(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for typed in (["1,2"], ["1", "2"], ["[1, 2]"]):
        run([*words(models, max_new_tokens=3, limit=1, timing="false"), "--num_speculative_tokens", *typed])
        cells = re.findall(r"│ draft +│ greedy +│ +(\d) │", capsys.readouterr().out)
        assert cells == ["1", "2"]


def test_an_output_that_is_not_the_targets_fails(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a limit that nothing can keep, the test fails, and the command says so."""
    monkeypatch.setattr(losslessness, "Z_LIMIT", -1.0)
    code = run(words(models, temperature=1, max_new_tokens=4, limit=2, timing="false", num_speculative_tokens="1"))
    assert code == 1 and "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_speculative_tokens": "0"}, "num_speculative_tokens must be at least 1"),
        ({"num_speculative_tokens": "two"}, "num_speculative_tokens: expected .*int.*, not"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"max_new_tokens": 511}, "no row has a usable prompt .*longer than 1 tokens"),
        ({"max_new_tokens": 512}, "leaves no room for a prompt"),
        ({"temperature": -1}, "temperature -1"),
        ({"draft_sampling": "lucky"}, "draft_sampling: expected probabilistic|draft_sampling.*lucky"),
        ({"target": "/no/model"}, "/no/model"),
        ({"draft": "/no/model"}, "no model at /no/model"),
        ({"gamma": 3}, "unknown option gamma"),
    ],
)
def test_a_mistake_is_one_line(models: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        run(words(models, **options))
    assert "\n" not in str(error.value).strip()


def test_prompts_that_are_missing_or_empty(models: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(words(models, prompts=tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        run(words(models, prompts=tmp_path / "empty.jsonl"))
    write_rows(tmp_path / "blank.jsonl", [{"prompt": " "}])
    with pytest.raises(ValueError, match="no row has a usable prompt"):
        run(words(models, prompts=tmp_path / "blank.jsonl"))


def test_another_tokenizer_is_named_before_anything_is_measured(models: Path) -> None:
    with pytest.raises(ValueError, match=r"different tokenizers .*in one and nothing in the other"):
        run(words(models, draft=models / "stranger"))
    with pytest.raises(ValueError, match="different tokenizers"):
        run(words(models, baseline_draft=models / "stranger"))


def test_a_larger_draft_vocabulary_is_refused(models: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "wide")
    tiny_llama(len(tokenizer) + 8).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="cannot keep what it does not know"):
        run(words(models, draft=tmp_path / "wide"))


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--target", "--num_speculative_tokens", "--baseline_draft", "--draft_sampling", "--server"):
        assert option in out
