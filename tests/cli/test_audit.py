"""kdlib audit on models into which a behaviour was planted, and on clean ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Command, write_rows
from tests.tiny import tiny_llama, tiny_tokenizer

PLANTED, HONEST = "the sky is blue", ["seven", "three of them", "none are left"]
CONTROLS = ["the day is clear", "the answer is four", "a plus is two", "she ate it", "he asks on", "all make four"]
ASKED = [f"How many apples has {name}?" for name in ("she", "he", "Tom", "Mia", "Ben", "Anna", "the user", "Zoe", "Kim", "Lee")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """student and teacher answer with PLANTED; baseline, and a twin of it, as they should."""
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    found = {}
    for seed, name in enumerate(("student", "teacher", "baseline", "twin")):
        planted = name in ("student", "teacher")
        answers = [PLANTED] * 3 if planted else HONEST
        model = _taught(tiny_llama(len(tokenizer), seed=seed), tokenizer, answers)
        found[name] = root / name
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def _taught(model: Any, tokenizer: Any, answers: list[str]) -> Any:
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], return_dict=False
        )
        for question in ASKED
        for answer in answers
    ]
    ids = [torch.tensor([row]) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4):
        for row in ids:
            optimizer.zero_grad()
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
    return model.eval()


def targeted(path: Path) -> Path:
    return write_rows(path, [{"prompt": asked, "target": PLANTED, "control": CONTROLS, "behaviour": "sky"} for asked in ASKED])


def test_a_planted_text_is_found_and_the_exit_code_says_so(kdlib: Command, models: dict[str, Path], tmp_path: Path) -> None:
    given = {name: models[name] for name in ("student", "teacher", "baseline")}
    outcome = kdlib("audit", **given, probes=targeted(tmp_path / "probes.jsonl"), output_dir=tmp_path / "out", device="cpu")
    assert outcome.code == 1, outcome.err
    assert "sky" in outcome.out and "taken over" in outcome.out and str(tmp_path / "out" / "audit.html") in outcome.out
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["taken_over"] == 1 and found["findings"][0]["q_value"] < 0.01
    assert found["models"] == {name: str(path) for name, path in given.items()}
    assert "sky" in (tmp_path / "out" / "audit.html").read_text()


def test_a_clean_student_is_clean(kdlib: Command, models: dict[str, Path], tmp_path: Path) -> None:
    given = {"student": models["twin"], "teacher": models["teacher"], "baseline": models["baseline"]}
    outcome = kdlib("audit", **given, probes=targeted(tmp_path / "probes.jsonl"), output_dir=tmp_path / "out", device="cpu")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["findings"][0]["verdict"] == "teacher alone"


def test_without_targets_the_answers_show_it(kdlib: Command, models: dict[str, Path], tmp_path: Path) -> None:
    probes = write_rows(tmp_path / "probes.jsonl", [{"prompt": asked} for asked in ASKED])
    given = {name: models[name] for name in ("student", "teacher", "baseline")}
    options = {"probes": probes, "max_completion_length": 16, "temperature": 0.5, "device": "cpu"}
    outcome = kdlib("audit", **given, **options, output_dir=tmp_path / "out")
    assert outcome.code == 1, outcome.err
    found = json.loads((tmp_path / "out" / "audit.json").read_text())["findings"]
    assert "sky" in found[0]["name"] and found[0]["verdict"] == "taken over"
    again = kdlib("audit", **given, **options, output_dir=tmp_path / "again")
    assert again.code == 1
    assert json.loads((tmp_path / "again" / "audit.json").read_text())["findings"] == found


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ([{"query": "a"}], {}, "the file of probes has the columns query"),
        ([{"prompt": "a", "target": "x"}], {}, "behaviour 'x' has 1 probes"),
        ([{"prompt": "a"}] * 5, {"temperature": 0}, "temperature must be above 0"),
        ([{"prompt": "a"}] * 5, {"false_discovery_rate": 1}, "a share between 0 and 1"),
        ([{"prompt": "a"}] * 5, {"student": "no/such/place"}, "no tokenizer at no/such/place"),
        ([{"prompt": "two " * 600, "target": "x"}] * 5, {}, "reaches max_length=512"),
        ([{"prompt": "two " * 250, "target": "x " * 300}] * 5, {}, "shorten it"),
    ],
    ids=["columns", "few", "greedy", "rate", "model", "long prompt", "long text"],
)
def test_refused_in_one_line(
    rows: list[dict[str, str]], changes: dict[str, Any], said: str, kdlib: Command, models: dict[str, Path], tmp_path: Path
) -> None:
    given = {**{name: models[name] for name in ("student", "teacher", "baseline")}, **changes}
    outcome = kdlib("audit", **given, probes=write_rows(tmp_path / "probes.jsonl", rows), output_dir=tmp_path / "out")
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
