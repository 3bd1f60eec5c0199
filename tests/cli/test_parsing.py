"""Options from words and YAML, their errors, --print_config and --help."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from kdlib.cli.arguments import AdapterArguments, LaunchArguments, RunArguments
from kdlib.cli.help import COMMON, docs
from kdlib.cli.names import LEFT_OUT, RENAMED
from kdlib.cli.parsing import Options, option_names, parse
from kdlib.cli.scoring import ScoringArguments
from kdlib.objectives import TAID, CrossEntropy, ForwardKL, GeneralizedJSD, Sum
from kdlib.trainers.config import DistillationConfig

CLASSES = [RunArguments, AdapterArguments, ScoringArguments, LaunchArguments, DistillationConfig]
RUN = ["--model", "M", "--dataset_name", "D"]


@dataclass
class Sample:
    """One option of each kind.

    Args:
        name: a text.
        rate: a number.
        count: a whole number or nothing.
        flag: yes or no.
        names: a list.
        choice: one of two.
        mapping: a mapping.
    """

    name: str = "n"
    rate: float = 1.0
    count: int | None = None
    flag: bool = False
    names: list[str] | None = None
    choice: Literal["a", "b"] = "a"
    mapping: dict[str, Any] | None = None


def sample(*words: str) -> Sample:
    options = parse("test", "", [Sample], list(words))
    assert options is not None
    return options.build(Sample)


def distill(*words: str) -> Options:
    options = parse("distill", "", CLASSES, [*RUN, *words])
    assert options is not None
    return options


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--rate", "1e-3"], "rate", 1e-3),
        (["--rate", "-2"], "rate", -2.0),
        (["--rate=3"], "rate", 3.0),
        (["--name", "123"], "name", "123"),
        (["--name", "a: b"], "name", "a: b"),
        (["--name=--x"], "name", "--x"),
        (["--count", "null"], "count", None),
        (["--flag"], "flag", True),
        (["--flag", "False"], "flag", False),
        (["--flag", "--rate", "2"], "flag", True),
        (["--names", "a,b"], "names", ["a", "b"]),
        (["--names", "a", "b"], "names", ["a", "b"]),
        (["--names", "[a, b]"], "names", ["a", "b"]),
        (["--names", "a"], "names", ["a"]),
        (["--names", "null"], "names", None),
        (["--mapping", "{x: 1e-3}"], "mapping", {"x": 1e-3}),
        (["--choice", "b"], "choice", "b"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_words_become_values(words: list[str], field: str, value: Any) -> None:
    assert getattr(sample(*words), field) == value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "abc"], "rate: expected float, not 'abc'"),
        (["--count", "1.5"], "count: expected int or null, not '1.5'"),
        (["--flag", "perhaps"], "flag: expected true or false, not 'perhaps'"),
        (["--choice", "c"], "choice: expected 'a' or 'b', not 'c'"),
        (["--mapping", "x"], "mapping: expected dict[str, Any] or null, not 'x'"),
        (["--rate"], "--rate needs a value"),
        (["--rate", "1", "2"], "--rate takes one value, not '1 2': quote it, or begin options with --"),
        (["--rat", "1"], "unknown option rat: did you mean rate?"),
        (["--zzz", "1"], "unknown option zzz: --help_all lists all"),
        (["word"], "unexpected 'word': options are written as --name value"),
        (["--config"], "--config needs a value"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_what_does_not_parse_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(ValueError) as error:
        sample(*words)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--objective", "skewkl"], "did you mean SkewKL"),
        (["--objective", "SkewKL", "--objective.alfa", "1"], "unknown option alfa of SkewKL: did you mean alpha?"),
        (["--objective", "SkewKL", "--objective.alpha", "x"], "objective.alpha: expected float, not 'x'"),
        (["--objective", "{SkewKL: {alpha: x}}"], "objective.alpha: expected float, not 'x'"),
        (["--objective", "{SkewKL: "], "--objective, line 1, column 10 is not YAML"),
        (["--objective.t_start", "1"], "unknown option t_start of ForwardKL"),
        (["--objective", "Sum", "--objective.parts", "[ForwardKL]"], "[[weight, Name], ...]"),
        (["--beta", "1"], "in kdlib it is objective.beta"),
        (["--lmbda", "1"], "in kdlib it is on_policy_fraction"),
        (["--use_liger_kernel"], "kdlib has its own chunked kernel; leave it out"),
        (["--hub-token", "x"], "hf auth login"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_what_distill_does_not_understand_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(ValueError) as error:
        distill(*words)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_named_with_how_to_give_it() -> None:
    with pytest.raises(ValueError, match="model, dataset_name missing: add --model MODEL and --dataset_name"):
        parse("distill", "", CLASSES, [])


def test_a_choice_that_transformers_refuses_names_its_option() -> None:
    with pytest.raises(ValueError, match="save_strategy: expected one of no, steps, epoch, best, not 'never'"):
        distill("--save_strategy", "never", "--use_cpu").build(DistillationConfig)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate: abc", "rate: expected float, not 'abc'"),
        ("rate: [1]", "rate: expected float, not '[1]'"),
        ("rate:", "rate is empty: give a value, or leave the line out"),
        ("rat: 1", "unknown option rat: did you mean rate?"),
        ("name: 3", "name: expected str, not '3'"),
        ("1: 2", "unknown option 1"),
    ],
)
def test_a_wrong_line_of_yaml_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        sample("--config", str(tmp_path / "it.yaml"))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_is_typed_overrides_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text("rate: 1e-3\ncount:\nnames: a\nobjective: {GeneralizedJSD: {beta: 0.1}}\n")
    content = yaml.safe_load((tmp_path / "it.yaml").read_text())
    (tmp_path / "sample.yaml").write_text("rate: 1e-3\ncount:\nnames: a\n")
    found = sample("--config", str(tmp_path / "sample.yaml"), "--name", "x")
    assert (found.rate, found.count, found.names, found.name) == (1e-3, None, ["a"], "x")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"objective": content["objective"], "max_steps": 7}))
    options = distill("--config", str(tmp_path / "run.yaml"), "--objective.beta", "0.2")
    assert options.build(RunArguments).objective == GeneralizedJSD(beta=0.2)
    assert options.config["max_steps"] == 7


@pytest.mark.parametrize(
    ("words", "objective"),
    [
        ([], ForwardKL()),
        (["--objective", "TAID", "--objective.t_start", "0.2"], TAID(t_start=0.2)),
        (["--objective=TAID"], TAID()),
        (["--objective", "{GeneralizedJSD: {beta: 2e-1}}"], GeneralizedJSD(beta=0.2)),
        (
            ["--objective", "{Sum: {parts: [[0.9, {ForwardKL: {temperature: 2}}], [0.1, CrossEntropy]]}}"],
            Sum(parts=((0.9, ForwardKL(temperature=2.0)), (0.1, CrossEntropy()))),
        ),
        (
            ["--objective", "Sum", "--objective.parts", "[[1, CrossEntropy]]"],
            Sum(parts=((1.0, CrossEntropy()),)),
        ),
        (["--objective", "OWN:Scaled", "--objective.factor", "3"], None),
        (["--objective", "{Sum: {parts: [[1.0, {OWN:Scaled: {factor: 4.0}}]]}}"], None),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_print_config_reads_back_as_the_same_run(
    words: list[str], objective: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("OWN", str(place / "own.py")) for word in words]
    extra = ["--learning-rate", "1e-4", "--lora_target_modules", "q_proj,v_proj", "--config_overrides", "{hidden_size: 8}"]
    first = distill(*words, *extra)
    assert parse("distill", "", CLASSES, [*RUN, *words, *extra, "--print-config"]) is None
    printed = capsys.readouterr().out
    assert "class_path" not in printed
    (tmp_path / "printed.yaml").write_text(printed)
    second = parse("distill", "", CLASSES, ["--config", str(tmp_path / "printed.yaml")])
    assert second is not None and second.config == first.config
    found = first.build(RunArguments).objective
    assert second.build(RunArguments).objective == found
    assert objective is None or found == objective
    assert AdapterArguments(lora_target_modules=["q_proj", "v_proj"]) == second.build(AdapterArguments)


def test_the_configuration_has_every_option_and_nothing_of_the_machine() -> None:
    config = distill().config
    names = {field.name for cls in CLASSES for field in fields(cls) if field.init}
    assert config.keys() == names - LEFT_OUT.keys()
    assert not {"local_rank", "hub_token", "resume_from_checkpoint"} & config.keys()
    assert config["bf16"] is None  # resolved when the run starts, on the machine it starts on


def test_no_name_is_both_ours_and_renamed() -> None:
    ours = {name for cls in CLASSES for name in option_names(cls)}
    assert not ours & (RENAMED.keys() | LEFT_OUT.keys())


def test_help_teaches_our_options_first_and_all_on_demand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert parse("distill", "What it does.", CLASSES, ["--help"]) is None
    short = capsys.readouterr().out
    assert short.startswith("usage: kdlib distill --model MODEL --dataset_name DATASET_NAME --output_dir OUTPUT_DIR")
    for name in [*docs(RunArguments), *docs(AdapterArguments), *docs(DistillationConfig), *COMMON]:
        assert f"--{name} " in short, name
    assert "peak learning rate" in short and "2.0e-05" in short and "t_start=" in short
    assert "adam_beta1" not in short and "local_rank" not in short
    assert parse("distill", "What it does.", CLASSES, ["--help_all"]) is None
    assert "--adam_beta1" in capsys.readouterr().out


@pytest.mark.parametrize("cls", [*CLASSES[:-1], Sample])
def test_every_option_of_ours_says_what_it_does(cls: type) -> None:
    assert list(docs(cls)) == option_names(cls)
