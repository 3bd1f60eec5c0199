"""Recipes read, wired and checked, without running them: what each stage would be given, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdlib.cli.main import main
from kdlib.cli.parsing import option_names, parse
from kdlib.cli.recipe.check import planned
from kdlib.cli.recipe.commands import COMMANDS, option_classes
from kdlib.cli.recipe.file import override, read_recipe
from kdlib.cli.recipe.stage import Plan
from kdlib.cli.run import RecipeArguments
from tests.cli.conftest import Command

Planned = Callable[..., Plan]
GENERATE = {"generate": {"verify": "exact_number", "num_generations": 2}}
SFT = {"distill": {"name": "sft", "objective": "CrossEntropy"}}
ON_POLICY = {"distill": {"name": "on_policy", "objective": "ReverseKL", "on_policy_fraction": 1.0}}
EVALUATE = {"evaluate": {"problems": "ROWS", "verify": "exact_number"}}


@pytest.fixture
def plan(place: Path, tmp_path: Path) -> Planned:
    """``plan(*stages, **shared)``: the plan of a recipe of the tiny models; ROWS in it are rows that are there."""

    def make(*stages: Any, **shared: Any) -> Plan:
        models = {"model": str(place / "student"), "teacher": str(place / "teacher")}
        recipe = {**models, "dataset_name": "ROWS", "output_dir": str(tmp_path / "out"), "use_cpu": True}
        recipe = {key: value for key, value in {**recipe, **shared}.items() if value is not None}
        text = yaml.safe_dump({**recipe, "stages": list(stages)}, sort_keys=False)
        path = tmp_path / "recipe.yaml"
        path.write_text(text.replace("ROWS", str(place / "rows.jsonl")))
        return planned(str(path))

    return make


def given(plan: Plan, name: str) -> dict[str, Any]:
    """A stage's options as its command gets them, with places below ``out``."""
    stage = next(stage for stage in plan.stages if stage.name == name)
    root = str(Path(plan.output_dir)) + "/"
    found: dict[str, Any] = yaml.safe_load(
        yaml.safe_dump(stage.located(Path(plan.output_dir)), sort_keys=False).replace(root, "out/")
    )
    return found


def test_stages_get_what_they_leave_out_from_those_before(plan: Planned, place: Path) -> None:
    made = plan(GENERATE, SFT, "cache", {"distill": {"name": "kl"}}, ON_POLICY, EVALUATE, seed=3)
    student, teacher, rows = (str(place / name) for name in ("student", "teacher", "rows.jsonl"))
    assert [stage.name for stage in made.stages] == ["generate", "sft", "cache", "kl", "on_policy", "evaluate"]
    generate, sft, cache = (given(made, name) for name in ("generate", "sft", "cache"))
    assert (generate["model"], generate["dataset_name"], generate["seed"]) == (teacher, rows, 3)
    assert (sft["model"], sft["dataset_name"], "teacher" in sft) == (student, "out/generate/correct.jsonl", False)
    assert sft["use_cpu"] is True and "use_cpu" not in generate and sft["output_dir"] == "out/sft"
    assert (cache["teacher"], cache["dataset_name"]) == (teacher, "out/generate/correct.jsonl")
    kl, on_policy, evaluate = (given(made, name) for name in ("kl", "on_policy", "evaluate"))
    assert (kl["model"], kl["teacher"], kl["dataset_name"]) == ("out/sft/final", "out/cache", "out/generate/correct.jsonl")
    assert (on_policy["model"], on_policy["teacher"], on_policy["dataset_name"]) == ("out/kl/final", teacher, rows)
    assert (evaluate["model"], evaluate["name"], evaluate["output_path"]) == (
        "out/on_policy/final",
        "on_policy",
        "out/evaluate",
    )
    assert evaluate["compare"] == {"base": student, "sft": "out/sft/final", "kl": "out/kl/final"}
    assert "teacher" not in evaluate and "dataset_name" not in evaluate


def test_what_a_stage_says_counts(plan: Planned, place: Path) -> None:
    compare = {**EVALUATE["evaluate"], "compare": ["base", "sft", "teacher"], "model": "again"}
    again = {"distill": {"name": "again", "model": "base", "dataset_name": "generate", "keep": "all", "teacher": "sft"}}
    made = plan(GENERATE, SFT, again, {"evaluate": compare}, {"export diffusion": {"model": {"from": "sft"}}})
    assert given(made, "again")["model"] == str(place / "student") and given(made, "again")["teacher"] == "out/sft/final"
    assert given(made, "again")["dataset_name"] == "out/generate/shard-*.jsonl"
    evaluate = given(made, "evaluate")
    assert evaluate["name"] == "again" and list(evaluate["compare"]) == [
        "teacher",
        "base",
        "sft",
    ]  # no gain is over the teacher
    assert given(made, "export-diffusion")["model"] == "out/sft/final"


def test_rows_of_the_recipe_have_their_split_and_rows_of_a_stage_have_not(plan: Planned) -> None:
    made = plan({"generate": {"num_generations": 2}}, SFT, dataset_train_split="train[:4]")
    assert given(made, "generate")["dataset_train_split"] == "train[:4]" and "dataset_train_split" not in given(made, "sft")
    assert given(made, "sft")["dataset_name"] == "out/generate/shard-*.jsonl"  # nothing was judged


def test_drafts_and_parallel_decoding_have_chains_of_their_own(plan: Planned, place: Path) -> None:
    made = plan(SFT, "draft", "export draft", {"evaluate acceptance": {"prompts": "ROWS"}}, "trajectories jacobi", "jacobi")
    student, teacher = str(place / "student"), str(place / "teacher")
    assert given(made, "draft")["model"] == student and given(made, "export-draft")["draft"] == "out/draft/final"
    acceptance = given(made, "evaluate-acceptance")
    assert (acceptance["draft"], acceptance["target"]) == ("out/draft/final", teacher)
    assert given(made, "trajectories-jacobi")["model"] == "out/sft/final" == given(made, "jacobi")["model"]
    assert given(made, "jacobi")["dataset_name"] == "out/trajectories-jacobi"


def test_fingerprints_follow_what_is_read(plan: Planned) -> None:
    """Another learning rate of sft makes another on_policy, not another generate; how it is carried out does not count."""

    def prints(**sft: Any) -> dict[str, str]:
        made = plan(GENERATE, {"distill": {**SFT["distill"], **sft}}, ON_POLICY)
        return {stage.name: stage.fingerprint for stage in made.stages}

    before, after = prints(), prints(learning_rate=0.5)
    assert before["generate"] == after["generate"]
    assert before["sft"] != after["sft"] and before["on_policy"] != after["on_policy"]
    assert prints(disable_tqdm=True) == before


def test_a_reference_may_stand_anywhere(plan: Planned) -> None:
    demo = {"from": "demo", "file": "student"}
    rows = {"dataset_name": {"from": "demo", "file": "train.jsonl"}, "include_path": {"from": "demo", "file": "tasks"}}
    made = plan("demo", {"distill": {"objective": "CrossEntropy"}}, model=demo, **rows)
    assert given(made, "distill")["model"] == "out/demo/student" and given(made, "distill")["include_path"] == "out/demo/tasks"
    assert made.stages[1].reads == ("demo",)


@pytest.mark.parametrize(
    ("stages", "shared", "said"),
    [
        ([{"distil": {}}], {}, "stage 1: no command 'distil' for a stage: did you mean distill?"),
        ([{"export": {}}], {}, "stage 1: export does several things: write export draft or export diffusion"),
        ([{"distill": {}, "name": "x"}], {}, "stage 1 is written as {COMMAND: {option: value}} with one command"),
        ([{"distill": ["x"]}], {}, "stage 1, distill: its options are written as {option: value}"),
        ([SFT, SFT], {}, "two stages are named sft: give one of them another name"),
        ([{"distill": {"name": "base"}}], {}, "stage 1 is named 'base'"),
        ([{"distill": {"objectve": "ForwardKL"}}], {}, "stage distill: unknown option objectve: did you mean objective?"),
        ([{"distill": {"kep": "all"}}], {}, "stage distill: unknown option kep: did you mean keep?"),
        ([SFT], {"learning_rat": 1}, "above the stages: unknown option learning_rat: did you mean learning_rate?"),
        ([SFT], {"push_to_hub": True}, "above the stages: option push_to_hub: it publishes: write it into the stage"),
        ([{"distill": {"push_to_hub": True}}], {}, "stage distill: push_to_hub needs the Hub, and HF_HUB_OFFLINE is set"),
        ([SFT], {"teacher_model": "x"}, "above the stages: unknown option teacher_model: in kdlib it is teacher"),
        (
            [{"distill": {"output_dir": "x"}}],
            {},
            "stage distill: option output_dir: a stage writes to the recipe's output_dir/NAME",
        ),
        ([{"distill": {"overwrite": True}}], {}, "--overwrite STAGE starts a stage anew"),
        ([{"distill": {"objective": "ForwardKLL"}}], {}, "stage distill: no objective ForwardKLL: did you mean ForwardKL?"),
        ([{"distill": {"max_steps": "many"}}], {}, "stage distill: max_steps: expected int, not 'many'"),
        ([{"distill": {"on_policy_fraction": 2.0}}], {}, "stage distill: on_policy_fraction is a share of rows"),
        (
            [{"generate": {"rollout": {"temperature": 0}}}],
            {"use_cpu": None},
            "stage generate: rollout.temperature 0 writes the same",
        ),
        ([{"distill": {"model": "sft"}}, SFT], {}, "stage distill: model: sft is a stage that does not come before this one"),
        ([GENERATE, {"distill": {"model": "generate"}}], {}, "stage distill: model: generate makes traces, not model"),
        ([{"distill": {"model": {"from": "sftt"}}}], {}, "stage distill: from: there is no stage sftt"),
        ([{"distill": {"keep": "all"}}], {}, "stage distill: keep chooses among the traces of a generate stage"),
        ([GENERATE, {"distill": {"keep": "right"}}], {}, "stage distill: keep: there is no 'right'"),
        ([{"generate": {}}, {"distill": {"keep": "correct"}}], {}, "nothing in generate is judged: add verify to it"),
        ([SFT], {"dataset_name": "nowhere/rows.jsonl"}, "stage sft: dataset_name: nowhere/rows.jsonl does not exist"),
        ([SFT], {"model": "./nowhere"}, "stage sft: model: ./nowhere does not exist"),
        ([SFT], {"model": "no_such/model"}, "stage sft: model: no_such/model is no stage before this one, no directory here"),
        ([SFT], {"model": None}, "stage sft: model missing"),
        ([{"distill": {"teacher": "teacher"}}], {"teacher": None}, "teacher is the recipe's teacher, and it has none"),
        ([{"evaluate": {}}], {"use_cpu": None}, "stage evaluate: nothing to score"),
        ([SFT, {"evaluate": {**EVALUATE["evaluate"], "compare": ["stf"]}}], {}, "compare: stf is no stage before this one"),
        ([{"distill": {"tasks": ["gsm88k"]}}], {}, "stage distill:"),
        ([], {}, "stages is a list"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_before_anything_starts(stages: list[Any], shared: Any, said: str, plan: Planned) -> None:
    with pytest.raises(ValueError) as refused:
        plan(*stages, **shared)
    message = str(refused.value)
    assert said in message and "\n" not in message, message


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        read_recipe(str(path))
    path.write_text("model: x\n")
    with pytest.raises(ValueError, match="has no stages: kdlib run takes recipes with stages, kdlib distill --config"):
        read_recipe(str(path))
    path.write_text("stages: [distill]\n")
    with pytest.raises(ValueError, match="output_dir missing: add output_dir: DIR, or --output_dir DIR"):
        read_recipe(str(path))


def test_options_on_the_command_line_replace_shared_ones(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{output_dir: a, seed: 1, rollout: {engine: hf}, stages: [distill, distill]}")
    recipe = read_recipe(str(path), {"output_dir": "b", "rollout.temperature": 0.5, "learning_rate": override("x", ["1e-4"])})
    assert recipe.output_dir == "b" and recipe.shared["rollout"] == {"engine": "hf", "temperature": 0.5}
    assert recipe.shared["learning_rate"] == 1e-4 and recipe.shared["seed"] == 1
    assert [item.name for item in recipe.items] == ["distill", "distill-2"]
    assert override("tasks", ["a", "b"]) == ["a", "b"] and override("use_peft", []) is True


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_table_of_commands_is_what_the_commands_take(command: str, kdlib: Command) -> None:
    """``--print_config`` of the command itself has the options that a recipe's stage is checked against."""
    classes = option_classes(command)
    needed = {"model": "x", "teacher": "x", "dataset_name": "x", "target": "x", "draft": "x", "prompts": "x", "tokenizer": "x"}
    names = [name for cls in classes for name in option_names(cls)]
    words = [
        word
        for name, value in {**needed, COMMANDS[command].writes: "x"}.items()
        if name in names
        for word in (f"--{name}", value)
    ]
    outcome = kdlib(*command.split(), *words, "--print_config")
    assert outcome.code == 0, outcome.err
    assert set(yaml.safe_load(outcome.out)) == set(names)
    assert COMMANDS[command].takes.keys() <= set(names)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "kdlib run recipe.yaml" in shown and "--only" in shown and "trajectories jacobi" in shown
    assert parse("run", "", [RecipeArguments], ["--recipe", "x"]) is not None
