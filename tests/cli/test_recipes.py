"""Every recipe that comes with kdlib: options that its command has, values of their types, a source for each."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdlib.cli.generate import GenerateArguments
from kdlib.cli.grammar import read_yaml
from kdlib.cli.parsing import Options, parse
from kdlib.cli.recipe.commands import option_classes, training_run
from kdlib.cli.recipe.file import read_recipe
from kdlib.cli.recipe.wiring import wire
from kdlib.cli.recipes import recipes
from tests.cli.conftest import Command

FILES = {name: path for name, path in recipes().items() if "/" not in name}
STAGES = [name for name, path in FILES.items() if "stages" in read_yaml(str(path))]
SINGLE = [name for name in FILES if name not in STAGES]
USES = ("draft", "reasoning", "reasoning_run", "jacobi", "dllm", "cross_tokenizer")  # what kdlib is for
PLACES = ("model", "teacher", "dataset_name", "output_dir")  # the user's own: no value of a publication
SCRIPT = recipes()["slurm/two_nodes"]


def command_of(path: Path) -> str:
    """The command that the file's own comment says to type."""
    said = [name for name in re.findall(rf"kdlib (\w+) --config {path.name}", path.read_text()) if name != "plan"]
    assert said, f"{path.name} does not say how it is run"
    return said[0]


def checked(command: str, path: Path) -> Options:
    """The options as the command reads them; ValueError for what it refuses without a model."""
    options = parse(command, "", option_classes(command), ["--config", str(path)])
    assert options is not None
    run = training_run(command)
    if run is None:
        assert options.instances
        return options
    run.check(options)
    run(options, words=[], quiet=True)
    return options


@pytest.mark.parametrize("name", SINGLE)
def test_every_recipe_is_what_its_command_reads(name: str) -> None:
    options = checked(command_of(FILES[name]), FILES[name])
    assert options.config["output_dir"].startswith("runs/")
    assert read_yaml(str(FILES[name])).keys() <= options.config.keys()


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_what_its_command_reads(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(str(FILES[name]))
    assert recipe.output_dir.startswith("runs/")
    for stage in wire(recipe):
        path = tmp_path / f"{stage.name}.yaml"
        path.write_text(yaml.safe_dump(stage.located(tmp_path), sort_keys=False))
        checked(stage.command, path)


def test_the_stages_of_reasoning_go_from_questions_to_gains(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in wire(read_recipe(str(FILES["reasoning_run"])))}
    found = {name: stage.located(tmp_path) for name, stage in stages.items()}
    assert list(stages) == ["generate", "sft", "offline", "on_policy", "evaluate"]
    answers, longest = found["generate"]["max_completion_length"], found["sft"]["max_length"]
    assert found["generate"]["verify"] == "math-verify" and answers + found["generate"]["max_prompt_length"] == longest
    assert found["sft"]["dataset_name"] == found["offline"]["dataset_name"] == str(tmp_path / "generate" / "correct.jsonl")
    assert "teacher" not in found["sft"] and found["offline"]["model"] == str(tmp_path / "sft" / "final")
    assert found["on_policy"]["dataset_name"] == "prompts.jsonl" and found["on_policy"]["on_policy_fraction"] == 1.0
    assert list(found["evaluate"]["compare"]) == ["teacher", "base", "sft", "offline"]
    assert found["evaluate"]["name"] == "on_policy" and found["evaluate"]["max_model_len"] == longest
    text = FILES["reasoning_run"].read_text()
    served = {url for stage in found.values() for url in _urls(stage)}
    assert {url.split(":")[-1].removesuffix("/v1") for url in served} == set(re.findall(r"--port (\d+)", text))
    assert set(re.findall(r"--max-model-len (\d+)", text)) == {str(longest)}


def _urls(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _urls(item)
    elif isinstance(value, str) and value.startswith("http"):
        yield value


@pytest.mark.parametrize("name", FILES)
def test_every_value_has_its_reason_or_source(name: str) -> None:
    """A comment on its line, or right above it; what the abbreviations in them mean stands at the top."""
    lines = FILES[name].read_text().splitlines()
    head, body = _parted(lines)
    assert any("Where values come from:" in line for line in head), "no sources"
    for number, line in enumerate(body):
        option = re.fullmatch(r"\s*(?:- )?(\w+): (.+)", line)
        above = body[number - 1] if number else ""
        if option and option[1] not in (*PLACES, "name"):
            assert "#" in option[2] or above.strip().startswith("#"), line


def _parted(lines: list[str]) -> tuple[list[str], list[str]]:
    """The comments at the top, and what follows."""
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return lines[:first], lines[first:]


@pytest.mark.parametrize("name", USES)
def test_the_recipe_of_a_use_says_what_it_needs_and_what_to_type(name: str) -> None:
    head = " ".join(line.lstrip("# ") for line in _parted(FILES[name].read_text().splitlines())[0])
    assert "Needs:" in head and "GPU" in head and " GB" in head and "disk" in head and "an estimate" in head
    assert f"--config {name}.yaml" in head or f"kdlib run {name}.yaml" in head


@pytest.mark.parametrize("path", recipes().values(), ids=lambda path: path.name)
def test_no_line_is_wider_than_an_editor(path: Path) -> None:
    assert max(len(line) for line in path.read_text().splitlines()) <= 160


def test_generate_answers_more_than_once_and_verifies() -> None:
    built = checked("generate", FILES["generate"]).build(GenerateArguments)
    assert built.num_generations > 1 and built.verify == "math-verify" and built.rollout.engine == "vllm"


def test_yaml_and_scripts_are_listed_and_copied(kdlib: Command, tmp_path: Path) -> None:
    listed = kdlib("recipes", "list")
    assert listed.code == 0 and "Training on two nodes under SLURM" in listed.out and "#!/bin/bash" not in listed.out
    for name, file in (
        ("reasoning_run", "reasoning_run.yaml"),
        ("slurm/two_nodes", "two_nodes.sh"),
        ("accelerate/ddp", "ddp.yaml"),
    ):
        assert kdlib("recipes", "copy", name, str(tmp_path)).code == 0
        assert (tmp_path / file).read_bytes() == recipes()[name].read_bytes()


def test_accelerate_configurations_are_of_what_trainers_take() -> None:
    """ZeRO-3 is refused (check_parallelism), so that no configuration of it can be shipped."""
    kinds = {
        name: read_yaml(str(path))["distributed_type"] for name, path in recipes().items() if name.startswith("accelerate/")
    }
    assert kinds == {"accelerate/ddp": "MULTI_GPU", "accelerate/fsdp2": "FSDP"}


# Stand-ins for a cluster: what they do is written to a log.
PROGRAMS = {
    "srun": '[ "$1" = --overlap ] && shift\nexec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$*" >> "$LOG"; fi',
    "vllm": "trap 'echo served >> \"$LOG\"; exit 143' TERM\nwhile :; do sleep 0.05; done",
    "curl": "sleep 0.1",
    "torchrun": 'trap \'echo saved >> "$LOG"; exit 1\' TERM\necho "$*" >> "$LOG"\nfor _ in $(seq $TICKS); do sleep 0.05; done',
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job whose programs are stand-ins."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    path = f"{tmp_path}:{os.environ['PATH']}"
    return {"PATH": path, "LOG": str(log), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "TICKS": "2"}


def test_the_slurm_script_trains_and_ends_its_servers(cluster: dict[str, str]) -> None:
    assert subprocess.run(["bash", str(SCRIPT), "run.yaml"], env=cluster, timeout=60).returncode == 0
    trained, ended = Path(cluster["LOG"]).read_text().splitlines()
    assert ended == "served" and "-m kdlib distill --config run.yaml --teacher http://127.0.0.1:8000/v1" in trained
    assert "--nnodes 2 --nproc-per-node 4" in trained and "--rdzv-endpoint node1:29500" in trained


def test_the_slurm_script_waits_for_the_checkpoint_and_requeues(cluster: dict[str, str]) -> None:
    job = subprocess.Popen(["bash", str(SCRIPT), "run.yaml"], env={**cluster, "TICKS": "1000"})
    log = Path(cluster["LOG"])
    while not log.read_text():
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 1
    assert log.read_text().splitlines()[1:] == ["saved", "served", "requeue 7"]


def test_the_slurm_script_ends_when_the_teacher_does_not_start(cluster: dict[str, str]) -> None:
    vllm = Path(cluster["LOG"]).with_name("vllm")
    vllm.write_text("#!/bin/bash\nexit 3\n")
    vllm.with_name("curl").write_text("#!/bin/bash\nsleep 5\n")
    assert subprocess.run(["bash", str(SCRIPT), "run.yaml"], env=cluster, timeout=60).returncode != 0
    assert not Path(cluster["LOG"]).read_text()
