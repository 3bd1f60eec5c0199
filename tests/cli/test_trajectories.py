"""kdlib trajectories jacobi on a tiny model: outputs are greedy, states those of Jacobi iteration, stopped runs go on."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlib.cli.help import docs
from kdlib.cli.parsing import option_names
from kdlib.cli.trajectories import TrajectoriesArguments
from kdlib.cli.trajectory.jacobi import JacobiTrajectoriesArguments
from kdlib.data import load_rows
from kdlib.data.trajectories import TrajectoryIndex, block_states, read_trajectories
from tests.cli.conftest import Command, conversation, tree, write_rows
from tests.cli.stopped import stopped_trajectories


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [conversation(f"What is {i} plus two?", f"It is {i + 2}.") for i in range(7)]
    return write_rows(tmp_path_factory.mktemp("asked") / "rows.jsonl", [*rows, rows[0]])


@pytest.fixture
def wanted(place: Path, asked: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": place / "teacher",
        "dataset_name": asked,
        "output_dir": tmp_path / "trajectories",
        "block_size": 4,
        "max_completion_length": 18,
        "rows_per_shard": 3,
        "generation_batch_size": 2,
        "batch_size": 2,
        "max_repeat": 30,
        "device": "cpu",
    }


def jacobi(kdlib: Command, **options: Any) -> Any:
    return kdlib("trajectories", "jacobi", **options)


@torch.no_grad()
def iterated(model: Any, prefix: list[int], state: list[int]) -> list[list[int]]:
    """The states of a block by passes over the whole text, without a cache."""
    states = [state]
    while len(states) < 2 or states[-1] != states[-2]:
        choice = model(torch.tensor([prefix + states[-1]])).logits[0].argmax(-1)[len(prefix) : -1].tolist()
        states.append([state[0], *choice])
    return states[:-1]


def test_outputs_are_greedy_and_states_those_of_one_block_alone(kdlib: Command, wanted: dict[str, Any]) -> None:
    done = jacobi(kdlib, **wanted)
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(wanted["model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(wanted["model"])
    rows, index = read_trajectories(wanted["output_dir"], tokenizer=tokenizer), TrajectoryIndex.load(wanted["output_dir"])
    assert len(rows) == 7 and "1 x a prompt that an earlier row has" in done.err
    total = Counter[str]()
    for number, row in enumerate(rows):
        p, ids = row["prompt_length"], torch.tensor([row["input_ids"]])
        messages = [{"role": "user", "content": f"What is {number} plus two?"}]
        assert ids[0, :p].tolist() == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        greedy = model.generate(ids[:, :p], attention_mask=torch.ones(1, p), max_new_tokens=18, do_sample=False)
        assert torch.equal(greedy, ids)
        assert tokenizer.decode(row["reference_ids"]) == f"It is {number + 2}.<|eos|>"
        assert row["block"] == list(range(-(-(ids.shape[1] - p) // 4))), "a greedy output loses no block"
        for block in row["block"]:
            start, end = p + 4 * block, min(p + 4 * block + 4, ids.shape[1])
            guess = [ids[0, start].item(), *(ids[0, (start - p + j) % p].item() for j in range(1, end - start))]
            states = iterated(model, ids[0, :start].tolist(), guess)
            assert block_states(row, block).tolist() == states
            total.update(blocks=1, tokens=end - start, states=len(states))
    summary = index.summary
    assert {name: summary[name] for name in total} == dict(total)
    assert summary["iterations"] == summary["block_by_block"] == total["states"] and summary["forwards"] <= 5 * 4
    for said in ("7 kept, 0 dropped", f"{total['states']:,}", f"{total['tokens'] / total['states']:.3f} by Jacobi decoding"):
        assert said in done.out
    assert f"kdlib jacobi --model {wanted['model']} --dataset_name {wanted['output_dir']} --block_size 4" in done.out


def test_the_directory_is_a_dataset_and_the_same_command_does_nothing(kdlib: Command, wanted: dict[str, Any]) -> None:
    assert jacobi(kdlib, **wanted).code == 0
    before = tree(wanted["output_dir"])
    again = jacobi(kdlib, **{**wanted, "batch_size": 5})
    assert again.code == 0 and "3 shards are there already" in again.err and tree(wanted["output_dir"]) == before
    assert len(load_rows(str(wanted["output_dir"]))) == 7


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_damaged_it_goes_on_to_the_same_files(
    kdlib: Command, wanted: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    assert jacobi(kdlib, **{**wanted, "output_dir": tmp_path / "whole"}).code == 0
    stopped = stopped_trajectories("jacobi", wanted, number=number)
    assert stopped.returncode == (-number if number == signal.SIGKILL else 128 + number), stopped.stderr
    left = wanted["output_dir"]
    assert {path.name for path in left.iterdir()} == {"index.json", "shard-00000.parquet"}
    assert number == signal.SIGKILL or stopped.stderr.endswith("stopped; the same command continues\n")
    (left / "shard-00000.parquet").write_bytes((left / "shard-00000.parquet").read_bytes()[:100])
    again = jacobi(kdlib, **wanted)
    assert again.code == 0 and "shard 0 is truncated or altered" in again.err
    assert {Path(k).name: v for k, v in tree(left).items()} == {Path(k).name: v for k, v in tree(tmp_path / "whole").items()}


def test_rows_that_the_model_would_not_write_are_dropped_and_counted(
    kdlib: Command, wanted: dict[str, Any], tmp_path: Path
) -> None:
    """Token rows: a greedy output; one with a block that is not; nothing of the model's; a repeat; an id that is no token."""
    assert jacobi(kdlib, **wanted).code == 0
    first = next(row for row in read_trajectories(wanted["output_dir"]) if len(row["block"]) == 5)
    p, ids = first["prompt_length"], first["input_ids"]
    wrong = [*ids[: p + 6], (ids[p + 6] + 1) % 100 + 3, *ids[p + 7 :]]
    texts = {
        1: [*ids[:p], *ids[p:]],
        2: [7, *wrong[:p], *wrong[p:]],  # another prompt: blocks are judged on their own
        3: [8, *ids[:p], 50, 60, 70, 80],
        4: [9, *ids[:p], 5, 5, 5, 5],
        5: [10, *ids[:p], 5, 9999],
    }
    prompts = {1: p, 2: p + 1, 3: p + 1, 4: p + 1, 5: p + 1}
    rows = [{"input_ids": t, "labels": [-100] * prompts[k] + t[prompts[k] :]} for k, t in texts.items()]
    path = write_rows(tmp_path / "tokens.jsonl", rows)
    given = {**wanted, "dataset_name": path, "output_dir": tmp_path / "own", "completions": "dataset", "max_repeat": 4}
    done = jacobi(kdlib, **given)
    assert done.code == 0, done.err
    kept = read_trajectories(tmp_path / "own")
    assert kept[0]["input_ids"] == ids and kept[0]["block"] == first["block"] and kept[0]["reference_ids"] == ids[p:]
    model = AutoModelForCausalLM.from_pretrained(wanted["model"]).eval()
    expected = {k: greedy_blocks(model, texts[k], start=prompts[k]) for k in (1, 2, 3)}
    assert [row["block"] for row in kept] == [blocks for blocks in expected.values() if blocks]
    summary = TrajectoryIndex.load(tmp_path / "own").summary
    lost = [-(-(len(texts[k]) - prompts[k]) // 4) - len(blocks) for k, blocks in expected.items()]
    assert summary["dropped_blocks"] == {"fixed point is not the greedy output": sum(lost)} and sum(lost) > 0
    reasons = ("one token 4 times in a row", "a token outside the model's vocabulary", "no block left")
    assert expected[1] and expected[3] == [], "or this test says nothing of rows without a block"
    assert summary["dropped_rows"] == dict.fromkeys(reasons, 1)
    assert "x fixed point is not the greedy output" in done.out


@torch.no_grad()
def greedy_blocks(model: Any, ids: list[int], *, start: int) -> list[int]:
    """The blocks of 4 whose tokens after the first are what the model says next."""
    choice = [0, *model(torch.tensor([ids])).logits[0].argmax(-1).tolist()]
    firsts = range(start, len(ids), 4)
    return [b for b, i in enumerate(firsts) if all(choice[j] == ids[j] for j in range(i + 1, min(i + 4, len(ids))))]


def test_completions_of_the_dataset_are_tokenised_as_for_training(
    kdlib: Command, wanted: dict[str, Any], tmp_path: Path
) -> None:
    """Prompt and completion as text, put into turns or not; rows without an answer have no reference, and no trajectory."""
    texts = [{"prompt": f"Say {i}", "completion": f" It is {i}."} for i in range(2)]
    endings = {"false": ("Say 0", " It is 0.<|eos|>"), "true": ("<|bos|><|user|>Say 0<|assistant|>", " It is 0.<|eos|>")}
    tokenizer = AutoTokenizer.from_pretrained(wanted["model"])
    for template, (prompt, completion) in endings.items():
        given = {**wanted, "dataset_name": write_rows(tmp_path / "pairs.jsonl", texts), "apply_chat_template": template}
        assert jacobi(kdlib, **{**given, "output_dir": tmp_path / template}).code == 0
        row = read_trajectories(tmp_path / template)[0]
        assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]) == prompt
        assert tokenizer.decode(row["reference_ids"]) == completion
    silent = {**wanted, "dataset_name": write_rows(tmp_path / "asked.jsonl", [{"prompt": "Say 0"}])}
    assert jacobi(kdlib, **silent, completions="greedy").code == 0
    assert read_trajectories(wanted["output_dir"])[0]["reference_ids"] == []
    done = jacobi(kdlib, **{**silent, "output_dir": tmp_path / "none"}, completions="dataset")
    assert done.code == 0 and "1 x the row has no completion that follows its prompt" in done.out


def test_random_guesses_are_the_rows_own(kdlib: Command, wanted: dict[str, Any], tmp_path: Path) -> None:
    """Order, neighbours and batches change none; the seed does."""
    assert jacobi(kdlib, **wanted, init="random").code == 0
    lines = wanted["dataset_name"].read_text().splitlines()
    other = write_rows(tmp_path / "other.jsonl", [json.loads(line) for line in lines[6:2:-1]])
    mixed = {**wanted, "dataset_name": other, "output_dir": tmp_path / "mixed", "batch_size": 3}
    assert jacobi(kdlib, **mixed, init="random").code == 0
    assert jacobi(kdlib, **{**mixed, "output_dir": tmp_path / "seed"}, init="random", seed=1).code == 0
    first, second, third = (
        {row["sample_id"]: row for row in read_trajectories(directory)}
        for directory in (wanted["output_dir"], tmp_path / "mixed", tmp_path / "seed")
    )
    assert len(second) == 4 and all(first[key] == row for key, row in second.items())
    assert third.keys() == second.keys() and any(third[key] != row for key, row in second.items())


def test_changed_settings_are_named_and_overwrite_starts_anew(kdlib: Command, wanted: dict[str, Any]) -> None:
    assert jacobi(kdlib, **wanted).code == 0
    before = tree(wanted["output_dir"])
    changed = jacobi(kdlib, **{**wanted, "block_size": 8, "limit": 3})
    assert changed.code == 2 and changed.err.count("\n") == 1 and tree(wanted["output_dir"]) == before
    assert all(said in changed.err for said in ("block_size: 4 -> 8", "prompts: ", "--overwrite true"))
    anew = kdlib("trajectories", "jacobi", "--overwrite", **{**wanted, "block_size": 8, "limit": 3})
    assert anew.code == 0 and set(read_trajectories(wanted["output_dir"])["block_size"]) == {8}
    assert len(read_trajectories(wanted["output_dir"])) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rollout.temperature": 0.7}, "the output is always the greedy one"),
        ({"model": "./absent"}, "no tokenizer at ./absent"),
        ({"init": "zeros"}, "init"),
        ({"dataset_name": "absent.jsonl"}, "absent.jsonl does not exist"),
        ({"max_prompt_length": 3}, "no row has a usable prompt"),
        ({"max_new_tokens": 3}, "max_completion_length"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    kdlib: Command, wanted: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    done = jacobi(kdlib, **{**wanted, **options})
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert not wanted["output_dir"].exists()


def test_help_and_a_missing_kind(kdlib: Command) -> None:
    documented = docs(TrajectoriesArguments) | docs(JacobiTrajectoriesArguments)
    assert set(documented) == set(option_names(JacobiTrajectoriesArguments))
    shown = kdlib("trajectories", "jacobi", "--help")
    assert shown.code == 0 and "usage: kdlib trajectories jacobi" in shown.out and "--block_size" in shown.out
    both = kdlib("trajectories", "--help")
    assert both.code == 0 and all(f"\n  {kind} " in both.out for kind in ("jacobi", "diffusion"))
    missing = kdlib("trajectories", model="m")
    assert missing.code == 2 and "kdlib trajectories jacobi --model MODEL" in missing.err
