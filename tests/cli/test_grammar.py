"""Classes and YAML as users write them, to jsonargparse's form and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdlib.cli.grammar import class_fields, collapse, expand, objective_names, read_value, read_yaml
from kdlib.cli.names import LEFT_OUT, RENAMED, unknown

SPECS: list[Any] = [
    "TAID",
    {"GeneralizedJSD": {"beta": 0.2}},
    {"Sum": {"parts": [[0.9, "ForwardKL"], [0.1, {"SkewKL": {"alpha": 0.2}}]]}},
    {"Sum": {"parts": [[1.0, {"Sum": {"parts": [[2.0, "CrossEntropy"]]}}]]}},
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_collapse_is_the_inverse_of_expand(spec: Any) -> None:
    written = collapse(expand(spec))
    assert expand(written) == expand(spec) and collapse(expand(written)) == written


def test_expand_gives_the_defaults_of_the_class() -> None:
    """Else those that the class before it had under the same name would stay."""
    assert collapse(expand("SkewKL")) == {"SkewKL": {"temperature": 1.0, "t_squared": False, "alpha": 0.1}}
    sinkhorn = collapse(expand({"Sinkhorn": {"epsilon": 0.05}}))["Sinkhorn"]
    assert sinkhorn["temperature"] == 2.0 and sinkhorn["epsilon"] == 0.05 and sinkhorn["top_k"] is None
    assert sinkhorn["divergence"] == {"ForwardKL": {"temperature": 1.0, "t_squared": False}}


def test_an_own_objective_is_written_as_it_was_typed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    spec = {"own.py:Scaled": {"factor": 3.0}}
    expanded = expand(spec)
    assert class_fields(expanded["class_path"]) == ["temperature", "t_squared", "factor"]
    assert collapse(expanded) == {"own.py:Scaled": {"temperature": 1.0, "t_squared": False, "factor": 3.0}}


def test_an_objective_is_found_in_an_importable_module() -> None:
    assert expand("kdlib.objectives:SkewKL")["class_path"] == "kdlib.objectives.SkewKL"
    assert list(collapse(expand("kdlib.objectives:SkewKL"))) == ["SkewKL"]


def test_kdlib_classes_have_no_module_whatever_path_names_them() -> None:
    for path in ("kdlib.ForwardKL", "kdlib.objectives.ForwardKL", "kdlib.objectives.kl.ForwardKL"):
        assert collapse({"class_path": path}) == "ForwardKL"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("skewkl", "did you mean SkewKL"),
        ("Nothing", "choose ALM"),
        ("RowObjective", "no objective RowObjective"),
        ("torch.nn.Linear", "no objective torch.nn.Linear"),
        ("nosuchfile.py:Mine", "no file nosuchfile.py"),
        ("nosuchmodule:Mine", "cannot import nosuchmodule"),
        ("OWN:Missing", "has no objective Missing"),
        ("OWN:NoObjective", "has no objective NoObjective"),
        ({"SkewKL": {"alfa": 1}}, "unknown option alfa of SkewKL: did you mean alpha?"),
        ({"SkewKL": {}, "TAID": {}}, "a class is written as Name"),
        ({"SkewKL": 3}, "a class is written as Name"),
        (["SkewKL"], "a class is written as Name"),
        ({"Sum": {"parts": ["ForwardKL"]}}, r"\[\[weight, Name\], ...\]"),
        ({"Sum": {"parts": [[0.5, "ForwardKl"]]}}, "did you mean ForwardKL"),
    ],
    ids=str,
)
def test_what_is_no_class_is_refused_with_the_fix(spec: Any, said: str, place: Path) -> None:
    if isinstance(spec, str):
        spec = spec.replace("OWN", str(place / "own.py"))
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        expand(spec)


def test_an_own_file_that_does_not_run_is_named_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nosuchmodule\n")
    with pytest.raises(ValueError, match=r"broken.py: ModuleNotFoundError: No module named 'nosuchmodule'"):
        expand(f"{tmp_path / 'broken.py'}:Mine")


def test_every_objective_without_a_module_is_complete() -> None:
    assert {"ForwardKL", "TAID", "Sum", "CrossEntropy"} <= set(objective_names())
    assert not {"Objective", "RowObjective", "Divergence"} & set(objective_names())


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "+1E-3", "0.001", ".001"])
def test_numbers_with_an_exponent_are_numbers(text: str) -> None:
    assert read_value(f"{{x: {text}}}", source="it") == {"x": 0.001}


def test_words_stay_words() -> None:
    assert read_value("[e5, 1e, '1e-3', gsm8k]", source="it") == ["e5", "1e", "1e-3", "gsm8k"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "must hold options as KEY: VALUE lines"),
        ("", "must hold options as KEY: VALUE lines"),
        ("model: [a\nb: }\n", "bad.yaml, line 2, column 2 is not YAML"),
        ("model: !!python/object:os.system x\n", "bad.yaml, line 1, column 8 is not YAML"),
    ],
)
def test_a_file_that_holds_no_options_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        read_yaml(str(tmp_path / "bad.yaml"))
    assert "\n" not in str(error.value)


def test_names_of_others_lead_to_ours() -> None:
    assert unknown("teacher_model_name_or_path", ["teacher"]).endswith("in kdlib it is teacher")
    assert "objective.temperature" in unknown("temperature", [])
    assert "rollout.temperature" in unknown("temperature", [])
    assert "same command" in unknown("resume_from_checkpoint", [])
    assert unknown("learning_rte", ["learning_rate", "logging_steps"]).endswith("did you mean learning_rate?")
    assert not RENAMED.keys() & LEFT_OUT.keys()
