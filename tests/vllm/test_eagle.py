"""Exported EAGLE-3 heads in a real vLLM engine, in both formats: the target's own tokens, and the counters of our own loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdlib.decoding.eagle_drafter import EagleDrafter
from kdlib.decoding.speculative import speculative_generate
from kdlib.drafts import formats
from kdlib.serving.engine import speculative_counters, start_engine, stop_engine
from kdlib.trainers.eagle import EagleConfig, EagleTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.small import saved

pytestmark = pytest.mark.vllm

PROMPTS = [[5, 90, 17], [33], [8, 250, 111, 64, 27, 300, 12], [201, 44], [70, 71, 72, 73]]
GAMMA, NEW, LAYERS = 3, 40, [0, 2, 3]
EVERY_NORM = {"norm_before_residual": True, "norm_output": True, "fc_norm": True, "norm_before_fc": True}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32 or wider, as vLLM on CPU wants them."""
    path = tmp_path_factory.mktemp("models") / "target"
    model = tiny_llama(len(tiny_tokenizer()), hidden=128, layers=4, tie_word_embeddings=False, num_key_value_heads=2)
    return Path(saved(path, model))


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def greedy(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    model, found = loaded(path), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        found.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)[0].tolist()
        )
    return found


def head(target: Path, directory: Path, *, kind: str, **flags: bool) -> Path:
    """A head trained for a moment on what the target itself says, so that it is accepted now and then."""
    rows = [{"input_ids": ids, "labels": ids, "sample_id": i} for i, ids in enumerate(greedy(target, PROMPTS))]
    args = EagleConfig(
        output_dir=str(directory / "run"),
        use_cpu=True,
        per_device_train_batch_size=len(rows),
        max_steps=25,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=25,
        save_strategy="no",
        disable_tqdm=True,
        ttt_steps=GAMMA,
        draft_vocab_size=90,
        feature_layers=LAYERS,
        head_overrides=flags,
        export_format=kind,
        num_speculative_tokens=GAMMA,
    )
    trainer = EagleTrainer(None, str(target), args=args, train_dataset=rows)
    trainer.train()
    return trainer.save_final(directory / "final")


@pytest.fixture(scope="module", params=["eagle", "speculators"])
def running(request: pytest.FixtureRequest, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(engine, the head's directory): the speculators one started from its directory alone."""
    kind = request.param
    directory = head(target, tmp_path_factory.mktemp(kind), kind=kind, **(EVERY_NORM if kind == "speculators" else {}))
    config = {"method": "eagle3", "model": str(directory), "num_speculative_tokens": GAMMA}
    alone = kind == "speculators"
    engine = start_engine(
        str(directory if alone else target),
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        speculative_config={} if alone else config,  # {}: count, but take everything from the directory
    )
    yield engine, directory
    stop_engine(engine)


def test_tokens_and_counters_are_those_of_the_target_and_our_own_loop(running: Any, target: Path) -> None:
    from vllm import SamplingParams

    engine, directory = running
    settings = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], settings, use_tqdm=False)
    counted = speculative_counters(engine)
    expected = greedy(target, PROMPTS)
    assert [prompt + list(o.outputs[0].token_ids) for prompt, o in zip(PROMPTS, outputs, strict=True)] == expected
    model = loaded(target)
    drafter = EagleDrafter(formats.load(directory, model))
    runs = [
        speculative_generate(model, drafter, torch.tensor([p]), max_new_tokens=NEW, gamma=GAMMA, stop_ids=()) for p in PROMPTS
    ]
    assert [run.sequences[0].tolist() for run in runs] == expected
    accepted: Tensor = sum(run.accepted_per_position.sum(0) for run in runs)  # type: ignore[assignment]
    assert counted["num_drafts"] == sum(int(run.rounds.sum()) for run in runs)
    assert counted["num_accepted_tokens_per_pos"] == accepted.tolist()
    assert counted["num_draft_tokens"] == sum(int(run.drafted.sum()) for run in runs)
    assert 0.1 < counted["num_accepted_tokens"] / counted["num_draft_tokens"] < 0.95  # neither all nor nothing
