"""kdlib generate on a tiny teacher: what it writes is what was drawn, also when it is killed, and trains as it is."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlib.cli.generate import GenerateArguments
from kdlib.cli.help import docs, shown_default
from kdlib.cli.parsing import option_names, parse
from kdlib.cli.recipes import recipes
from kdlib.keys import draw_key
from tests.cli.conftest import Command, conversation, tree, write_rows

# Judges by the completion's length; raises, abstains or ends the process where the test says so.
VERIFIER = """
import os, signal

calls = 0

def even(completion, row):
    global calls
    calls += 1
    if calls == int(os.environ.get("KDLIB_TEST_CALL", "0")):
        os.kill(os.getpid(), int(os.environ["KDLIB_TEST_SIGNAL"]))
    if row["answer"] == "raise":
        raise RuntimeError("no")
    return None if row["answer"] == "abstain" else len(completion) % 2 == 0
"""
DRAWS = {"num_generations": 4, "max_completion_length": 12, "rows_per_shard": 4, "generation_batch_size": 8}
SAME_AGAIN = ("index.json", "correct.jsonl", "incorrect.jsonl")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions, one of them twice, one empty, one too long; and a verifier."""
    root = tmp_path_factory.mktemp("asked")
    rows = [{"question": f"What is {i} plus two?", "answer": str(i + 2)} for i in range(10)]
    rows[3]["answer"], rows[4]["answer"] = "raise", "abstain"
    rows += [rows[0], {"question": "", "answer": "1"}, {"question": "long " * 200, "answer": "1"}]
    write_rows(root / "rows.jsonl", rows)
    (root / "own.py").write_text(VERIFIER)
    return root


@pytest.fixture
def wanted(place: Path, asked: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": place / "teacher",
        "dataset_name": asked / "rows.jsonl",
        "output_dir": tmp_path / "traces",
        "verify": f"{asked / 'own.py'}:even",
        "max_prompt_length": 100,
        "device": "cpu",
        **DRAWS,
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def traces(directory: Path) -> list[dict[str, Any]]:
    return [trace for path in sorted(directory.glob("shard-*.jsonl")) for trace in lines(path)]


def same_files(directory: Path) -> dict[str, bytes]:
    files = [*sorted(directory.glob("shard-*")), *(directory / name for name in SAME_AGAIN)]
    return {path.name: path.read_bytes() for path in files}


def test_the_tokens_are_those_that_were_drawn(kdlib: Command, wanted: dict[str, Any]) -> None:
    done = kdlib("generate", **wanted)
    assert done.code == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(wanted["model"])
    model = AutoModelForCausalLM.from_pretrained(wanted["model"]).eval()
    found = traces(wanted["output_dir"])
    assert len({trace["prompt_id"] for trace in found}) == 10 and len(found) == 40
    changed = 0
    for trace in found:
        prompt = tokenizer.apply_chat_template(trace["prompt"], add_generation_prompt=True, return_dict=False)
        drawn = trace["input_ids"][len(prompt) :]
        assert trace["input_ids"][: len(prompt)] == prompt
        assert trace["labels"] == [-100] * len(prompt) + drawn and trace["tokens"] == len(drawn)
        assert trace["completion"] == tokenizer.decode(drawn, skip_special_tokens=True)
        assert trace["messages"] == [*trace["prompt"], {"role": "assistant", "content": trace["completion"]}]
        ended = drawn[-1] == tokenizer.eos_token_id
        assert trace["finish"] == ("stop" if ended else "length") and (ended or len(drawn) == 12)
        assert tokenizer.eos_token_id not in drawn[:-1]
        changed += tokenizer.encode(trace["completion"], add_special_tokens=False) != drawn
        with torch.no_grad():
            logp = model(torch.tensor([trace["input_ids"]])).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(trace["input_ids"]) - 1)
        assert trace["logp_sum"] == pytest.approx(logp[at, drawn].sum().item(), abs=1e-3)
    assert changed > 10, "tokenising the text again would give other tokens, or this test says nothing"


def test_greedy_completions_are_those_of_transformers(kdlib: Command, wanted: dict[str, Any]) -> None:
    options = {name: value for name, value in wanted.items() if name != "verify"} | {"num_generations": 1}
    options["rollout.temperature"] = 0
    assert kdlib("generate", **options).code == 0
    model = AutoModelForCausalLM.from_pretrained(wanted["model"]).eval()
    for trace in traces(wanted["output_dir"]):
        ids = torch.tensor([trace["input_ids"][: -trace["tokens"]]])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert expected[0].tolist() == trace["input_ids"] and trace["correct"] is None


def test_killed_and_started_again_the_files_are_the_same(
    kdlib: Command, wanted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {**wanted, "output_dir": tmp_path / "whole"}
    assert kdlib("generate", **whole).code == 0
    expected = same_files(tmp_path / "whole")

    # batches are of two prompts: shard 0 is whole, of shard 1 one batch is, and the next is being judged
    killed = {"KDLIB_TEST_CALL": "29", "KDLIB_TEST_SIGNAL": str(int(signal.SIGKILL))}
    words = [word for name, value in wanted.items() for word in (f"--{name}", str(value))]
    call = subprocess.run(
        [sys.executable, "-m", "kdlib", "generate", *words], env={**os.environ, **killed}, capture_output=True
    )
    assert call.returncode == -signal.SIGKILL, call.stderr.decode()
    left = wanted["output_dir"]
    names = {path.name for path in left.iterdir()}
    assert names == {"index.json", "metrics.jsonl", "shard-00000.jsonl", "shard-00001.partial.jsonl"}
    with (left / "shard-00001.partial.jsonl").open("ab") as partial:
        partial.write(b'{"traces": [{"prompt')  # as if it had been writing
    with (left / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'{"shard": 1, "pro')

    # stopped twice more, within the process
    monkeypatch.setenv("KDLIB_TEST_CALL", "3")
    for number in (signal.SIGTERM, signal.SIGINT):
        monkeypatch.setenv("KDLIB_TEST_SIGNAL", str(int(number)))
        handler = signal.getsignal(number)
        stopped = kdlib("generate", **wanted)
        assert stopped.code == 128 + number and stopped.err.splitlines()[-1] == "stopped; the same command continues"
        assert signal.getsignal(number) is handler
    monkeypatch.delenv("KDLIB_TEST_CALL")

    again = kdlib("generate", **wanted)
    assert again.code == 0 and "1 shards are there already" in again.err
    assert same_files(left) == expected
    assert json.loads((left / "report.json").read_text())["tokens"] == sum(t["tokens"] * t["count"] for t in traces(left))

    assert len(lines(left / "metrics.jsonl")) == 5, "no batch was answered twice"

    before = tree(left)
    finished = kdlib("generate", **wanted)
    assert finished.code == 0 and tree(left) == before


def test_report_and_files_say_what_the_traces_say(kdlib: Command, wanted: dict[str, Any]) -> None:
    done = kdlib("generate", **wanted)
    directory = wanted["output_dir"]
    found, report = traces(directory), json.loads((directory / "report.json").read_text())
    for name, verdict in (("correct", True), ("incorrect", False)):
        judged = [
            {key: value for key, value in line.items() if key != "difficulty"} for line in lines(directory / f"{name}.jsonl")
        ]
        assert judged == [trace for trace in found if trace["correct"] is verdict]
    assert all((len(t["completion"]) % 2 == 0) is t["correct"] for t in found if t["correct"] is not None)

    assert report["prompts"] == 10 and report["duplicate_prompts"] == 1
    assert report["skipped_prompts"] == {"an empty prompt": 1, "the prompt is longer than 100 tokens": 1}
    assert report["completions"] == 40 and report["traces"] == len(found)
    assert report["verdicts"]["not judged"] == 8
    assert report["not_judged"] == {"the verifier raised RuntimeError": 4, "the verifier gave no verdict": 4}
    by_prompt: dict[int, list[bool]] = {}
    for trace in found:
        if trace["correct"] is not None:
            by_prompt.setdefault(trace["prompt_id"], []).extend([trace["correct"]] * trace["count"])
    assert report["pass_at"].keys() == {"1", "2", "4"}
    for k in (1, 2, 4):  # over every choice of k of a prompt's completions
        chances = [statistics.fmean(map(any, itertools.combinations(judged, k))) for judged in by_prompt.values()]
        row = report["pass_at"][str(k)]
        assert row["value"] == pytest.approx(statistics.fmean(chances)) and row["problems"] == 8
        if 0 < row["value"] < 1:
            half = 1.96 * statistics.stdev(chances) / 8**0.5
            assert (row["low"], row["high"]) == pytest.approx((row["value"] - half, row["value"] + half))
    lengths = [trace["tokens"] for trace in found for _ in range(trace["count"])]
    assert report["lengths"]["all"]["mean"] == pytest.approx(statistics.fmean(lengths))
    assert report["lengths"]["all"]["median"] == statistics.median_low(lengths)
    assert report["clipped_ratio"] == pytest.approx(
        statistics.fmean(t["finish"] == "length" for t in found for _ in range(t["count"]))
    )
    assert report["tokens"] == report["generated_tokens"] == sum(lengths)
    assert report["tokens_per_second"] == pytest.approx(report["generated_tokens"] / report["seconds"])

    page = (directory / "report.html").read_text()
    assert f"{report['pass_at']['1']['value']:.3f}" in page and "the verifier raised RuntimeError" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained
    assert f"kdlib distill --dataset_name {directory / 'correct.jsonl'} --model STUDENT" in done.out


def test_identical_completions_are_one_trace_and_a_prompts_draws_are_its_own(
    kdlib: Command, wanted: dict[str, Any], tmp_path: Path, asked: Path
) -> None:
    """At a temperature near 0 all draws of a prompt are the same; order and neighbours of prompts change none."""
    cold = {**wanted, "rollout.temperature": 1e-4, "output_dir": tmp_path / "cold"}
    assert kdlib("generate", **cold).code == 0
    assert [trace["count"] for trace in traces(tmp_path / "cold")] == [4] * 10
    report = json.loads((tmp_path / "cold" / "report.json").read_text())
    assert (report["completions"], report["traces"], report["duplicate_completions"]) == (40, 10, 30)

    assert kdlib("generate", **wanted).code == 0
    rows = write_rows(tmp_path / "other.jsonl", lines(asked / "rows.jsonl")[9:4:-1])
    other = {**wanted, "dataset_name": rows, "output_dir": tmp_path / "other", "generation_batch_size": 100}
    assert kdlib("generate", **other).code == 0
    first = {(t["prompt_id"], t["generation"]): t["input_ids"] for t in traces(wanted["output_dir"])}
    second = {(t["prompt_id"], t["generation"]): t["input_ids"] for t in traces(tmp_path / "other")}
    assert len(second) == 20 and all(first[key] == ids for key, ids in second.items())


def test_empty_completions_are_counted_and_count_as_wrong(
    kdlib: Command, wanted: dict[str, Any], tmp_path: Path, place: Path
) -> None:
    """A teacher that ends at once: its completions are no traces, and the run goes on."""
    model = AutoModelForCausalLM.from_pretrained(place / "teacher")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    silent = tmp_path / "silent"
    model.save_pretrained(silent)
    AutoTokenizer.from_pretrained(place / "teacher").save_pretrained(silent)
    # all tokens are equally likely; the likeliest is then the first, and the first is made a stop token
    (silent / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    done = kdlib("generate", **{**wanted, "model": silent, "rollout.temperature": 0, "num_generations": 1})
    assert done.code == 0, done.err
    report = json.loads((wanted["output_dir"] / "report.json").read_text())
    assert report["skipped_completions"] == {"an empty completion": 10} and report["traces"] == 0
    assert report["tokens"] == 10 and report["pass_at"]["1"]["value"] == 0 and report["pass_at"]["1"]["problems"] == 10
    assert "no completion is correct" in done.out


def test_changed_settings_are_named_and_overwrite_starts_anew(kdlib: Command, wanted: dict[str, Any], tmp_path: Path) -> None:
    assert kdlib("generate", **wanted).code == 0
    before = tree(wanted["output_dir"])
    changed = kdlib("generate", **{**wanted, "rollout.temperature": 0.5, "num_generations": 2})
    assert changed.code == 2 and changed.err.count("\n") == 1
    assert all(
        text in changed.err for text in ("rollout.temperature: 1.0 -> 0.5", "num_generations: 4 -> 2", "--overwrite true")
    )
    rows = write_rows(tmp_path / "fewer.jsonl", lines(wanted["dataset_name"])[:-4])
    fewer = kdlib("generate", **{**wanted, "dataset_name": rows})
    assert fewer.code == 2 and "prompts: " in fewer.err
    own = tmp_path / "own.py"
    own.write_text(VERIFIER)
    assert kdlib("generate", **{**wanted, "verify": f"{own}:even", "output_dir": tmp_path / "own"}).code == 0
    own.write_text(VERIFIER + "# changed")
    edited = kdlib("generate", **{**wanted, "verify": f"{own}:even", "output_dir": tmp_path / "own"})
    assert edited.code == 2 and "verifier_file: " in edited.err
    assert tree(wanted["output_dir"]) == before
    assert kdlib("generate", "--overwrite", **{**wanted, "num_generations": 2}).code == 0
    assert sum(trace["count"] for trace in traces(wanted["output_dir"])) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "nothing"}, "no verifier nothing: choose exact_number, math-verify, or file.py:function"),
        ({"verify": "exact_number", "answer_column": "solution"}, "name theirs with --answer_column"),
        ({"verify": "absent.py:even"}, "no file absent.py"),
        ({"rollout.temperature": 0}, "add --num_generations 1"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"model": "./absent"}, "no tokenizer at ./absent"),
        ({"max_prompt_length": 3}, "no row has a usable prompt"),
        ({"rollout.temprature": 0.5}, "rollout.temprature"),
        ({"rollout.engine": "vllm"}, "device: for rollout.engine hf, not vllm"),
        (
            {"model": "http://127.0.0.1:9/v1", "rollout.url": "http://127.0.0.1:8/v1", "rollout.engine": "server"},
            "are two servers",
        ),
        ({"model": "http://127.0.0.1:9/v1"}, "device: for rollout.engine hf, not server"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    kdlib: Command, wanted: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    done = kdlib("generate", **{**wanted, **options})
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert not wanted["output_dir"].exists()


def test_every_draw_has_a_seed_of_its_own() -> None:
    seeds = {draw_key(seed, prompt, i) for seed in range(5) for prompt in (0, 1, 2**63 - 1) for i in range(5)}
    assert len(seeds) == 75 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("rows", ["correct.jsonl", "shard-*.jsonl"])
def test_a_student_trains_on_the_traces(kdlib: Command, wanted: dict[str, Any], options: dict[str, Any], rows: str) -> None:
    assert kdlib("generate", **wanted).code == 0
    kept = lines(wanted["output_dir"] / rows) if "*" not in rows else traces(wanted["output_dir"])
    training = {name: value for name, value in options.items() if name != "teacher"}
    training |= {"dataset_name": wanted["output_dir"] / rows, "objective": "CrossEntropy", "max_steps": 1}
    done = kdlib("distill", **training)
    assert done.code == 0, done.err
    plan = json.loads((options["output_dir"] / "plan.json").read_text())
    assert plan["rows"] == len(kept) and plan["scored_tokens_per_epoch"] == sum(trace["tokens"] for trace in kept)


def test_messages_and_the_package_verifiers(kdlib: Command, wanted: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**conversation(f"What is {i} plus two?", f"It is {i + 2}."), "solution": f"${i + 2}$"} for i in range(2)]
    shared = {**wanted, "dataset_name": write_rows(tmp_path / "chat.jsonl", rows), "answer_column": "solution"}
    for verify in ("exact_number", "math-verify"):
        done = kdlib("generate", **{**shared, "verify": verify, "output_dir": tmp_path / verify})
        assert done.code == 0, done.err
        found = traces(tmp_path / verify)
        assert all(trace["correct"] is not None and len(trace["prompt"]) == 1 for trace in found)
        assert {trace["answer"] for trace in found} == {"$2$", "$3$"}


def test_an_unreachable_server_is_one_line_with_the_command_that_starts_one(kdlib: Command, wanted: dict[str, Any]) -> None:
    options = {name: value for name, value in wanted.items() if name != "device"}
    done = kdlib("generate", **{**options, "model": "http://127.0.0.1:9/v1"})
    assert done.code == 2 and done.err.count("\n") == 1
    assert "no vLLM server answers at http://127.0.0.1:9" in done.err and "--logprobs-mode processed_logprobs" in done.err


def test_the_documented_defaults_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `--(\w+)` \| (.*?) ?\| .+ \|$", page, flags=re.MULTILINE))
    assert rows == {name: shown_default(GenerateArguments, name) for name in docs(GenerateArguments)}
    assert set(option_names(GenerateArguments)) == set(rows)


def test_the_recipe_is_a_configuration_that_parses() -> None:
    options = parse("generate", "", [GenerateArguments], ["--config", str(recipes()["generate"])])
    assert options is not None and options.build(GenerateArguments).rollout.engine == "vllm"
