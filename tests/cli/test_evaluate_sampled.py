"""kdlib evaluate on problems and on several models: what it scores is what was drawn, kept, compared, and continued."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from kdlib.cli.evaluate import EvaluateArguments
from kdlib.cli.evaluation.asked import EngineArguments
from kdlib.cli.evaluation.judged import judged
from kdlib.cli.evaluation.sampled import SampledArguments
from kdlib.cli.generation.loop import EMPTY, UNUSABLE
from kdlib.cli.help import docs, shown_default
from kdlib.data.traces import Batch, Skipped, TraceWriter, read_prompts
from kdlib.verifiers import ExactNumber
from tests.cli.conftest import Command, tree, write_rows
from tests.cli.test_docs import DOCS, rows
from tests.tiny import tiny_tokenizer

N, LIMIT = 4, 12
# Judges by the completion's length; raises for some rows, and for all where the file says so.
VERIFIER = """
BROKEN = {broken}

def even(completion, row):
    if BROKEN or row["answer"] == "raise":
        raise KeyError("no")
    return len(completion) % 2 == 0
"""
# Ends the process, as the system would, when the last but one batch is on disk.
STOPS = """
import os, signal, sys
from kdlib.data.traces import TraceWriter
append, calls = TraceWriter.append, []

def stopping(self, shard, batch):
    append(self, shard, batch)
    calls.append(shard)
    if len(calls) == int(os.environ["KDLIB_TEST_BATCH"]):
        os.kill(os.getpid(), signal.SIGKILL)

TraceWriter.append = stopping
from kdlib.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["two", "four"]
doc_to_target: {target}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten problems, one of them twice, one empty; two tasks; a verifier that raises for a problem, and a broken one."""
    root = tmp_path_factory.mktemp("problems")
    problems = [{"question": f"What is {i} plus two?", "answer": str(i + 2)} for i in range(10)]
    problems[3]["answer"] = "raise"
    write_rows(root / "sums.jsonl", [*problems, problems[0], {"question": "", "answer": "1"}])
    for target, name in enumerate(("first", "second")):
        (root / f"{name}.yaml").write_text(TASK.format(name=name, data=root / "sums.jsonl", target=target))
    (root / "own.py").write_text(VERIFIER.format(broken=False))
    return root


@pytest.fixture
def wanted(place: Path, asked: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": place / "student",
        "problems": asked / "sums.jsonl",
        "verify": f"{asked / 'own.py'}:even",
        "n": N,
        "pass_at": "1,2",
        "max_completion_length": LIMIT,
        "generation_batch_size": 8,
        "output_path": tmp_path / "scores",
        "device": "cpu",
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def traces(directory: Path) -> list[dict[str, Any]]:
    return [trace for path in sorted((directory / "problems").glob("shard-*.jsonl")) for trace in lines(path)]


def values(directory: Path, name: str = "student") -> dict[str, float]:
    """The scores of a model's file, by metric."""
    found = json.loads((directory / f"{name}.json").read_text())["results"]["sums"]
    return {key.removesuffix(",none"): value for key, value in found.items() if key.endswith(",none") and "_stderr" not in key}


def by_question(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The traces of each problem, as often as they were drawn."""
    found: dict[str, list[dict[str, Any]]] = {}
    for trace in traces(directory):
        found.setdefault(trace["prompt"][0]["content"], []).extend([trace] * trace["count"])
    return found


def test_the_scores_are_those_of_what_was_drawn(kdlib: Command, wanted: dict[str, Any]) -> None:
    done = kdlib("evaluate", **wanted)
    assert done.code == 0, done.err
    problems = by_question(wanted["output_path"] / "student")
    assert len(problems) == 10 and all(len(drawn) == N for drawn in problems.values())
    right = {
        question: [question != "What is 3 plus two?" and len(one["completion"]) % 2 == 0 for one in drawn]
        for question, drawn in problems.items()
    }
    found = values(wanted["output_path"])
    assert found["avg@4"] == pytest.approx(statistics.fmean(map(statistics.fmean, right.values())))
    chances = [statistics.fmean(map(any, itertools.combinations(judged, 2))) for judged in right.values()]
    assert found["pass@2"] == pytest.approx(statistics.fmean(chances)) and found["pass@1"] == pytest.approx(found["avg@4"])
    every = [one for drawn in problems.values() for one in drawn]
    assert found["truncated"] == pytest.approx(statistics.fmean(one["finish"] == "length" for one in every))
    assert found["mean_length"] == pytest.approx(statistics.fmean(one["tokens"] for one in every))

    said = json.loads((wanted["output_path"] / "student.json").read_text())
    assert said["n-samples"] == {"sums": {"original": 12, "effective": 10}} and said["model_name"] == str(wanted["model"])
    facts = said["sampled"]["sums"]
    assert facts["not_judged"] == {"the verifier raised KeyError": N} and facts["completions"] == 40
    assert facts["left_out"] == {"an empty prompt": 1, "an earlier row has the prompt": 1}
    for text in (
        "avg@4",
        "truncated",
        "mean_length",
        "40 completions, 4 a problem, of up to 12 tokens; temperature 1 (default), top_p 1 (default), top_k 0 (default)",
        "4 completions not judged, counted as wrong: 4 x the verifier raised KeyError",
        "rows left out: 1 x an empty prompt, 1 x an earlier row has the prompt",
    ):
        assert text in done.out
    assert {path.name for path in wanted["output_path"].iterdir()} == {
        *("student", "student.json", "comparison.json", "comparison.html")
    }
    assert "avg@4" in (wanted["output_path"] / "comparison.html").read_text()


def test_every_completion_is_counted_once(tmp_path: Path) -> None:
    """Traces by hand: identical ones count as often as they were drawn, skipped ones too, and none is lost."""
    tokenizer = tiny_tokenizer()
    problems = Dataset.from_list([{"question": "", "answer": "9"}, *({"question": q, "answer": "4"} for q in ("2+2?", "3+1?"))])
    prompts = read_prompts(problems, tokenizer)
    ids = [tokenizer.encode(f"It is {number}.") for number in (4, 5)]

    def trace(problem: int, text: str, count: int, finish: str = "stop") -> dict[str, Any]:
        known = {"prompt_id": prompts.prompt_ids[problem], "completion": text, "count": count, "finish": finish, "tokens": 5}
        return {**known, "input_ids": [*prompts[problem].ids, *ids[0][:5]]}

    def skipped(reason: str, tokens: int) -> Skipped:
        return Skipped(prompt_id=prompts.prompt_ids[1], generation=0, reason=reason, tokens=tokens)

    writer = TraceWriter(tmp_path, {}, prompts=2, rows_per_shard=2, prompts_per_batch=2)
    first = [trace(0, "It is 4.", 2), trace(0, "It is 5.", 1, "length"), trace(0, "It is four.", 1)]
    left = [skipped(EMPTY, 7), skipped(EMPTY, 1), skipped(UNUSABLE, 0)]
    writer.finish(0, [Batch(traces=[*first, trace(1, "It is 5.", 1)], skipped=left)])
    writer.close()
    found = judged(prompts, tmp_path, n=4, limit=7, verifier=ExactNumber(), thinking=None)
    assert list(found.answers) == [1, 2], "by row: the first has no prompt"
    one, two = found.answers.values()
    assert (one.right, one.cut, one.tokens, dict(one.votes), one.right_vote) == (2, 1, 20, {"4": 2, "5": 1}, "4")
    assert (two.right, two.cut, two.tokens, dict(two.votes), two.right_vote) == (0, 1, 13, {"5": 1}, None)
    assert (dict(found.not_judged), found.unanswered, found.judged) == ({UNUSABLE: 1}, 0, 5)


def test_models_are_compared_on_the_same_problems(kdlib: Command, wanted: dict[str, Any], place: Path) -> None:
    models = {"compare.base": place / "teacher", "compare.stranger": place / "stranger", "name": "sft"}
    done = kdlib("evaluate", **wanted, **models)
    assert done.code == 0, done.err
    compared = json.loads((wanted["output_path"] / "comparison.json").read_text())
    assert compared["models"] == ["base", "stranger", "sft"]
    row = next(row for row in compared["rows"] if row["metric"] == "avg@4")
    assert (row["task"], row["n"], row["higher_is_better"]) == ("sums", 10, True)
    per_problem = {}
    for name in compared["models"]:
        drawn = by_question(wanted["output_path"] / name)
        per_problem[name] = {
            question: statistics.fmean("3 plus" not in question and len(one["completion"]) % 2 == 0 for one in ones)
            for question, ones in drawn.items()
        }
        assert row["values"][name]["value"] == pytest.approx(statistics.fmean(per_problem[name].values()))
        assert values(wanted["output_path"], name)["avg@4"] == row["values"][name]["value"]
    for before, after in itertools.pairwise(compared["models"]):
        gain = row["gains"][after]
        differences = [per_problem[after][question] - per_problem[before][question] for question in per_problem[after]]
        assert gain["over"] == before and gain["n"] == 10
        assert gain["value"] == pytest.approx(statistics.fmean(differences)) and gain["low"] <= gain["value"] <= gain["high"]
    assert "sft over stranger" in done.out and "stranger over base" in done.out

    before = tree(wanted["output_path"])
    again = kdlib("evaluate", **wanted, **models)
    assert again.code == 0 and again.out == done.out
    pages = {path for path in before if path.endswith(".html")}
    after = tree(wanted["output_path"])
    assert {path: text for path, text in after.items() if path not in pages} == {
        path: text for path, text in before.items() if path not in pages
    }


def test_killed_and_started_again_the_scores_are_the_same(
    kdlib: Command, wanted: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    wanted |= {"compare.base": place / "teacher"}
    assert kdlib("evaluate", **{**wanted, "output_path": tmp_path / "whole"}).code == 0
    words = [word for name, value in wanted.items() for word in (f"--{name}", str(value))]
    for batch, there in ((3, {"base"}), (4, {"base", "student"})):  # five batches a model: the second call begins the student
        environment = {**os.environ, "KDLIB_TEST_BATCH": str(batch)}
        call = [sys.executable, "-c", STOPS, "evaluate", *words]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert {path.name for path in wanted["output_path"].iterdir()} == there
    continued = kdlib("evaluate", **wanted)
    assert continued.code == 0, continued.err
    for name in ("base.json", "student.json", "comparison.json"):
        assert json.loads((wanted["output_path"] / name).read_text()) == json.loads((tmp_path / "whole" / name).read_text())
    for name in ("base", "student"):
        asked = lines(wanted["output_path"] / name / "problems" / "metrics.jsonl")
        assert [line["prompts"] for line in asked] == [2] * 5, "no batch was answered twice"


def test_a_verifier_that_was_broken_judges_again_what_is_sampled(
    kdlib: Command, wanted: dict[str, Any], asked: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text(VERIFIER.format(broken=True))
    broken = {**wanted, "verify": f"{own}:even"}
    refused = kdlib("evaluate", **broken)
    assert refused.code == 2 and "no completion could be judged (40 x the verifier raised KeyError)" in refused.err
    drawn = traces(wanted["output_path"] / "student")
    metrics = (wanted["output_path"] / "student" / "problems" / "metrics.jsonl").read_bytes()
    own.write_text(VERIFIER.format(broken=False))
    assert kdlib("evaluate", **broken).code == 0
    assert (wanted["output_path"] / "student" / "problems" / "metrics.jsonl").read_bytes() == metrics
    assert traces(wanted["output_path"] / "student") == drawn
    assert kdlib("evaluate", **{**wanted, "output_path": tmp_path / "whole"}).code == 0
    assert values(wanted["output_path"]) == values(tmp_path / "whole")

    changed = kdlib("evaluate", **{**broken, "temperature": 0.5})
    assert changed.code == 2 and "rollout.temperature: 1.0 -> 0.5" in changed.err and changed.err.count("\n") == 1
    anew = kdlib("evaluate", "--overwrite", **{**broken, "temperature": 0.5})
    assert anew.code == 0 and "temperature 0.5 (given)" in anew.out


def test_what_is_before_the_end_of_thinking_is_not_judged(kdlib: Command, wanted: dict[str, Any], asked: Path) -> None:
    """The end has no slash: every completion thinks first, and one without it answers nothing."""
    done = kdlib("evaluate", **wanted, thinking_end="e")
    assert done.code == 0, done.err
    right, cut, open_ended = [], [], 0
    tokenizer = AutoTokenizer.from_pretrained(wanted["model"])
    for question, drawn in by_question(wanted["output_path"] / "student").items():
        for one in drawn:
            written = tokenizer.decode(one["input_ids"][-one["tokens"] :])
            _, closed, answer = written.rpartition("e")
            for special in tokenizer.all_special_tokens:
                answer = answer.replace(special, "")
            right.append(bool(closed) and "3 plus" not in question and len(answer) % 2 == 0)
            cut.append(not closed or one["finish"] == "length")
            open_ended += not closed
    found = values(wanted["output_path"])
    assert 0 < open_ended < 40, "or this test says nothing"
    assert found["avg@4"] == pytest.approx(statistics.fmean(right))
    assert found["truncated"] == pytest.approx(statistics.fmean(cut))
    assert f"{open_ended} completions end within their thinking, counted as wrong and truncated" in done.out


def test_without_an_output_path_nothing_is_left(kdlib: Command, wanted: dict[str, Any], tmp_path: Path) -> None:
    del wanted["output_path"]
    done = kdlib("evaluate", **{**wanted, "n": 1, "pass_at": "1", "limit": 3})
    assert done.code == 0, done.err
    assert "3 completions, 1 a problem" in done.out and "temperature 0 (default)" in done.out
    assert not list(tmp_path.iterdir())


def test_tasks_are_kept_one_by_one_and_compared_by_problem(
    kdlib: Command, wanted: dict[str, Any], place: Path, asked: Path
) -> None:
    pytest.importorskip("lm_eval")
    given = {
        "model": place / "student",
        "compare.teacher": place / "teacher",
        "tasks": "first,second",
        "include_path": asked,
        "dataset_name": place / "rows.jsonl",
        "output_path": wanted["output_path"],
        "device": "cpu",
    }
    done = kdlib("evaluate", **given)
    assert done.code == 0, done.err
    directory = wanted["output_path"]
    parts = {path.name for path in (directory / "student").iterdir()}
    assert parts == {"task-first.json", "task-second.json", "text.json"}
    compared = json.loads((directory / "comparison.json").read_text())
    assert [(row["task"], row["metric"]) for row in compared["rows"]] == [
        *(("first", "acc"), ("second", "acc"), ("rows", "bits_per_byte"))
    ]
    first = compared["rows"][0]
    scores = {name: json.loads((directory / f"{name}.json").read_text()) for name in ("teacher", "student")}
    assert "samples" not in scores["student"]
    paired = {name: scores[name]["per_problem"]["first"]["values"]["acc,none"] for name in scores}
    assert len(paired["student"]) == 12 and set(paired["student"]) <= {0.0, 1.0}
    assert first["gains"]["student"]["over"] == "teacher"
    difference = statistics.fmean(paired["student"]) - statistics.fmean(paired["teacher"])
    assert first["gains"]["student"]["value"] == pytest.approx(difference)
    assert first["values"]["student"]["value"] == scores["student"]["results"]["first"]["acc,none"]

    # what was killed between two tasks scores the second alone: the first is taken as it stands
    (directory / "student" / "task-second.json").unlink()
    kept = json.loads((directory / "student" / "task-first.json").read_text())
    kept["results"]["results"]["first"]["acc,none"] = 0.125
    (directory / "student" / "task-first.json").write_text(json.dumps(kept))
    assert kdlib("evaluate", **given).code == 0
    again = json.loads((directory / "student.json").read_text())
    assert again["results"]["first"]["acc,none"] == 0.125
    assert again["results"]["second"] == scores["student"]["results"]["second"]

    changed = kdlib("evaluate", **given, limit=3)
    assert changed.code == 2 and "limit: null -> 3" in changed.err and "--overwrite true" in changed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": None}, "problems are judged: add --verify"),
        ({"verify": "exact"}, "no verifier exact: choose exact_number"),
        ({"verify": "exact_number", "answer_column": "solution"}, "name theirs with --answer_column"),
        ({"problems": "absent.jsonl"}, "dataset absent.jsonl does not exist"),
        ({"problems": None, "tasks": "x"}, "verify judges problems: add --problems"),
        ({"temperature": 0}, "temperature 0 gives the same answer 4 times"),
        ({"pass_at": "1,8"}, "pass_at 8 needs 8 completions of each problem, and n is 4: raise --n"),
        ({"n": 0, "pass_at": None}, "n must be at least 1"),
        ({"compare.student": "base"}, "two models are called student: call the model otherwise, with --name"),
        ({"name": "a/b"}, "'a/b' cannot be a model's name"),
        ({"compare.comparison": "base"}, "'comparison' cannot be a model's name"),
        ({"output_path": "scores.json"}, "it is a directory"),
        ({"backend": "server"}, "backend server asks a URL"),
        ({"model": "./absent"}, "no tokenizer at ./absent"),
        ({"compare": "{base: http://127.0.0.1:9/v1}", "dataset_name": "rows.jsonl"}, "leave dataset_name out"),
        ({"temprature": 0.5}, "did you mean temperature?"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(kdlib: Command, wanted: dict[str, Any], options: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in {**wanted, **options}.items() if value is not None}
    done = kdlib("evaluate", **given)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_options_are_on_their_page() -> None:
    found = rows((DOCS / "evaluate.md").read_text(encoding="utf-8"))
    for cls in (EvaluateArguments, SampledArguments, EngineArguments):
        for key in docs(cls):
            assert found.get(key) == shown_default(cls, key), key
