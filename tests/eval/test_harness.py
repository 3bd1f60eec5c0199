"""``evaluate`` runs the installed lm-eval, offline, on tasks and models made here."""

from __future__ import annotations

import io
import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn

from kdlib.eval import evaluate, results_table, summary_rows
from tests.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("lm_eval")

DOCUMENTS = 6
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_choice: ["one", "two", "three"]
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = """
task: tiny_generate
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"What is {i}?", "answer": str(i), "gold": i % 3} for i in range(DOCUMENTS)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    common = COMMON.format(data=folder / "rows.jsonl")
    (folder / "choice.yaml").write_text(common + CHOICE)
    (folder / "generate.yaml").write_text(common + GENERATE)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(384).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def likelihood_choice(model: nn.Module, tokenizer: Any, question: str) -> int:
    """The answer with the highest log-likelihood, straight from the model."""
    scores = []
    for choice in ("one", "two", "three"):
        prompt, whole = tokenizer.encode(question), tokenizer.encode(f"{question} {choice}")
        logp = model(torch.tensor([whole])).logits.log_softmax(-1)[0]
        scores.append(sum(logp[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))))
    return int(np.argmax(scores))


def test_path_and_object_agree_with_each_other_and_with_the_model(tasks: Path, saved: Path) -> None:
    names = ["tiny_choice", "tiny_generate"]
    by_path = evaluate(str(saved), names, include_path=tasks, device="cpu")
    model, tokenizer = tiny_llama(384), tiny_tokenizer()
    by_object = evaluate(model, names, tokenizer=tokenizer, include_path=tasks, batch_size=2)
    assert by_path["results"] == by_object["results"]
    assert by_path["model_name"] == str(saved)
    right = [likelihood_choice(model, tokenizer, f"What is {i}?") == i % 3 for i in range(DOCUMENTS)]
    assert by_path["results"]["tiny_choice"]["acc,none"] == pytest.approx(np.mean(right))


def test_generation_is_the_models_own_greedy_text(tasks: Path) -> None:
    model, tokenizer = tiny_llama(384), tiny_tokenizer()
    results = evaluate(model, "tiny_generate", tokenizer=tokenizer, include_path=tasks, log_samples=True)
    sample = next(s for s in results["samples"]["tiny_generate"] if s["doc_id"] == 2)
    prompt = torch.tensor([tokenizer.encode("What is 2?")])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
    assert sample["resps"][0][0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_trained_model_is_given_back_as_it_was(tasks: Path) -> None:
    model, tokenizer = tiny_llama(384).train(), tiny_tokenizer()
    tokenizer.pad_token = None
    model.config.use_cache = False  # as gradient checkpointing leaves it
    model.gradient_checkpointing_enable()
    frozen = model.model.layers[0].eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    lengths: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    random_states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    evaluate(model, "tiny_generate", tokenizer=tokenizer, include_path=tasks)
    hook.remove()
    assert lengths.count(1) >= 5  # the key-value cache was used: after the prompt one token at a time
    assert model.training and not frozen.training and model.lm_head.training
    assert model.config.use_cache is False and tokenizer.pad_token is None
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert random.getstate() == random_states[0]
    assert np.array_equal(np.random.get_state()[1], random_states[1])
    assert torch.equal(torch.get_rng_state(), random_states[2])


def test_an_adapter_counts_as_object_and_as_directory(tasks: Path, saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tokenizer = tiny_llama(384), tiny_tokenizer()
    plain = evaluate(base, "tiny_choice", tokenizer=tokenizer, include_path=tasks, log_samples=True)
    base.name_or_path = str(saved)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = str(saved)
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    held = evaluate(adapted, "tiny_choice", tokenizer=tokenizer, include_path=tasks, log_samples=True)
    stored = evaluate(tmp_path, "tiny_choice", include_path=tasks, log_samples=True, device="cpu")

    def likelihoods(results: dict[str, Any]) -> np.ndarray:
        samples = sorted(results["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
        return np.array([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples])

    np.testing.assert_allclose(likelihoods(held), likelihoods(stored), rtol=1e-5)
    assert np.abs(likelihoods(held) - likelihoods(plain)).max() > 0.1


def test_results_are_written_whole(tasks: Path, saved: Path, tmp_path: Path) -> None:
    results = evaluate(str(saved), "tiny_choice", include_path=tasks, limit=4, output_path=tmp_path / "eval", device="cpu")
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["tiny_choice.json"]
    written = json.loads((tmp_path / "eval" / "tiny_choice.json").read_text())
    assert written["results"]["tiny_choice"]["acc,none"] == results["results"]["tiny_choice"]["acc,none"]
    assert written["n-samples"]["tiny_choice"]["effective"] == 4
    assert {"config", "versions", "date", "lm_eval_version"} <= set(written)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(results_table({"first": results, "second": {"results": {}}}))
    header, row = (line for line in console.export_text().splitlines() if "first" in line or "tiny_choice" in line)
    assert "second" in header and " 4 " in row
    assert f"{results['results']['tiny_choice']['acc,none']:.3f}" in row


def test_a_yaml_file_is_a_task_and_globs_match(tasks: Path, saved: Path) -> None:
    by_file = evaluate(str(saved), str(tasks / "choice.yaml"), limit=2, device="cpu")
    by_glob = evaluate(str(saved), "tiny_cho*", include_path=tasks, limit=2, device="cpu")
    assert by_file["results"] == by_glob["results"]


def test_lm_eval_keeps_its_log_to_itself(
    tasks: Path,
    saved: Path,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # no git repository
    logger = logging.getLogger("lm_eval")
    before = logger.level
    evaluate(str(saved), "tiny_choice", include_path=tasks, num_fewshot=0, device="cpu")
    captured = capfd.readouterr()
    assert captured.out == "" and "fatal" not in captured.err and "INFO" not in captured.err
    assert "Running loglikelihood requests" in captured.err  # the progress bar
    assert logger.level == before


def test_user_errors_are_one_line(tasks: Path) -> None:
    model, tokenizer = tiny_llama(384), tiny_tokenizer()
    with pytest.raises(ValueError, match=r"^unknown task 'tiny_choise': did you mean tiny_choice"):
        evaluate(model, "tiny_choise", tokenizer=tokenizer, include_path=tasks)
    with pytest.raises(ValueError, match="tokenizer"):
        evaluate(model, "tiny_choice", include_path=tasks)
    with pytest.raises(ValueError, match=r"^cannot load 'no/where': [^\n]+$"):
        evaluate("no/where", "tiny_choice", include_path=tasks, device="cpu")
    with pytest.raises(ValueError, match="for loading"):
        evaluate(model, "tiny_choice", tokenizer=tokenizer, include_path=tasks, device="cpu")
    with pytest.raises(ValueError, match="not a directory"):
        evaluate(model, "tiny_choice", tokenizer=tokenizer, include_path=tasks / "nothing")


def test_a_missing_lm_eval_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from kdlib.eval import evaluate\n"
        "try: evaluate('model', 'task')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'scoring tasks needs lm-eval: pip install "kdlib[eval]"\n'


def test_the_package_is_light() -> None:
    code = "import sys, kdlib.eval; print({'lm_eval', 'transformers', 'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_lm_evals_command_line_knows_our_models(tasks: Path, saved: Path) -> None:
    command = [sys.executable, "-m", "kdlib.eval", "--model", "kdlib", "--model_args", f"pretrained={saved}"]
    command += ["--tasks", "tiny_choice", "--include_path", str(tasks), "--device", "cpu", "--limit", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "kdlib (" in done.stdout and "tiny_choice" in done.stdout


def test_summary_rows_and_their_intervals() -> None:
    results = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.25, "acc_stderr,none": 0.1},
            "b": {"exact_match,strict": 1.0, "exact_match_stderr,strict": 0.0},
            "c": {"word_perplexity,none": 7.5, "word_perplexity_stderr,none": "N/A"},
        },
        "n-samples": {"a": {"effective": 20}, "b": {"effective": 10}, "c": {"effective": 5}},
        "higher_is_better": {"a": {"acc": True}},
    }
    a, b, c = summary_rows(results)
    assert (a["task"], a["metric"], a["filter"], a["n"], a["higher_is_better"]) == (
        "a",
        "acc",
        "none",
        20,
        True,
    )
    assert (a["low"], a["high"]) == pytest.approx((0.054, 0.446))
    # Wilson: (1 + z^2 / 2n -+ z sqrt(z^2 / 4n^2)) / (1 + z^2 / n) with all 10 right is 1 / (1 + z^2 / n) to 1
    assert (b["low"], b["high"]) == pytest.approx((1 / (1 + 1.959964**2 / 10), 1.0), abs=1e-6)
    assert (c["value"], c["stderr"], c["low"], c["high"]) == (7.5, None, None, None)
