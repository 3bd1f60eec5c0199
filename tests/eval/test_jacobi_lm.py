"""lm-eval with the Jacobi decoder gives the answers of lm-eval's own greedy decoding, and counts tokens and passes."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kdlib.data.arithmetic import make_problems
from kdlib.data.arithmetic_models import END, make_tokenizer
from kdlib.decoding.sampling import generate
from kdlib.eval import evaluate
from kdlib.eval.arithmetic_task import TASK, arithmetic_task
from kdlib.types import SamplingParams
from tests.tiny import tiny_llama

pytest.importorskip("lm_eval")

DOCUMENTS, LONGEST = 6, 48
TOKENIZER = make_tokenizer()
END_ID = TOKENIZER.convert_tokens_to_ids(END)


def ending_model(*, eos: int | None = END_ID) -> Any:
    """Random, and likely to end a text somewhere: the end token's row of the head is made longer."""
    model = tiny_llama(len(TOKENIZER), eos_token_id=eos, pad_token_id=TOKENIZER.pad_token_id)
    with torch.no_grad():
        model.lm_head.weight[END_ID] *= 2.0
    return model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    problems = make_problems(DOCUMENTS, seed=0, split="test", slips=0.0)
    (folder / "test.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    write_task(folder, TASK)
    return folder


def write_task(folder: Path, name: str, **generation: Any) -> None:
    task = {**arithmetic_task(folder / "test.jsonl"), "task": name}
    task["generation_kwargs"] = {**task["generation_kwargs"], **generation}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def answers(results: dict[str, Any], *, task: str = TASK) -> list[str]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def scored(model: Any, tasks: Path, *, task: str = TASK, **options: Any) -> dict[str, Any]:
    return evaluate(model, task, tokenizer=TOKENIZER, include_path=tasks, log_samples=True, **options)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("eos", [END_ID, None])
def test_answers_are_those_of_greedy_decoding(tasks: Path, batch_size: int, eos: int | None) -> None:
    model = ending_model(eos=eos)  # with and without an eos of its own: the task's stop string is one token
    greedy = scored(model, tasks, batch_size=1)
    found = scored(model, tasks, batch_size=batch_size, decoder={"block_size": 8})
    assert answers(found) == answers(greedy) and len(set(answers(found))) > 1
    assert found["results"] == greedy["results"] and "tokens_per_forward" not in greedy
    counted = found["config"]["decoder"]
    prompts = [TOKENIZER.encode(sample["arguments"][0][0]) for sample in found["samples"][TASK]]
    params = SamplingParams(max_tokens=LONGEST, temperature=0.0, stop_ids=(END_ID,))
    lengths = [len(one.ids) for one in generate(model, prompts, params, seeds=[0] * len(prompts), pad_token_id=0)]
    assert min(lengths) < LONGEST and counted["new_tokens"] == sum(lengths)
    assert 1.0 <= found["tokens_per_forward"] == (sum(lengths) - len(prompts)) / counted["passes"]
    assert counted["block_size"] == 8 and counted["init"] == "prompt"


@pytest.mark.parametrize("decoder", [{"blocks": 2, "block_size": 6}, {"sliding_window": True}, {"pool": 2, "init": "random"}])
def test_other_decoders_too(tasks: Path, decoder: dict[str, Any]) -> None:
    model = ending_model()
    found = scored(model, tasks, batch_size=4, decoder=decoder)
    assert answers(found) == answers(scored(model, tasks, batch_size=1))


def test_a_stop_string_of_several_tokens_is_cut_and_blocks_fit_the_task(tasks: Path) -> None:
    """What follows such a string is decoded and counted; a block is no longer than the task's answers."""
    model = ending_model(eos=None)
    long = max(answers(scored(model, tasks, batch_size=1)), key=len)
    stop = long[4:12]
    assert len(TOKENIZER.encode(stop, add_special_tokens=False)) > 1
    write_task(tasks, "short", until=[stop], max_gen_toks=12)
    greedy = scored(model, tasks, task="short", batch_size=1)
    found = scored(model, tasks, task="short", batch_size=4, decoder={"block_size": 16})
    assert answers(found, task="short") == answers(greedy, task="short")
    assert long[: long.index(stop)] in answers(found, task="short")
    assert found["config"]["decoder"]["new_tokens"] > DOCUMENTS


def test_a_path_and_lm_evals_own_arguments_too(tasks: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = ending_model()
    for saved in (model, TOKENIZER):
        saved.save_pretrained(tmp_path)
    held = scored(model, tasks, decoder={"block_size": 8})
    by_path = evaluate(tmp_path, TASK, include_path=tasks, log_samples=True, device="cpu", decoder={"block_size": 8})
    assert answers(by_path) == answers(held) and by_path["tokens_per_forward"] == held["tokens_per_forward"]
    import_module("kdlib.eval.models")  # as python -m kdlib.eval does
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = f"pretrained={tmp_path},block_size=8,sliding_window=True"
    typed = simple_evaluate("kdlib-jacobi", model_args=arguments, tasks=[TASK], task_manager=manager, device="cpu")
    assert answers(typed) == answers(held)
    assert typed["config"]["decoder"]["sliding_window"] is True and typed["config"]["decoder"]["tokens_per_forward"] >= 1


def test_likelihoods_are_unchanged_and_nothing_generated_has_no_ratio(tmp_path: Path) -> None:
    task = {
        "task": "choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["one", "two"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": f"What is {i}?"}) + "\n" for i in range(4)))
    plain, found = (scored(ending_model(), tmp_path, task="choice", decoder=decoder) for decoder in (None, {"block_size": 8}))
    assert plain["results"] == found["results"]
    assert answers(plain, task="choice") == answers(found, task="choice")
    assert found["tokens_per_forward"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gen_kwargs": {"do_sample": True, "temperature": 0.7}}, "the Jacobi decoder is greedy"),
        ({"gen_kwargs": {"temperature": 0.7, "do_sample": None}}, "the Jacobi decoder is greedy"),
        ({"gen_kwargs": {"num_beams": 2}}, "it has no num_beams"),
        ({"decoder": {"blok_size": 8}}, "no option blok_size: its options are block_size, init"),
        ({"decoder": {"init": "lucky"}}, "init 'lucky'"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused(tasks: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scored(ending_model(), tasks, **{"decoder": {"block_size": 8}, **options})
