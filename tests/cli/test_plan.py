"""``kdlib plan distill | jacobi | diffusion``: what is said of a run before it, as users ask for it."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdlib.cli.help import docs
from kdlib.cli.planning.command import PlanArguments
from kdlib.cli.planning.disk import cache_bytes
from kdlib.cli.planning.known import known_config
from kdlib.cli.planning.models import on_meta
from kdlib.cli.planning.recipe import command_of
from kdlib.cli.planning.text import duration, parsed_size, size
from kdlib.cli.recipes import recipes
from kdlib.data.cache import CacheIndex
from kdlib.models import parameter_count
from tests.cli.conftest import Command

DOCS = Path(__file__).parents[2] / "docs"
Options = dict[str, Any]


@pytest.fixture
def planned(kdlib: Command, options: Options, tmp_path: Path) -> Any:
    """``planned("jacobi", use_peft="true")``: the plan of that command with more options; exit code 0."""

    def plan(command: str = "distill", *words: str, **more: Any) -> Options:
        given = {**options, **more}
        file = tmp_path / "plan.json"
        outcome = kdlib("plan", command, *words, output_path=file, **{k: v for k, v in given.items() if v is not None})
        assert outcome.code == 0, outcome.err
        found: Options = json.loads(file.read_text())
        assert found["memory"] is not None, found["not_planned"]
        return {**found, "shown": outcome.out}

    return plan


def parameters(place: Path, name: str) -> int:
    return sum(x.numel() for x in load_file(place / name / "model.safetensors").values())


def test_a_plan_counts_parameters_bytes_rows_and_steps(planned: Any, place: Path, options: Options) -> None:
    found = planned(max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2)
    student, teacher = parameters(place, "student"), parameters(place, "teacher")
    assert found["student_parameters"] == found["trainable_parameters"] == student
    assert found["teacher_parameters"] == teacher and found["teacher_bytes"] == 4 * teacher
    assert found["rows"] == 16 and found["optimizer_steps"] == 2 * 3
    update = found["memory"]["phases"]["update"]
    assert update["gradients"] == 4 * student and update["optimizer"] == 8 * student
    assert found["disk"]["parts"]["a checkpoint"] == 12 * student and found["disk"]["parts"]["final/"] == 4 * student
    assert found["disk"]["parts"]["checkpoints at once"] == 3 * 12 * student  # two are kept, a third is being written
    assert not Path(options["output_dir"]).exists(), "a plan leaves nothing"
    assert "student" in found["shown"] and "bytes on a device" in found["shown"] and "--measure" in found["shown"]


def test_a_plan_needs_no_weights(planned: Any, place: Path, tmp_path: Path) -> None:
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        for file in (place / name).iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    assert planned(model=tmp_path / "student", teacher=tmp_path / "teacher")["memory"] == planned()["memory"] | {
        "free": pytest.approx(planned()["memory"]["free"], rel=0.5)
    }


def needed(found: Options, part: str | None = None) -> int:
    training = found["memory"]["phases"]["training"]
    return int(sum(training.values()) if part is None else training.get(part, 0))


def test_options_change_what_they_should(planned: Any) -> None:
    plain = planned()
    assert needed(planned(gradient_checkpointing="true"), "activations") < needed(plain, "activations")
    assert needed(planned(per_device_train_batch_size=8), "activations") > 1.5 * needed(plain, "activations")
    adapted = planned(use_peft="true", lora_r=2)
    assert needed(adapted, "optimizer") < needed(plain, "optimizer") / 5
    assert adapted["adapter_modules"]["q_proj"] == 2
    assert needed(planned(optim="sgd"), "optimizer") == 0
    assert needed(planned(attn_implementation="eager"), "activations") > needed(plain, "activations")
    assert needed(planned(teacher=None, objective="CrossEntropy"), "teacher") == 0


def test_what_glibc_keeps_is_told_apart(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = planned()["memory"]["phases"]
    if platform.libc_ver()[0] == "glibc":
        assert phases["training"]["kept by glibc"] > 0 and phases["writing final/"]["kept by glibc"] > 0
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    assert all("kept by glibc" not in parts for parts in planned()["memory"]["phases"].values())


def test_several_processes(planned: Any) -> None:
    alone, both = planned(max_steps=-1), planned(max_steps=-1, num_processes=2)
    assert both["processes"] == 2 and both["optimizer_steps"] == alone["optimizer_steps"] / 2
    assert needed(both, "buckets of DDP") == both["gradient_bytes"]
    sharded = planned(num_processes=4, accelerate_config="fsdp2")
    assert needed(sharded, "optimizer") == needed(alone, "optimizer") // 4
    assert needed(sharded, "gathered by FSDP") > 0


def test_quantised_weights_are_counted_as_such(planned: Any) -> None:
    whole, quantised = (planned(use_peft="true", **more) for more in ({}, {"load_in_4bit": "true"}))
    assert needed(quantised, "student") < 0.75 * needed(whole, "student")  # embeddings, head and adapter stay


def test_rows_that_are_not_there_yet(planned: Any) -> None:
    found = planned(dataset_name=None, rows=1000, tokens_per_row=100, max_steps=-1, max_length=64, num_train_epochs=1)
    assert found["rows"] == 1000 and found["optimizer_steps"] == 250 and found["tokens_per_epoch"] == 64_000
    assert found["memory"]["longest_row"] == 64 and found["assumed"] == ["1,000 rows of 100 tokens"]


@pytest.mark.parametrize(("signal", "said"), [("hidden", "hidden states"), ("topk", "64 log-probs"), ("auto", "64 log-probs")])
def test_a_served_teacher_is_not_asked(planned: Any, signal: str, said: str) -> None:
    found = planned(teacher="http://127.0.0.1:9/v1", signal=signal)
    assert said in found["assumed"][0] and (needed(found, "teacher") > 0) == (signal == "hidden")


def test_a_cached_teacher_takes_no_memory_and_the_disk_that_was_said(
    planned: Any, kdlib: Command, place: Path, tmp_path: Path
) -> None:
    plain = planned()
    [(what, said)] = plain["disk"]["instead"].items()
    cache = {"teacher": place / "teacher", "dataset_name": place / "rows.jsonl", "output_dir": tmp_path / "cache"}
    assert kdlib("cache", **cache).code == 0
    written = CacheIndex.load(tmp_path / "cache").summary
    assert f"{cache_bytes(384)} bytes a token" in what
    assert said == pytest.approx(written["bytes"], rel=0.1)  # beside it: sample ids and headers
    found = planned(teacher=tmp_path / "cache")
    assert needed(found, "teacher") == 0 and needed(found) < needed(plain)


def test_rollouts_have_a_phase_of_their_own(planned: Any) -> None:
    more = {"on_policy_fraction": 1.0, "max_completion_length": 32, "objective": "ReverseKL"}
    found = planned(**more)
    cache = found["memory"]["phases"]["rollouts"]["key-value cache"]
    row = found["memory"]["longest_row"]
    # rows, tokens, keys and values, layers, heads x width, float32
    assert cache == pytest.approx(4 * row * 2 * 2 * (2 * 8) * 4, rel=0.05)
    twice = planned(**more, gradient_accumulation_steps=2)["memory"]["phases"]["rollouts"]["key-value cache"]
    assert twice == pytest.approx(2 * cache, rel=0.05)
    assert found["completions_per_step"] == 4


def test_jacobi_and_diffusion_are_planned_with_the_rows_they_make(planned: Any) -> None:
    plain = needed(planned(teacher=None, objective="CrossEntropy"), "activations")
    jacobi = planned("jacobi", teacher=None, block_size=8)
    assert needed(jacobi, "activations") > 1.3 * plain  # the states of the text stand beside it
    diffusion = planned("diffusion", teacher=None, mask_token="<|mask|>", shift="true")
    assert needed(diffusion, "activations") > 0.5 * plain


def test_a_missing_byte_is_refused_with_the_options_that_help(kdlib: Command, options: Options) -> None:
    refused = kdlib("plan", "distill", **options, memory="700MiB", disk="1KB")
    assert refused.code == 2 and "bytes on a device" in refused.out
    line = refused.err.strip().splitlines()[-1]
    assert "of memory, 700 MiB are there" in line and "per_device_train_batch_size 1 with gradient_accumulation_steps 4" in line
    assert "of disk, 1.0 KiB are there" in line and "save_strategy no" in line
    savings = re.findall(r"saves ([\d.]+ \w+)", line)
    assert len(savings) >= 4
    enough = kdlib("plan", "distill", **options, memory="64GiB", disk="64GiB")
    assert enough.code == 0


def test_a_saving_is_what_the_plan_with_that_option_says(planned: Any, kdlib: Command, options: Options) -> None:
    plain, smaller = (planned(**more)["memory"]["needed"] for more in ({}, {"gradient_checkpointing": "true"}))
    file = Path(options["output_dir"]).with_name("refused.json")
    assert kdlib("plan", "distill", **options, memory="1MiB", output_path=file).code == 2
    helps = json.loads(file.read_text())["memory"]["helps"]
    assert helps["gradient_checkpointing true"] == plain - smaller > 0


def test_options_are_checked_as_the_command_checks_them(kdlib: Command, options: Options) -> None:
    assert "did you mean gradient_checkpointing?" in kdlib("plan", "distill", **options, gradient_checkpointin="true").err
    assert "did you mean distill" in kdlib("plan", "distil").err
    assert "give both" in kdlib("plan", **options, rows=5).err
    assert "no size" in kdlib("plan", **options, memory="much").err
    assert "needs a teacher" in kdlib("plan", **{**options, "teacher": "null"}).err
    assert "does not exist" in kdlib("plan", **{**options, "model": options["dataset_name"].parent / "nothing"}).err


def test_a_run_prints_its_plan_first_and_keeps_it(kdlib: Command, options: Options, planned: Any) -> None:
    said = planned()
    ran = kdlib("distill", **options)
    assert ran.code == 0, ran.err
    first, second = ran.err.splitlines()[:2]
    assert "384 rows" not in first and "16 rows" in first and second.startswith("memory ")
    kept = json.loads((options["output_dir"] / "plan.json").read_text())
    assert kept["memory"]["phases"] == said["memory"]["phases"] and kept["optimizer_steps"] == 2


def test_measured_steps_give_a_time(planned: Any, options: Options, place: Path) -> None:
    found = planned("distill", "--measure", max_steps=1000, eval_dataset_name=place / "rows.jsonl", save_steps=100)
    time = found["time"]
    assert time["seconds"] == pytest.approx(sum(time["parts"].values()))
    assert time["parts"]["training"] == pytest.approx(1000 * time["seconds_per_step"])
    assert time["memory_measured"] > 100 * 2**20 and "tokens/s" in found["shown"]
    assert not Path(options["output_dir"]).exists()


def test_steps_that_fail_say_why(kdlib: Command, options: Options) -> None:
    failed = kdlib("plan", "distill", "--measure", **{**options, "learning_rate": 1e30})
    assert failed.code == 2 and "the steps to be timed failed" in failed.err


def test_sizes_and_durations() -> None:
    assert parsed_size("80GiB", option="x") == 80 * 2**30 and parsed_size("24 GB", option="x") == 24 * 10**9
    assert parsed_size("5", option="x") == 5 and parsed_size("1.5kib", option="x") == 1536
    assert (size(0), size(1536), size(80 * 2**30), size(-3 * 2**20)) == ("0 B", "1.5 KiB", "80 GiB", "-3.0 MiB")
    assert (duration(3), duration(100), duration(7200), duration(3 * 86400)) == ("3.0 s", "1.7 min", "2.0 h", "3.0 days")


def test_the_page_has_every_option() -> None:
    page = (DOCS / "plan.md").read_text(encoding="utf-8")
    assert all(f"`--{name}`" in page for name in docs(PlanArguments))


def test_bytes_of_a_cached_token() -> None:
    assert cache_bytes(151_936) == 266 and cache_bytes(32_000) == 64 * 4 + 2


PUBLISHED = {  # what the models' own pages and indexes say
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "GSAI-ML/LLaDA-8B-Instruct": 8_015_581_184,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_the_published_number_of_parameters(name: str) -> None:
    config = known_config(name)
    assert config is not None
    assert parameter_count(on_meta(config, dtype=torch.bfloat16, attn_implementation=None)) == PUBLISHED[name]


def test_a_model_that_recipes_name_is_planned_without_its_files(planned: Any) -> None:
    found = planned(model="Qwen/Qwen3-0.6B", teacher="http://127.0.0.1:9/v1", dataset_name=None, rows=64, tokens_per_row=16)
    assert found["student_parameters"] == PUBLISHED["Qwen/Qwen3-0.6B"] and found["rows"] == 64


AT_SIZE = ("--rows", "10000", "--device", "cuda", "--memory", "80GiB", "--disk", "2TB")
RECIPES = {  # what is longest in them, and what stands for models that other commands make first
    "draft": (2048, {}),
    "reasoning": (4096, {}),
    "jacobi": (1024, {"use_peft": "true"}),
    "dllm_llada": (384, {}),
    "cross_tokenizer": (1024, {}),
    "reasoning_run": (17408, {}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_fit_the_devices_that_they_are_for(kdlib: Command, name: str) -> None:
    length, more = RECIPES[name]
    done = kdlib("plan", str(recipes()[name]), *AT_SIZE, tokens_per_row=length, **more)
    assert done.code == 0, done.err
    stages = ["sft", "offline", "on_policy"] if name == "reasoning_run" else [""]
    assert all(f"stage {stage}: kdlib distill" in done.out for stage in stages if stage)
    found = re.findall(r"^memory (\d+) GiB.* of 80 GiB free", done.out, re.MULTILINE)
    assert len(found) == len(stages) and all(1 < int(size) < 80 for size in found)


def test_a_recipe_that_does_not_fit_names_its_stage(kdlib: Command) -> None:
    done = kdlib("plan", str(recipes()["reasoning_run"]), *AT_SIZE, tokens_per_row=17408, memory="24GiB")
    assert done.code == 2
    assert "stage sft: the run needs" in done.err and "stage on_policy: the run needs" in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "command"),
    [
        ({"model": "m"}, "distill"),
        ({"reference": "m"}, "draft"),
        ({"window_size": 4, "evaluate": {}}, "jacobi"),
        ({"masking": "blocks"}, "diffusion"),
    ],
)
def test_the_command_of_a_file_is_told_by_its_options(content: Options, command: str) -> None:
    assert command_of(content) == command


def test_a_draft_made_of_its_target_is_planned_by_a_model_of_its_shape(kdlib: Command) -> None:
    done = kdlib("plan", str(recipes()["draft_eagle3"]), *AT_SIZE, tokens_per_row=512)
    assert done.code == 2 and "a path or Hub id" in done.err
