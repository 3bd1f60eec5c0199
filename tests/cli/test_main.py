"""Choosing a command, exit codes, one line per mistake, and a quick start."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import kdlib as package
from kdlib.cli.arguments import AdapterArguments, LaunchArguments, RunArguments
from kdlib.cli.diffusion import DiffusionRun
from kdlib.cli.launch import launcher
from kdlib.cli.main import COMMANDS
from kdlib.cli.parsing import parse
from kdlib.cli.recipes import recipes
from kdlib.cli.scoring import ScoringArguments
from kdlib.decoding.strategies import strategy_of
from kdlib.objectives.diffusion import DiffusionObjective
from kdlib.trainers.config import DistillationConfig
from tests.cli.conftest import Command

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "lm_eval", "accelerate")


def test_without_a_command_the_usage_names_all(kdlib: Command) -> None:
    asked, bare = kdlib("--help"), kdlib()
    assert asked.code == 0 and bare.code == 2 and asked.out == bare.out
    assert all(f"  {name} " in asked.out for name in COMMANDS)
    assert asked.err == ""


def test_every_command_is_there_and_has_help(kdlib: Command) -> None:
    for name in COMMANDS:
        assert callable(import_module(f"kdlib.cli.{name}").run)
        assert kdlib(name, "--help").code == 0


def test_an_unknown_command_is_one_line_and_2(kdlib: Command) -> None:
    outcome = kdlib("train")
    assert outcome.code == 2
    assert outcome.err == f"kdlib: no command 'train': choose {', '.join(COMMANDS)}\n"


def test_version(kdlib: Command) -> None:
    assert kdlib("--version").out == f"kdlib {package.__version__}\n"


def test_env_names_versions_and_devices(kdlib: Command) -> None:
    outcome = kdlib("env")
    assert outcome.code == 0
    assert all(word in outcome.out for word in ("kdlib", package.__version__, "torch", "transformers", "devices"))
    assert kdlib("env", "--all").code == 2


def test_an_error_of_the_system_is_one_line_too(kdlib: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = kdlib("recipes", "copy", "lora", str(tmp_path / "file" / "below"))
    assert outcome.code == 2
    assert outcome.err == f"kdlib recipes: Not a directory: {tmp_path / 'file' / 'below'}\n"


def test_debug_shows_the_whole_traceback(kdlib: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDLIB_DEBUG", "1")
    with pytest.raises(ValueError, match="no recipe"):
        kdlib("recipes", "copy", "nothing")


def test_recipes_are_listed_and_copied_but_never_over_a_file(kdlib: Command, tmp_path: Path) -> None:
    listed = kdlib("recipes", "list")
    assert listed.code == 0 and all(name in listed.out for name in recipes())
    assert kdlib("recipes", "copy", "lora", str(tmp_path)).code == 0
    (tmp_path / "lora.yaml").write_text("mine")
    again = kdlib("recipes", "copy", "lora", str(tmp_path))
    assert again.code == 2 and "exists" in again.err
    assert (tmp_path / "lora.yaml").read_text() == "mine"


OTHER_COMMANDS = ("accelerate/", "slurm/", "generate", "draft", "jacobi", "diffusion", "dllm", "reasoning_")
DIFFUSION = [file for name, file in recipes().items() if name.startswith(("diffusion", "dllm"))]
EXAMPLE = Path(__file__).parents[2] / "examples" / "dllm.yaml"


DISTILL = [file for name, file in recipes().items() if not name.startswith(OTHER_COMMANDS)]


@pytest.mark.parametrize("file", [*DISTILL, EXAMPLE.with_name("sinkhorn.yaml")], ids=lambda file: file.stem)
def test_every_recipe_is_a_configuration_that_parses(file: Path) -> None:
    classes = [RunArguments, AdapterArguments, ScoringArguments, LaunchArguments, DistillationConfig]
    options = parse("distill", "", classes, ["--config", str(file)])
    assert options is not None and options.config["output_dir"].startswith("runs/")


@pytest.mark.parametrize("file", [*DIFFUSION, EXAMPLE], ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_diffusion_recipe_is_a_configuration_that_parses(file: Path) -> None:
    options = parse("diffusion", "", DiffusionRun.classes(), ["--config", str(file)])
    assert options is not None and options.config["output_dir"].startswith("runs/")
    DiffusionRun.check(options)
    run = DiffusionRun(options, words=[], quiet=True)
    assert isinstance(run.arguments.objective, DiffusionObjective)
    strategy_of(run.arguments.decoding.strategy)


PUBLISHED = {  # rows of a step, rank, learning rate, epochs, weight of the certainty
    "dllm_llada": (64, 128, 2e-5, 6, 2.0),
    "dllm_dream": (64, 32, 2e-5, 3, 1.0),
    "dllm_d3llm": (64, 256, 2e-5, 6, 2.0),
    "dllm_d3llm_dream": (64, 256, 2e-5, 3, 1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_numbers(name: str) -> None:
    """A step's rows: per_device_train_batch_size x gradient_accumulation_steps x the GPUs of the command in the file."""
    text = recipes()[name].read_text()
    options = parse("diffusion", "", DiffusionRun.classes(), ["--config", str(recipes()[name])])
    assert options is not None
    c = options.config
    gpus = int(text.partition("--num_processes ")[2].split()[0])
    rows = c["per_device_train_batch_size"] * c["gradient_accumulation_steps"] * gpus
    objective = c["objective"]["CertaintyForcing"]
    assert (rows, c["lora_r"], c["learning_rate"], c["num_train_epochs"], objective["weight"]) == PUBLISHED[name]
    assert c["lora_alpha"] == c["lora_r"] and len(c["lora_target_modules"]) == 7
    assert objective["temperature"] == 0.5 and c["weight_decay"] == 0.01


def test_several_processes_start_by_torchrun_and_configurations_by_name(tmp_path: Path) -> None:
    assert launcher(LaunchArguments(num_processes=2))[0] == "torch.distributed.run"
    how = launcher(LaunchArguments(num_processes=4, accelerate_config="fsdp2"))
    assert how[:4] == ["accelerate.commands.launch", "--num_processes", "4", "--config_file"]
    assert Path(how[4]) == recipes()["accelerate/fsdp2"]
    own = tmp_path / "own.yaml"
    own.write_text("num_processes: 2\n")
    assert launcher(LaunchArguments(accelerate_config=str(own)))[1:] == ["--config_file", str(own)]
    with pytest.raises(ValueError, match="give ddp, fsdp2, or a YAML file"):
        launcher(LaunchArguments(accelerate_config="nothing"))


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["--help"], set()),
        (["recipes", "list"], set()),
        (["evaluate", "--help"], set()),
        (["cache", "--help"], set()),
        (["evaluate", "--model", "x"], set()),
        (["env"], {"torch"}),
    ],
    ids=" ".join,
)
def test_what_needs_no_library_imports_none(words: list[str], allowed: set[str]) -> None:
    code = f"""
import sys
from kdlib.cli.main import main
main({words!r})
print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].removeprefix("loaded:").split()
    assert set(loaded) <= allowed
