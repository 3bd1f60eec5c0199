"""lm-eval with a diffusion model: answers are the decoder's, generation options are honoured, likelihoods are bounds."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from kdlib.data.arithmetic import make_problems
from kdlib.data.arithmetic_models import END, make_tokenizer
from kdlib.decoding.diffusion_decoder import DiffusionDecoder
from kdlib.decoding.strategies import ConfidenceThreshold, LowConfidence
from kdlib.diffusion import DiffusionSpec, as_diffusion, spec_of, with_mask_token
from kdlib.eval import evaluate
from kdlib.eval.arithmetic_task import TASK, arithmetic_task
from kdlib.eval.diffusion_likelihood import Text, log_likelihoods
from tests.eval.diffusion_models import enumerated
from tests.tiny import tiny_llama

pytest.importorskip("lm_eval")

DOCUMENTS, LONGEST = 3, 16
TOKENIZER = make_tokenizer()
END_ID = TOKENIZER.convert_tokens_to_ids(END)
MASK = with_mask_token(TOKENIZER, "<|mask|>")
OPTIONS = {"gen_length": 24, "block_length": 8, "strategy": {"ConfidenceThreshold": {"threshold": 0.05}}}


def diffusion_model(**spec: Any) -> Any:
    """Random, and likely to end a text somewhere."""
    model = tiny_llama(len(TOKENIZER), eos_token_id=END_ID, pad_token_id=TOKENIZER.pad_token_id)
    with torch.no_grad():
        model.lm_head.weight[END_ID] *= 2.0
    return as_diffusion(model, DiffusionSpec(mask_token_id=MASK, eos_token_id=END_ID, **spec)).eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    problems = make_problems(DOCUMENTS, seed=0, split="test", slips=0.0)
    (folder / "test.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    write_task(folder, TASK)
    return folder


def write_task(folder: Path, name: str, **generation: Any) -> None:
    task = {**arithmetic_task(folder / "test.jsonl"), "task": name}
    given = {**task["generation_kwargs"], "max_gen_toks": LONGEST, **generation}
    task["generation_kwargs"] = {key: value for key, value in given.items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def scored(model: Any, tasks: Path, *, task: str = TASK, **options: Any) -> dict[str, Any]:
    given = {"tokenizer": TOKENIZER, "decoder": OPTIONS, **options}
    return evaluate(model, task, include_path=tasks, log_samples=True, **given)


def answers(results: dict[str, Any], *, task: str = TASK) -> list[str]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def decoded(model: Any, results: dict[str, Any], *, task: str = TASK, stop_ids: Any = None, **options: Any) -> list[Any]:
    """(tokens before the end, passes) of every document, one at a time."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    decoder = DiffusionDecoder(**{"block_length": 8, "strategy": ConfidenceThreshold(threshold=0.05), **options})
    found = []
    for sample in samples:
        prompt = TOKENIZER.encode(sample["arguments"][0][0])
        ((_, output),) = decoder.decode(model, [prompt], spec=spec_of(model.config), batch_size=1, stop_ids=stop_ids)
        new = output.sequences[0, len(prompt) :].tolist()
        found.append((new[: int(output.lengths[0])], int(output.forwards[0])))
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_and_counts_are_the_decoders(tasks: Path, batch_size: int) -> None:
    model = diffusion_model()
    found = scored(model, tasks, batch_size=batch_size)
    alone = decoded(model, found, gen_length=LONGEST)  # the task's max_gen_toks, not the decoder's gen_length
    assert answers(found) == [TOKENIZER.decode(ids, skip_special_tokens=True) for ids, _ in alone]
    counted = found["config"]["decoder"]
    assert counted["tokens"] == sum(len(ids) for ids, _ in alone)
    assert counted["forwards"] == sum(passes for _, passes in alone) and counted["answers"] == DOCUMENTS
    assert found["tokens_per_forward"] == counted["tokens_per_forward"] == counted["tokens"] / counted["forwards"]
    assert counted["strategy"] == {"ConfidenceThreshold": {"threshold": 0.05}} and counted["block_length"] == 8


def test_a_task_without_a_length_has_the_decoders_and_a_model_its_own_settings(tasks: Path) -> None:
    write_task(tasks, "open", max_gen_toks=None)
    model = diffusion_model()
    own = DiffusionDecoder(gen_length=10, block_length=5, strategy=LowConfidence(steps=4))
    model.config.diffusion["decoding"] = own.to_json()
    found = scored(model, tasks, task="open", decoder=None)
    expected = decoded(model, found, task="open", gen_length=10, block_length=5, strategy=LowConfidence(steps=4))
    assert answers(found, task="open") == [TOKENIZER.decode(ids, skip_special_tokens=True) for ids, _ in expected]
    assert found["config"]["decoder"]["gen_length"] == 10 and "tokens_per_forward" in found
    changed = scored(model, tasks, task="open", decoder={"strategy": {"LowConfidence": {"steps": 10}}})
    assert changed["config"]["decoder"]["forwards"] > found["config"]["decoder"]["forwards"]


def test_stop_strings_of_one_token_end_and_longer_ones_are_cut(tasks: Path) -> None:
    model = diffusion_model()
    whole = scored(model, tasks)
    longest, said = max(answers(whole), key=len), [i for ids, _ in decoded(model, whole, gen_length=LONGEST) for i in ids[2:]]
    stop = next(i for i in said if TOKENIZER.encode(TOKENIZER.decode([i]), add_special_tokens=False) == [i])
    word = TOKENIZER.decode([stop])
    write_task(tasks, "word", until=[word])
    found = scored(model, tasks, task="word")
    expected = decoded(model, found, task="word", gen_length=LONGEST, stop_ids=[END_ID, stop])
    assert found["config"]["decoder"]["tokens"] == sum(len(ids) for ids, _ in expected)
    assert found["config"]["decoder"]["tokens"] < whole["config"]["decoder"]["tokens"]
    assert all(word not in answer for answer in answers(found, task="word"))
    several = longest[3:11]
    assert len(TOKENIZER.encode(several, add_special_tokens=False)) > 1
    write_task(tasks, "several", until=[several])
    cut = scored(model, tasks, task="several")
    assert longest[: longest.index(several)] in answers(cut, task="several")


def test_temperature_of_the_task_counts(tasks: Path) -> None:
    model = diffusion_model()
    write_task(tasks, "warm", do_sample=True, temperature=1.5)
    write_task(tasks, "silent", do_sample=None, temperature=None)
    greedy = answers(scored(model, tasks))
    warm = scored(model, tasks, task="warm")
    expected = decoded(model, warm, task="warm", gen_length=LONGEST, temperature=1.5)
    assert answers(warm, task="warm") == [TOKENIZER.decode(ids, skip_special_tokens=True) for ids, _ in expected]
    assert answers(warm, task="warm") != greedy == answers(scored(model, tasks, task="silent"), task="silent")
    own = scored(model, tasks, task="silent", decoder={**OPTIONS, "temperature": 1.5})
    assert answers(own, task="silent") == answers(warm, task="warm")
    assert answers(scored(model, tasks, decoder={**OPTIONS, "temperature": 1.5})) == greedy  # do_sample: false


@pytest.mark.parametrize(("given", "said"), [({"top_p": 0.9}, "has no top_p: drop it"), ({"top_k": 5}, "has no top_k")])
def test_what_it_cannot_do_is_refused(tasks: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scored(diffusion_model(), tasks, gen_kwargs=given)


def test_wrong_options_are_refused_before_loading(tasks: Path, tmp_path: Path) -> None:
    diffusion_model().config.save_pretrained(tmp_path)  # and no weights
    for decoder, said in (
        ({"block_size": 4}, "no option block_size: its options are gen_length"),
        ({"strategy": "Nothing"}, "no strategy Nothing: choose LowConfidence"),
        ({"strategy": {"ConfidenceThreshold": {"threshold": 1.5}}}, "1.5"),
        ({"gen_length": 0}, "gen_length 0"),
    ):
        with pytest.raises(ValueError, match=said):
            scored(tmp_path, tasks, decoder=decoder, tokenizer=None)


def test_paths_adapters_and_lm_evals_own_arguments(tasks: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = diffusion_model()
    for saved in (model, TOKENIZER):
        saved.save_pretrained(tmp_path / "base")
    held = answers(scored(model, tasks))
    assert answers(scored(tmp_path / "base", tasks, tokenizer=None)) == held
    import_module("kdlib.eval.diffusion_lm")  # as python -m kdlib.eval does
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = {"pretrained": str(tmp_path / "base"), **OPTIONS}
    typed = simple_evaluate("kdlib-diffusion", model_args=arguments, tasks=[TASK], task_manager=manager, device="cpu")
    assert typed is not None and answers(typed) == held
    model.name_or_path = str(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    by_path = scored(tmp_path / "adapter", tasks, tokenizer=None)
    assert answers(by_path) == answers(scored(adapted, tasks)) != held


def test_a_causal_model_is_none(tasks: Path) -> None:
    from kdlib.eval.diffusion_lm import DiffusionLM

    with pytest.raises(ValueError, match="no diffusion language model that kdlib knows"):
        DiffusionLM(tiny_llama(len(TOKENIZER)), tokenizer=TOKENIZER)
    model = diffusion_model()
    model.config.is_causal = True
    with pytest.raises(ValueError, match="is causal"):
        DiffusionLM(model, tokenizer=TOKENIZER)


def choices(folder: Path, *, output_type: str = "multiple_choice", **more: Any) -> None:
    task = {
        "task": "choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": "{{question}}",
        "doc_to_target": 0,
        **more,
    }
    (folder / "choice.yaml").write_text(yaml.safe_dump(task))
    rows = [{"question": f"Tom has {i} apples"} for i in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_likelihoods_of_one_token_are_exact_and_longer_ones_near_the_bound(tmp_path: Path) -> None:
    metric = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    choices(tmp_path, doc_to_choice=["!", "!?;"], metric_list=metric)
    model = diffusion_model()
    found = scored(model, tmp_path, task="choice", model_args=None)
    assert found["config"]["likelihood"]["mc_samples"] == 128
    assert found["config"]["decoder"]["tokens_per_forward"] is None
    for sample in found["samples"]["choice"]:
        for (context, continuation), ((value, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            ids, prompt = TOKENIZER.encode(context + continuation), len(TOKENIZER.encode(context))
            exact = enumerated(model, ids, list(range(prompt, len(ids))), spec=spec_of(model.config))
            assert float(value) == pytest.approx(exact, abs=1e-4 if len(ids) == prompt + 1 else 0.1 * abs(exact))


def test_greedy_is_found_out_when_asked_for() -> None:
    from kdlib.eval.diffusion_lm import DiffusionLM

    model, prompt = diffusion_model(), [1, 40, 41]
    decoder = DiffusionDecoder(gen_length=3, block_length=3, strategy=LowConfidence(steps=3))
    ((_, output),) = decoder.decode(model, [prompt], spec=spec_of(model.config), batch_size=1, stop_ids=[])
    own = output.sequences[0, 3:].tolist()
    other = [*own[:2], own[2] + 1]
    pairs: Any = [(None, prompt, own), (None, prompt, other), (None, [1, *prompt], own[:1])]
    asked = DiffusionLM(model, tokenizer=TOKENIZER, check_greedy=True, mc_samples=3, batch_size=2)
    found = asked._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert [greedy for _, greedy in found[:2]] == [True, False]
    silent = DiffusionLM(model, tokenizer=TOKENIZER, mc_samples=3, batch_size=2)._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert [greedy for _, greedy in silent] == [False] * 3
    assert [value for value, _ in silent] == [value for value, _ in found]


def test_rolling_likelihoods_are_sums_over_windows() -> None:
    """Five tokens of context: four are scored behind the prefix token, then four behind the last of these."""
    from lm_eval.api.instance import Instance

    from kdlib.eval.diffusion_lm import DiffusionLM

    model, text = diffusion_model(), ";!?;!;?!"
    tokens, prefix = TOKENIZER.encode(text, add_special_tokens=False), TOKENIZER.bos_token_id or TOKENIZER.eos_token_id
    assert len(tokens) == 8
    lm = DiffusionLM(model, tokenizer=TOKENIZER, mc_samples=3, max_length=5, batch_size=4, seed=2)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    windows = [
        Text(ids=[before, *some], scored=[1, 2, 3, 4]) for before, some in ((prefix, tokens[:4]), (tokens[3], tokens[4:]))
    ]
    expected = log_likelihoods(
        model, windows, spec=spec_of(model.config), vocab_size=len(TOKENIZER), samples=3, batch_size=4, seed=2
    )
    assert lm.loglikelihood_rolling([request]) == pytest.approx([float(expected.sum())], rel=1e-5)


def test_attention_in_blocks_has_the_specs_blocks(tasks: Path) -> None:
    model = diffusion_model(attention="block_causal", block_length=4)
    strategy = {"ConfidenceThreshold": {"threshold": 0.05}}
    found = scored(model, tasks, decoder={"strategy": strategy, "cache": "block"})
    expected = decoded(model, found, gen_length=LONGEST, block_length=4)
    assert answers(found) == [TOKENIZER.decode(ids, skip_special_tokens=True) for ids, _ in expected]
    with pytest.raises(ValueError, match="the model's attention has blocks of 4"):
        scored(model, tasks, decoder={"block_length": 8})
