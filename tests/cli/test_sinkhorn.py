"""``kdlib distill --objective Sinkhorn``: options, files and the one line for mistakes."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlib.objectives import Sinkhorn
from tests.cli.conftest import Command

TYPED = {
    "objective": "Sinkhorn",
    "objective.epsilon": 0.05,
    "objective.geometry": "sample",
    "objective.top_k": 8,
    "objective.divergence": "ReverseKL",
}

OWN = '''
from dataclasses import dataclass
from kdlib.objectives import SkewKL

@dataclass(frozen=True, kw_only=True)
class Near(SkewKL):
    """SkewKL with a factor."""
    factor: float = 2.0
'''


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "grad_norm" in line]


def written(run: Path) -> Any:
    return yaml.safe_load((run / "config.yaml").read_text())["objective"]


def test_a_run_leaves_a_loadable_student_and_the_same_command_shows_it(
    kdlib: Command, options: dict[str, Any], tmp_path: Path
) -> None:
    run, options = options["output_dir"], {**options, **TYPED}
    first = kdlib("distill", **options)
    assert first.code == 0, first.err
    AutoModelForCausalLM.from_pretrained(run / "final")
    assert len(AutoTokenizer.from_pretrained(run / "final"))
    assert "Sinkhorn(" in (run / "final" / "README.md").read_text()
    assert [line["step"] for line in lines(run)] == [1, 2]
    for line in lines(run):
        assert line["divergence"] == pytest.approx(line["kl_reverse"], rel=1e-5)
        assert line["loss"] == pytest.approx(line["divergence"] + 0.8 * line["sinkhorn"], rel=1e-5)
    asked = written(run)["Sinkhorn"]
    assert {name: asked[name] for name in ("epsilon", "geometry", "top_k")} == {
        "epsilon": 0.05,
        "geometry": "sample",
        "top_k": 8,
    }
    assert list(asked["divergence"]) == ["ReverseKL"]

    again = kdlib("distill", **options)
    assert again.code == 0 and "finished; --overwrite true starts it anew" in again.err
    changed = kdlib("distill", **{**options, "objective.epsilon": 0.1})
    assert changed.code == 2 and "epsilon" in changed.err and changed.err.count("\n") == 1
    assert kdlib("distill", config=run / "config.yaml").code == 0
    other = kdlib("distill", config=run / "config.yaml", output_dir=tmp_path / "other")
    assert other.code == 0, other.err
    ours, theirs = (path / "final" / "model.safetensors" for path in (run, tmp_path / "other"))
    assert ours.read_bytes() == theirs.read_bytes()


def printed(kdlib: Command, options: dict[str, Any], **given: Any) -> dict[str, Any]:
    """Sinkhorn's options as the command understands them."""
    shown = kdlib("distill", "--print_config", **options, **given)
    assert shown.code == 0, shown.err
    return yaml.safe_load(shown.out)["objective"]["Sinkhorn"]


def test_yaml_and_typed_options_are_the_same(kdlib: Command, options: dict[str, Any], tmp_path: Path) -> None:
    text = "{Sinkhorn: {epsilon: 0.05, divergence: {ForwardKL: {temperature: 2.0}}}}"
    (tmp_path / "run.yaml").write_text(f"objective: {text}\n")
    asked = printed(kdlib, options, config=tmp_path / "run.yaml")
    assert asked["epsilon"] == 0.05 and asked["divergence"] == {"ForwardKL": {"temperature": 2.0, "t_squared": False}}
    assert printed(kdlib, options, objective=text) == asked
    typed = {"objective.epsilon": 0.05, "objective.divergence": "{ForwardKL: {temperature: 2.0}}"}
    assert printed(kdlib, options, objective="Sinkhorn", **typed) == asked
    lower = printed(kdlib, options, config=tmp_path / "run.yaml", **{"objective.epsilon": 0.01})
    assert lower == {**asked, "epsilon": 0.01}


def test_options_of_an_own_objective_keep_their_types(kdlib: Command, options: dict[str, Any], place: Path) -> None:
    """Whatever its file imports: the classes that it is derived from need names that it does not have."""
    (place / "near.py").write_text(OWN)
    wrong = kdlib("distill", **options, objective=f"{place / 'near.py'}:Near", **{"objective.factor": "big"})
    assert wrong.code == 2 and "expected float, not 'big'" in wrong.err and wrong.err.count("\n") == 1


@pytest.mark.parametrize("text", ["Sinkhorn", "{Sinkhorn: {epsilon: 0.1}}"])
def test_what_is_not_typed_is_the_default_of_the_class(kdlib: Command, options: dict[str, Any], text: str) -> None:
    """Of Sinkhorn, whose temperature is not that of the command's own default objective."""
    asked = printed(kdlib, options, objective=text)
    own = {field.name: field.default for field in fields(Sinkhorn) if field.name != "divergence"}
    assert {name: asked[name] for name in own} == own and own["temperature"] == 2.0


def one_step(kdlib: Command, options: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The log line of a run of one step."""
    outcome = kdlib("distill", **{**options, "max_steps": 1}, **given)
    assert outcome.code == 0, outcome.err
    return lines(options["output_dir"])[0]


def test_transport_of_tokens_alone(kdlib: Command, options: dict[str, Any], tmp_path: Path) -> None:
    """``divergence: null``, with the token vectors of a file."""
    save_file({"x": torch.randn(384, 4, generator=torch.Generator().manual_seed(0))}, tmp_path / "points.safetensors")
    given = {"geometry": "sample", "token_points": str(tmp_path / "points.safetensors")}
    words: dict[str, Any] = {"objective": "Sinkhorn", **{f"objective.{name}": value for name, value in given.items()}}
    words["objective.divergence"] = "null"
    spec = json.dumps({"Sinkhorn": {**given, "divergence": None}})
    assert printed(kdlib, options, objective=spec) == printed(kdlib, options, **words)
    line = one_step(kdlib, options, **words)
    assert "divergence" not in line and "sinkhorn_marginal_error" not in line and "kl_forward" in line
    assert line["loss"] == pytest.approx(0.8 * line["sinkhorn"], rel=1e-5)
    assert written(options["output_dir"])["Sinkhorn"]["divergence"] is None
    again = kdlib("distill", **{**options, "max_steps": 1}, **words)
    assert again.code == 0 and "finished" in again.err


def test_sinkds_three_losses(kdlib: Command, options: dict[str, Any]) -> None:
    parts = "[[0.9, {ForwardKL: {temperature: 4.0}}], [0.1, CrossEntropy]]"
    line = one_step(kdlib, options, objective=f"{{Sinkhorn: {{divergence: {{Sum: {{parts: {parts}}}}}}}}}")
    assert line["loss"] == pytest.approx(line["divergence"] + 0.8 * line["sinkhorn"], rel=1e-5)


def test_help_names_it_and_its_options(kdlib: Command) -> None:
    shown = kdlib("distill", "--help")
    assert shown.code == 0 and "Sinkhorn" in shown.out
    assert "epsilon=0.1" in shown.out and "divergence=ForwardKL" in shown.out and "max_rows=1024" in shown.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective.epsilon": 0}, "Sinkhorn.epsilon must be above 0, not 0"),
        ({"objective.epsilom": 0.1}, "unknown option epsilom of Sinkhorn: did you mean epsilon?"),
        ({"objective.epsilon": "small"}, "objective.epsilon: expected float, not 'small'"),
        ({"objective.iterations": 0}, "Sinkhorn.iterations must be at least 1, not 0"),
        ({"objective.temperature": 0}, "Sinkhorn.temperature must be above 0"),
        ({"objective.max_rows": 1}, "Sinkhorn.max_rows must be at least 2"),
        ({"objective.weight": -1}, "Sinkhorn.weight must be at least 0"),
        ({"objective.cost": "cosine"}, "sqeuclidean"),
        ({"objective.geometry": "rows"}, "sample"),
        ({"objective.debiased": "true", "objective.top_k": 4}, "leave out top_k"),
        ({"objective.divergence": "null"}, "it needs a divergence, such as ForwardKL"),
        ({"objective.divergence": "TAID"}, "Sinkhorn.divergence cannot be TAID: choose"),
        ({"objective.divergence": "Sinkhorn"}, "objective.divergence: expected RowObjective or null"),
        ({"objective.divergence": "SelectiveKL"}, "SelectiveKL keeps some rows"),
        ({"objective.divergence": "{ForwardKL: {temprature: 2}}"}, "did you mean temperature?"),
        ({"objective.geometry": "sample", "objective.token_points": "nowhere.safetensors"}, "no file nowhere.safetensors"),
        ({"objective.geometry": "sample", "objective.token_points": "techer"}, "teacher, student, surface or a .safetensors"),
        (
            {"objective": "{Sum: {parts: [[1.0, ForwardKL], [0.8, Sinkhorn]]}}"},
            "kdlib.objectives.Sinkhorn does not correspond to a subclass of RowObjective",
        ),
        ({"teacher": "null"}, "Sinkhorn needs a teacher: give one (--teacher)"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    kdlib: Command,
    options: dict[str, Any],
    given: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = kdlib("distill", **{**options, "objective": "Sinkhorn", **given})
    assert outcome.code == 2 and message in outcome.err and len(outcome.err.splitlines()) == 1, outcome.err
    assert not list(tmp_path.iterdir())


def test_a_cache_must_be_of_both_temperatures(kdlib: Command, options: dict[str, Any], place: Path, tmp_path: Path) -> None:
    signals = tmp_path / "signals"
    asked = {"teacher": place / "teacher", "dataset_name": place / "rows.jsonl", "output_dir": signals, "k": 8}
    assert kdlib("cache", **asked, temperature=2).code == 0
    words = {**options, "teacher": signals, "objective": "Sinkhorn"}
    refused = kdlib("distill", **words)
    assert refused.code == 2 and "ForwardKL has temperature 1.0, the teacher's log-probs are at 2.0" in refused.err
    done = kdlib("distill", **words, **{"objective.divergence": "{ForwardKL: {temperature: 2.0}}"})
    assert done.code == 0, done.err


@pytest.mark.parametrize("command", ["draft", "jacobi", "diffusion"])
def test_other_commands_do_not_take_it(kdlib: Command, options: dict[str, Any], command: str) -> None:
    outcome = kdlib(command, **{**options, "objective": "Sinkhorn"})
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome.err
    assert ("kdlib distill (SinkhornTrainer)" if command == "draft" else "Sinkhorn") in outcome.err
    assert not options["output_dir"].exists()
