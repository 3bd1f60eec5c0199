"""kdlib trajectories diffusion on a tiny model: answers and commit steps are the decoder's, failed ones are drawn again."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlib.cli.help import docs, shown_default
from kdlib.cli.parsing import option_names
from kdlib.cli.trajectories import TrajectoriesArguments
from kdlib.cli.trajectory.diffusion import DiffusionTrajectoriesArguments
from kdlib.data import load_rows
from kdlib.data.arithmetic import make_problems
from kdlib.data.diffusion import DiffusionIndex
from kdlib.data.trajectories import is_trajectories
from kdlib.decoding import DiffusionDecoder
from kdlib.decoding.strategies import strategy_of
from kdlib.diffusion import DiffusionSpec, as_diffusion, spec_of
from kdlib.keys import draw_key
from kdlib.verifiers import final_number
from tests.cli.conftest import Command, conversation, tree, write_rows
from tests.cli.stopped import stopped_trajectories
from tests.layouts import published
from tests.tiny import tiny_llama, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "dllm_trajectories.md").read_text(encoding="utf-8")
EOS, GEN, BLOCK = 2, 6, 4
TEMPERATURES = [0.0, 0.8, 1.5]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random diffusion model that writes digits and ends, at high temperatures other things too."""
    path = tmp_path_factory.mktemp("dllm") / "teacher"
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    model = tiny_llama(len(tokenizer), seed=3)
    with torch.no_grad():
        factor = torch.zeros(len(tokenizer), 1)
        factor[[tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]] = 4.0
        factor[EOS] = 7.0
        model.lm_head.weight.mul_(factor)
    spec = DiffusionSpec(mask_token_id=tokenizer.mask_token_id, eos_token_id=EOS)
    as_diffusion(model, spec).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"question": f"What is {i} plus two?", "answer": "1"} for i in range(10)]
    return write_rows(tmp_path_factory.mktemp("asked") / "rows.jsonl", [*rows, rows[0]])


@pytest.fixture
def wanted(teacher: Path, asked: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": teacher,
        "dataset_name": asked,
        "output_dir": tmp_path / "trajectories",
        "gen_length": GEN,
        "block_length": BLOCK,
        "attempts": len(TEMPERATURES),
        "temperatures": TEMPERATURES,
        "rows_per_shard": 4,
        "batch_size": 3,
        "device": "cpu",
    }


def diffusion(kdlib: Command, **options: Any) -> Any:
    return kdlib("trajectories", "diffusion", **options)


def attempts(model: Any, prompt: list[int], *, seed: int = 0, **options: Any) -> Iterator[tuple[list[int], list[int], int]]:
    """(response up to its end, its commit steps, passes) of each attempt at a prompt, all by itself."""
    decoder = DiffusionDecoder(gen_length=GEN, block_length=BLOCK, strategy=strategy_of({"LowConfidence": {"steps": GEN}}))
    for attempt, temperature in enumerate(TEMPERATURES):
        drawing = replace(decoder, temperature=temperature, seed=draw_key(seed, attempt), **options)
        ((_, output),) = drawing.decode(model, [prompt], spec=spec_of(model.config), batch_size=1, stop_ids=[EOS])
        response = output.sequences[0, len(prompt) :].tolist()
        end = response.index(EOS) + 1 if EOS in response else GEN
        yield response[:end], output.commit_step[0, :end].tolist(), int(output.forwards[0])


def prompt_of(tokenizer: Any, number: int) -> list[int]:
    messages = [{"role": "user", "content": f"What is {number} plus two?"}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return ids


def test_a_row_is_the_first_attempt_that_ends(kdlib: Command, wanted: dict[str, Any]) -> None:
    done = diffusion(kdlib, **wanted)
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(wanted["model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(wanted["model"])
    assert "10 prompts, 3 shards" in done.err and "1 x a prompt that an earlier row has" in done.err
    expected, kept_at, total = [], Counter[str](), Counter[str]()
    for number in range(10):
        prompt = prompt_of(tokenizer, number)
        for attempt, (response, steps, forwards) in enumerate(attempts(model, prompt)):
            total.update(attempts=1, spent=forwards)
            if response[-1] == EOS and len(response) > 1:
                kept_at[f"attempt {attempt + 1} (temperature {TEMPERATURES[attempt]:g})"] += 1
                total.update(rows=1, tokens=len(response) - 1, forwards=forwards)
                labels = [-100] * len(prompt) + response
                expected.append((prompt + response, labels, len(prompt), steps, BLOCK, forwards))
                break
    rows = load_rows(str(wanted["output_dir"]), tokenizer=tokenizer)
    columns = ("input_ids", "labels", "prompt_length", "commit_step", "block_length", "forwards")
    assert [tuple(row[name] for name in columns) for row in rows] == expected
    assert 0 < len(expected) < 10 and len(kept_at) > 1, "or this test says nothing of attempts"
    assert all(sorted(steps) == list(range(1, len(steps) + 1)) for _, _, _, steps, _, _ in expected if len(steps) == GEN)
    summary = DiffusionIndex.load(wanted["output_dir"]).summary
    assert {name: summary[name] for name in total} == dict(total) and summary["kept_at"] == dict(kept_at)
    assert sum(summary["dropped_rows"].values()) == 10 - len(expected)
    per_forward = total["tokens"] / total["forwards"]
    for said in (f"{len(expected)} kept, {10 - len(expected)} dropped (", "no end within 6 tokens", f"{per_forward:.3f}, over"):
        assert said in done.out
    command = f"kdlib diffusion --model {wanted['model']} --dataset_name {wanted['output_dir']} --objective CertaintyForcing"
    assert f"{command} --block_length 4 --output_dir OUT" in done.out


def test_answers_are_verified_and_wrong_ones_drawn_again(kdlib: Command, wanted: dict[str, Any], tmp_path: Path) -> None:
    """Asked for is what the model says first at its second attempt or later, of every third prompt what it never says."""
    model = AutoModelForCausalLM.from_pretrained(wanted["model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(wanted["model"])
    rows, expected, reasons = [], {}, Counter[str]()
    for number in range(9):
        said = list(attempts(model, prompt_of(tokenizer, number)))
        numbers = [final_number(tokenizer.decode(ids[:-1])) if ids[-1] == EOS else None for ids, _, _ in said]
        answer = next((str(n) for n in numbers[1:] if n is not None), "5") if number % 3 else "-1/2"
        answer = answer if number < 8 else ""
        rows.append({"question": f"What is {number} plus two?", "answer": answer})
        right = next((i for i, n in enumerate(numbers) if n is not None and str(n) == answer), None)
        if right is not None:
            expected[number] = said[right][0]
        elif number == 8:
            assert numbers[0] is not None, "or it is not judged at a later attempt"
            reasons["not judged: the row has no answer"] += 1
        else:
            empty = "an empty answer" if said[-1][0] == [EOS] else "wrong"
            reasons[empty if said[-1][0][-1] == EOS else f"no end within {GEN} tokens"] += 1
    given = {**wanted, "dataset_name": write_rows(tmp_path / "judged.jsonl", rows), "verify": "exact_number"}
    done = diffusion(kdlib, **given)
    assert done.code == 0 and "9 prompts, up to 3 attempts each, 3 shards" in done.err
    kept = load_rows(str(wanted["output_dir"]))
    assert [row["input_ids"] for row in kept] == [prompt_of(tokenizer, n) + ids for n, ids in expected.items()]
    assert DiffusionIndex.load(wanted["output_dir"]).summary["dropped_rows"] == dict(reasons) and len(reasons) > 1
    assert len(expected) > 1

    every = diffusion(kdlib, **{**given, "output_dir": tmp_path / "all", "keep": "all"})
    assert every.code == 0 and "x none right" in every.out
    index = DiffusionIndex.load(tmp_path / "all")
    assert index.summary["kept_at"]["none right"] == index.summary["rows"] - len(expected) > 0
    assert {tuple(row["input_ids"]) for row in kept} < {tuple(row["input_ids"]) for row in load_rows(str(tmp_path / "all"))}


def test_a_teacher_that_is_always_wrong_is_an_error(kdlib: Command, wanted: dict[str, Any], tmp_path: Path) -> None:
    problems = write_rows(
        tmp_path / "sums.jsonl", [{**row, "answer": "-1/2"} for row in make_problems(3, seed=0, split="train")]
    )
    given = {**wanted, "dataset_name": problems, "verify": "exact_number"}
    for _ in range(2):
        done = diffusion(kdlib, **given)
        assert done.code == 2 and "no row was kept (" in done.err and "--keep all" in done.err and "next" not in done.out
    with pytest.raises(ValueError, match="no row of the trajectories"):
        load_rows(str(wanted["output_dir"]))


def test_unfinished_answers_are_kept_on_request_and_teach_no_end(kdlib: Command, wanted: dict[str, Any]) -> None:
    done = diffusion(kdlib, **wanted, keep_unfinished="true")
    assert done.code == 0
    ends = [(row["input_ids"][-1] == EOS, len(row["commit_step"])) for row in load_rows(str(wanted["output_dir"]))]
    assert {False, True} == {ended for ended, _ in ends} and all(size == GEN for ended, size in ends if not ended)


def test_stopped_and_damaged_it_goes_on_to_the_same_files(kdlib: Command, wanted: dict[str, Any], tmp_path: Path) -> None:
    assert diffusion(kdlib, **{**wanted, "output_dir": tmp_path / "whole"}).code == 0
    stopped = stopped_trajectories("diffusion", wanted, number=signal.SIGTERM)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert stopped.stderr.endswith("stopped; the same command continues\n")
    left = wanted["output_dir"]
    assert {path.name for path in left.iterdir()} == {"index.json", "shard-00000.parquet"} and is_trajectories(left)
    with pytest.raises(ValueError, match="unfinished"):
        load_rows(str(left))
    (left / "shard-00000.parquet").write_bytes((left / "shard-00000.parquet").read_bytes()[:100])
    again = diffusion(kdlib, **wanted)
    assert again.code == 0 and "shard 0 is truncated or altered" in again.err
    assert {Path(k).name: v for k, v in tree(left).items()} == {Path(k).name: v for k, v in tree(tmp_path / "whole").items()}


def test_draws_are_the_rows_own(kdlib: Command, wanted: dict[str, Any], tmp_path: Path) -> None:
    """Order, neighbours and batches change none; the seed does."""
    drawn = {**wanted, "temperatures": [1.0], "keep_unfinished": "true", "strategy": "{ConfidenceThreshold: {threshold: 0.3}}"}
    assert diffusion(kdlib, **drawn).code == 0
    lines = wanted["dataset_name"].read_text().splitlines()
    other = write_rows(tmp_path / "other.jsonl", [json.loads(line) for line in lines[6:2:-1]])
    mixed = {**drawn, "dataset_name": other, "output_dir": tmp_path / "mixed", "batch_size": 2}
    assert diffusion(kdlib, **mixed).code == 0
    assert diffusion(kdlib, **{**mixed, "output_dir": tmp_path / "seed"}, seed=1).code == 0
    first, second, third = (
        {tuple(row["input_ids"][: row["prompt_length"]]): row for row in load_rows(str(directory))}
        for directory in (wanted["output_dir"], tmp_path / "mixed", tmp_path / "seed")
    )
    assert len(second) == 4 and all(first[key] == row for key, row in second.items())
    assert third.keys() == second.keys() and any(third[key] != row for key, row in second.items())
    assert min(row["forwards"] for row in first.values()) < GEN, "the strategy commits several tokens a pass"


def test_bad_rows_are_dropped_and_counted(kdlib: Command, wanted: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    (tmp_path / "check.py").write_text(
        "def judge(completion, row):\n    return {}[row['question'] if 'plus' not in row['question'] else 0]\n"
    )
    rows = [
        {"question": "What is <|mask|>?"},
        {"question": " "},
        {"question": "word " * 600},
        {"question": "What is 1 plus two?"},
    ]
    given = {**wanted, "dataset_name": write_rows(tmp_path / "bad.jsonl", rows)}
    done = diffusion(kdlib, **given, keep_unfinished="true")
    assert done.code == 0 and "the prompt is longer than 506 tokens" in done.err and "an empty prompt" in done.err
    assert "1 kept, 1 dropped (1 x the mask token in the prompt)" in done.out
    raises = {**given, "output_dir": tmp_path / "raises", "verify": f"{tmp_path}/check.py:judge", "keep_unfinished": "true"}
    failed = diffusion(kdlib, **raises)
    assert failed.code == 2 and "1 x not judged: the verifier raised KeyError" in failed.out
    outside = [
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [5, len(tokenizer), 7], "labels": [-100, -100, 7]},
    ]
    tokens = {**given, "dataset_name": write_rows(tmp_path / "tokens.jsonl", outside), "output_dir": tmp_path / "tokens"}
    done = diffusion(kdlib, **tokens, keep_unfinished="true")
    assert done.code == 0 and "1 x a token outside the model's vocabulary" in done.out
    assert load_rows(str(tmp_path / "tokens"))[0]["input_ids"][:2] == [5, 6]


def test_changed_settings_and_other_kinds_are_named_and_overwrite_starts_anew(
    kdlib: Command, wanted: dict[str, Any], place: Path
) -> None:
    given = {**wanted, "keep_unfinished": "true"}
    assert diffusion(kdlib, **given).code == 0
    before = tree(wanted["output_dir"])
    again = diffusion(kdlib, **{**given, "batch_size": 5})
    assert again.code == 0 and "3 shards are there already" in again.err and tree(wanted["output_dir"]) == before
    changed = diffusion(kdlib, **{**given, "gen_length": 8, "limit": 3, "attempts": 2, "verify": "exact_number"})
    assert changed.code == 2 and changed.err.count("\n") == 1 and tree(wanted["output_dir"]) == before
    for said in ("gen_length: 6 -> 8", "prompts: ", "attempts: 3 -> 2", "verify: null -> exact_number", "strategy: "):
        assert said in changed.err
    words = {"model": place / "teacher", "dataset_name": wanted["dataset_name"], "output_dir": wanted["output_dir"]}
    other = kdlib("trajectories", "jacobi", **words)
    assert other.code == 2 and "that kdlib trajectories jacobi writes" in other.err and tree(wanted["output_dir"]) == before
    anew = kdlib("trajectories", "diffusion", "--overwrite", **{**given, "gen_length": 8, "limit": 3})
    assert anew.code == 0 and len(load_rows(str(wanted["output_dir"]))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 0}, "gen_length must be at least 1"),
        ({"gen_length": 512}, "leaves no room for a prompt in the model's 512 tokens"),
        ({"attempts": 0}, "attempts must be at least 1"),
        ({"temperatures": "[-1.0]"}, "each 0 or more"),
        ({"temperatures": "[0.0]"}, "temperature 0 writes the same answer every time"),
        ({"strategy": "Fastest"}, "no strategy Fastest: choose LowConfidence"),
        ({"strategy": "{ConfidenceThreshold: {threshold: 3}}"}, "threshold"),
        ({"cache": "none"}, "cache"),
        ({"verify": "by_eye"}, "no verifier by_eye"),
        ({"verify": "exact_number", "answer_column": "result"}, "compares with the column result"),
        ({"model": "http://127.0.0.1:1/v1"}, "give its path or Hub id"),
        ({"model": "./absent"}, "no tokenizer at ./absent"),
        ({"dataset_name": "absent.jsonl"}, "absent.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    kdlib: Command, wanted: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    done = diffusion(kdlib, **{**wanted, **options})
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert not wanted["output_dir"].exists()


@pytest.mark.parametrize("model_type", ["llada", "Dream"])
def test_published_layouts_are_read_without_their_code(
    kdlib: Command, wanted: dict[str, Any], tmp_path: Path, model_type: str
) -> None:
    model = published.write(tmp_path / model_type, model_type)
    room = {"max_prompt_length": 30, "limit": 2, "attempts": 1, "keep_unfinished": "true"}
    done = diffusion(kdlib, **{**wanted, "model": model, **room})
    assert done.code == 0, done.err
    assert len(load_rows(str(wanted["output_dir"]))) == 2
    assert EOS in DiffusionIndex.load(wanted["output_dir"]).settings["stop_ids"]
    long = diffusion(kdlib, **{**wanted, "model": model, "gen_length": 64, "output_dir": tmp_path / "long"})
    assert long.code == 2 and "leaves no room for a prompt in the model's 64 tokens" in long.err


def test_a_causal_model_is_refused(kdlib: Command, wanted: dict[str, Any], place: Path) -> None:
    done = diffusion(kdlib, **{**wanted, "model": place / "student"})
    assert done.code == 2 and "is no diffusion language model" in done.err and not wanted["output_dir"].exists()


def test_every_option_is_in_the_help_and_on_the_page(kdlib: Command) -> None:
    documented = docs(TrajectoriesArguments) | docs(DiffusionTrajectoriesArguments)
    assert set(documented) == set(option_names(DiffusionTrajectoriesArguments))
    shown = kdlib("trajectories", "diffusion", "--help")
    assert shown.code == 0 and "usage: kdlib trajectories diffusion" in shown.out and "--temperatures" in shown.out
    found = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) ?\| .+ \|$", PAGE, flags=re.MULTILINE))
    assert found == {name: shown_default(DiffusionTrajectoriesArguments, name) for name in documented}


def test_messages_answer_as_the_page_says(kdlib: Command, wanted: dict[str, Any], tmp_path: Path) -> None:
    """Rows of messages are asked up to their last answer."""
    path = write_rows(tmp_path / "messages.jsonl", [conversation("What is 3 plus two?", "It is 5.")])
    assert diffusion(kdlib, **{**wanted, "dataset_name": path}, keep_unfinished="true").code == 0
    (row,) = load_rows(str(wanted["output_dir"]))
    tokenizer = AutoTokenizer.from_pretrained(wanted["model"])
    assert row["input_ids"][: row["prompt_length"]] == prompt_of(tokenizer, 3)
