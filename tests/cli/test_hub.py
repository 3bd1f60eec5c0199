"""Pushing runs, caches and traces to a Hub on this machine; what is refused, before anything is trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard, ModelCard, constants

from tests.cli.conftest import Command, conversation, tree, write_rows
from tests.cli.fake_hub import TOKEN, FakeHub, fake_hub

CARD = "---\nlicense: {license}\n---\n# a model\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub, the way to it, and a token."""
    with fake_hub() as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def licensed(place: Path, tmp_path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a short run whose teacher and student have cards with one licence."""
    for name in ("teacher", "student"):
        shutil.copytree(place / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text(CARD.format(license="apache-2.0"))
    return {**options, "model": tmp_path / "student", "teacher": tmp_path / "teacher"}


def test_a_run_pushes_final_and_nothing_else(kdlib: Command, licensed: dict[str, Any], hub: FakeHub, place: Path) -> None:
    rows = place / "rows.jsonl"
    outcome = kdlib("distill", **licensed, eval_dataset_name=rows, push_to_hub="true", hub_private_repo="true")
    assert outcome.code == 0, outcome.err
    pushed, final = hub.repository("run"), licensed["output_dir"] / "final"
    assert {name: (final / name).read_bytes() for name in pushed} == pushed
    assert pushed.keys() == {path.name for path in final.iterdir()}
    assert [(asked["name"], asked["visibility"]) for asked in hub.created] == [("run", "private")]
    assert hub.messages == ["run, 2 optimizer steps"] and f"pushed to {hub.url}/ann/run" in outcome.err


def test_the_card_says_what_the_hub_reads_and_nothing_goes_there_unasked(
    kdlib: Command, licensed: dict[str, Any], place: Path, hub: FakeHub
) -> None:
    assert kdlib("distill", **licensed, eval_dataset_name=place / "rows.jsonl").code == 0
    assert not hub.files and not hub.created
    card = ModelCard.load(licensed["output_dir"] / "final" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.tags == ["kdlib", "distillation"] and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # a path of this machine is no Hub id
    assert f"- `{licensed['teacher']}`: “license: apache-2.0” (the card beside it)" in card.text
    assert "ForwardKL(" in card.text and "kdlib distill" in card.text and "transformers 5" in card.text


def test_every_save_pushes_the_student_of_each_checkpoint(kdlib: Command, licensed: dict[str, Any], hub: FakeHub) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save", "hub_model_id": "ann/small"}
    outcome = kdlib("distill", **licensed, **saving, push_to_hub="true", hub_revision="trial")
    assert outcome.code == 0, outcome.err
    assert hub.messages == ["step 1", "step 2", "run, 2 optimizer steps"]
    pushed = hub.repository("small", branch="trial")
    assert "model.safetensors" in pushed and not any("optimizer" in name for name in pushed)
    assert "trial" in hub.branches


REFUSED = [
    ({"HF_HUB_OFFLINE": True}, {}, "HF_HUB_OFFLINE is set: unset it"),
    ({"HF_TOKEN": None}, {}, "needs a token: log in with `hf auth login`, set HF_TOKEN"),
    ({"HF_TOKEN": "hf_of_nobody"}, {}, "the Hub refuses the token"),
    ({"ENDPOINT": "http://127.0.0.1:9"}, {}, "the Hub does not answer"),
    ({"card": None}, {}, "no licence is found for"),
    ({"card": "llama3"}, {}, "different licences"),
    ({}, {"hub_strategy": "checkpoint"}, "hub_strategy checkpoint would publish the optimizer's state"),
]


@pytest.mark.parametrize(("world", "changes", "said"), REFUSED, ids=str)
def test_a_push_that_would_fail_is_refused_in_one_line_before_training(
    world: dict[str, Any],
    changes: dict[str, Any],
    said: str,
    kdlib: Command,
    licensed: dict[str, Any],
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _arrange(world, licensed, monkeypatch, tmp_path)
    outcome = kdlib("distill", **licensed, **changes, push_to_hub="true")
    assert outcome.code == 2, outcome.err
    assert said in outcome.err and outcome.err.count("\n") == 1
    assert not licensed["output_dir"].exists() and not hub.files


def _arrange(world: dict[str, Any], licensed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in world.keys() & {"HF_HUB_OFFLINE", "ENDPOINT"}:
        monkeypatch.setattr(constants, name, world[name])
    if "HF_TOKEN" in world:
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN")
        if world["HF_TOKEN"] is not None:
            monkeypatch.setenv("HF_TOKEN", world["HF_TOKEN"])
    if "card" in world:
        card = licensed["teacher"] / "README.md"
        card.unlink() if world["card"] is None else card.write_text(CARD.format(license=world["card"]))


def test_a_given_licence_is_what_the_card_says(kdlib: Command, licensed: dict[str, Any], hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "teacher" / "README.md").unlink()
    assert kdlib("distill", **licensed).code == 0
    run = licensed["output_dir"]
    assert "no licence was found in its card" in (run / "final" / "README.md").read_text()
    refused = kdlib("push", str(run), repo_id="small")
    assert refused.code == 2 and "add --license NAME" in refused.err and refused.err.count("\n") == 1 and not hub.files
    pushed = kdlib("push", str(run), repo_id="small", license="mit")
    assert pushed.code == 0 and f"pushed  {hub.url}/ann/small" in pushed.out
    assert ModelCard(hub.repository("small")["README.md"].decode()).data.license == "mit"


def test_a_cache_is_pushed_as_a_data_set_with_a_card(
    kdlib: Command, licensed: dict[str, Any], hub: FakeHub, tmp_path: Path
) -> None:
    given = {"teacher": licensed["teacher"], "dataset_name": licensed["dataset_name"], "output_dir": tmp_path / "signals"}
    made = kdlib("cache", **given, k=8, push_to_hub="true", hub_dataset_id="top8")
    assert made.code == 0, made.err
    pushed = hub.repository("top8", kind="datasets")
    card = DatasetCard(pushed["README.md"].decode())
    assert card.data.license == "apache-2.0" and "the 8 likeliest tokens, 16 bits" in card.text
    assert pushed["cache.json"] == (tmp_path / "signals" / "cache.json").read_bytes()
    again = kdlib("push", str(tmp_path / "signals"), repo_id="other")
    assert again.code == 0 and hub.repository("other", kind="datasets").keys() == pushed.keys()
    trained = kdlib("distill", **{**licensed, "teacher": tmp_path / "signals"})
    assert trained.code == 0, trained.err  # the card in it does no harm
    assert "“license: apache-2.0”" in (licensed["output_dir"] / "final" / "README.md").read_text()


def test_traces_are_pushed_with_their_verdicts(kdlib: Command, licensed: dict[str, Any], hub: FakeHub, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "asked.jsonl", [{"prompt": f"{i} plus two?", "answer": str(i + 2)} for i in range(3)])
    given = {"model": licensed["teacher"], "dataset_name": rows, "output_dir": tmp_path / "traces", "device": "cpu"}
    made = kdlib("generate", **given, num_generations=2, max_completion_length=4, verify="exact_number", push_to_hub="true")
    assert made.code == 0, made.err
    pushed = hub.repository("traces", kind="datasets")
    assert {"README.md", "index.json", "report.json", "shard-00000.jsonl"} <= pushed.keys()
    assert not any(name.endswith(("metrics.jsonl", ".partial", "report.html")) for name in pushed)
    card = DatasetCard(pushed["README.md"].decode())
    assert {one["config_name"] for one in card.data.configs} == {"all", "correct", "incorrect"}
    assert "exact_number" in card.text and str(licensed["teacher"]) in card.text


@pytest.mark.parametrize("command", ["cache", "generate"])
def test_data_sets_are_refused_before_the_work_too(
    command: str, kdlib: Command, place: Path, tmp_path: Path, hub: FakeHub
) -> None:
    teacher = {"cache": "teacher", "generate": "model"}[command]
    given = {teacher: place / "teacher", "dataset_name": place / "rows.jsonl", "output_dir": tmp_path / "made"}
    outcome = kdlib(command, **given, push_to_hub="true")
    assert outcome.code == 2 and "no licence is found for" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "made").exists() and not hub.files


def test_what_is_nothing_finished_is_not_pushed(kdlib: Command, hub: FakeHub, tmp_path: Path, place: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [conversation("Two?", "Four.")])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: x\n")
    for directory, said in (
        (tmp_path, "holds no finished run, cache or traces"),
        (tmp_path / "run", "is not finished"),
        (tmp_path / "nowhere", "no directory"),
        (place / "student", "has no card"),
    ):
        before = tree(tmp_path)
        outcome = kdlib("push", str(directory), repo_id="x")
        assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
        assert tree(tmp_path) == before and not hub.files


def test_a_failing_push_leaves_the_finished_run(kdlib: Command, licensed: dict[str, Any], hub: FakeHub) -> None:
    outcome = kdlib("distill", **licensed, push_to_hub="true", hub_model_id="bad..name")
    assert outcome.code == 2 and "the run itself is finished" in outcome.err and "kdlib push" in outcome.err
    assert (licensed["output_dir"] / "final" / "model.safetensors").is_file()
    assert kdlib("push", str(licensed["output_dir"]), repo_id="good").code == 0
