"""``kdlib diffusion``: from an auto-regressive model over its own trajectories to one that decodes in fewer steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdlib.data import load_rows
from kdlib.decoding import diffusion_generate
from kdlib.decoding.diffusion_decoder import decoder_of
from kdlib.decoding.strategies import EntropyThreshold, LowConfidence, strategy_json
from kdlib.diffusion import spec_of
from tests.cli.conftest import Command, tree

MASK_TOKEN = "<|mask|>"
NOTHING = {"evaluate.limit": 0}


@pytest.fixture
def words(options: dict[str, Any]) -> dict[str, Any]:
    """A run of two steps without a teacher."""
    given = {name: value for name, value in options.items() if name != "teacher"}
    return {**given, "block_length": 4, "response_length": 16, "max_length": 64, "mask_token": MASK_TOKEN, **NOTHING}


def completions(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / "samples" / "completions.jsonl").read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_causal_model_becomes_one_and_learns_to_decode_faster(kdlib: Command, words: dict[str, Any], tmp_path: Path) -> None:
    first = {**words, "shift": "true", "decoding.strategy": "{LowConfidence: {steps: 8}}"}
    done = kdlib("diffusion", **first)
    assert done.code == 0, done.err
    made = words["output_dir"] / "final"
    spec, config = spec_of(AutoConfig.from_pretrained(made)), AutoConfig.from_pretrained(made)
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert spec.shift and spec.attention == "full" and spec.mask_token_id == tokenizer.mask_token_id == len(tokenizer) - 1
    assert config.is_causal is False and decoder_of(config).strategy == LowConfidence(steps=8)
    assert decoder_of(config).gen_length == 16 and decoder_of(config).block_length == 4
    assert len(completions(words["output_dir"])) == 4
    again = kdlib("diffusion", **first)
    assert again.code == 0 and "finished; --overwrite true starts it anew" in again.err

    written = tmp_path / "trajectories"
    asked = {"model": made, "dataset_name": words["dataset_name"], "gen_length": 12, "block_length": 4, "device": "cpu"}
    done = kdlib("trajectories", "diffusion", **asked, output_dir=written, keep_unfinished="true", attempts=1)
    assert done.code == 0, done.err
    rows = load_rows(str(written), tokenizer=tokenizer)
    assert len(rows) > 4 and "commit_step" in rows.column_names

    own = [name for name in words if name not in ("mask_token", "response_length")]
    second = {**{name: words[name] for name in own}, "model": made, "dataset_name": written, "output_dir": tmp_path / "forced"}
    second |= {"objective": "CertaintyForcing", "masking": "trajectory", "use_peft": "true", "lora_r": 2}
    done = kdlib(
        "diffusion", **second, **{"decoding.strategy": "{EntropyThreshold: {threshold: 0.3}}", "decoding.gen_length": 12}
    )
    assert done.code == 0, done.err
    run = tmp_path / "forced"
    assert {"cross_entropy", "cross_entropy_complement", "certainty", "masked_accuracy"} <= metrics(run)[0].keys()
    plan = json.loads((run / "plan.json").read_text())
    attention, dense = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert plan["adapter_modules"] == dict.fromkeys((*attention, *dense), 2)
    final, config = run / "final", AutoConfig.from_pretrained(run / "final")
    assert spec_of(config) == spec and not (final / "adapter_config.json").exists()
    assert config.diffusion["decoding"]["strategy"] == strategy_json(EntropyThreshold(threshold=0.3))
    assert f"kdlib evaluate diffusion --model {final} --base {made}" in done.out

    # the samples are what the model says that lies there
    model, decoder = AutoModelForCausalLM.from_pretrained(final).eval(), decoder_of(config)
    prompt = rows[0]["input_ids"][: rows[0]["prompt_length"]]
    how = {"gen_length": 12, "block_length": 4, "strategy": decoder.strategy}
    out = diffusion_generate(model, torch.tensor([prompt]), spec=spec, **how)
    said = tokenizer.decode(out.sequences[0, len(prompt) :][: int(out.lengths[0])])
    assert completions(run)[0] == {"prompt": tokenizer.decode(prompt), "completion": said}
    assert "metrics.jsonl" in {path.name for path in run.iterdir()} and (run / "report.html").is_file()


def test_it_becomes_block_causal_below_an_adapter(kdlib: Command, words: dict[str, Any], tmp_path: Path) -> None:
    """D2F after an ELBO, and the same command with another option is refused."""
    assert kdlib("diffusion", **words).code == 0
    made, run = words["output_dir"] / "final", tmp_path / "forcing"
    second = {**words, "model": made, "output_dir": run, "objective": "DiffusionForcing", "attention": "block_causal"}
    second |= {"use_peft": "true", "decoding.cache": "block"}
    done = kdlib("diffusion", **second)
    assert done.code == 0, done.err
    spec = spec_of(AutoConfig.from_pretrained(run / "final"))
    assert spec.attention == "block_causal" and spec.block_length == 4
    before = tree(run / "final")
    changed = kdlib("diffusion", **{**second, "mask_ratio": 0.3})
    assert changed.code == 2 and "mask_ratio: 0.5 -> 0.3" in changed.err
    assert len(changed.err.strip().splitlines()) == 1 and tree(run / "final") == before


def test_preview_shows_rows_and_trains_nothing(kdlib: Command, words: dict[str, Any]) -> None:
    shown = kdlib("diffusion", **words, preview=2)
    assert shown.code == 0 and "It is 2." in shown.out and "It is 3." in shown.out
    assert not words["output_dir"].exists()


def test_help_names_the_options(kdlib: Command) -> None:
    shown = kdlib("diffusion", "--help")
    assert shown.code == 0
    for name in ("mask_token", "masking", "attention", "context", "response_length", "decoding.strategy", "evaluate.limit"):
        assert f"--{name}" in shown.out, name
    assert "masked diffusion language model" in kdlib("--help").out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_token": "null"}, 'add one with --mask_token "<|mask|>"'),
        ({"objective": "CertaintyForcing"}, "is no diffusion model: make one with objective MaskedELBO first"),
        ({"objective": "ForwardKL"}, "ForwardKL"),
        ({"objective": "DiffusionForcing", "attention": "full"}, "is no diffusion model"),
        ({"use_peft": "true"}, "an adapter leaves the embedding of the new mask token"),
        ({"masking": "trajectory"}, "masking trajectory needs rows of kdlib trajectories diffusion"),
        ({"mask_ratio": 1.5, "masking": "blocks"}, "mask_ratio must be above 0 and at most 1"),
        ({"response_length": 0}, "response_length must be at least 1"),
        ({"packing": "true"}, "packing puts samples into one row"),
        ({"on_policy_fraction": 1}, "write trajectories with kdlib trajectories diffusion"),
        ({"decoding.strategy": "Fastest"}, "Fastest"),
        ({"evaluate.limit": -1}, "limit must be at least 0, not -1"),
        ({"decoding.block_length": 0}, "block_length must be at least 1, not 0"),
        ({"decoding.temperature": -1}, "temperature -1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(kdlib: Command, words: dict[str, Any], given: dict[str, Any], message: str) -> None:
    outcome = kdlib("diffusion", **{**words, **given})
    assert outcome.code == 2 and message in outcome.err and len(outcome.err.splitlines()) == 1, outcome.err
    assert not words["output_dir"].exists()


def test_other_commands_take_no_objective_of_masks(kdlib: Command, options: dict[str, Any]) -> None:
    outcome = kdlib("distill", **{**options, "objective": "MaskedELBO", "teacher": "null"})
    assert outcome.code == 2 and "MaskedELBO" in outcome.err and len(outcome.err.splitlines()) == 1, outcome.err


def test_answers_without_room_are_refused_at_the_start_or_left_out_of_samples(kdlib: Command, words: dict[str, Any]) -> None:
    """In a context of 512 tokens."""
    done = kdlib("diffusion", **words, **{"decoding.gen_length": 512})
    assert done.code == 2 and "decoding.gen_length 512 leaves no room for a prompt in the model's 512 tokens" in done.err
    assert not words["output_dir"].exists()
    done = kdlib("diffusion", **words, **{"decoding.gen_length": 508})
    assert done.code == 0, done.err
    assert (words["output_dir"] / "final" / "model.safetensors").is_file() and completions(words["output_dir"]) == []
