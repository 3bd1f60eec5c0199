"""Drafts written for vLLM: what is checked, what is changed, and that nothing is written when it cannot be right."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kdlib.decoding.speculative import speculative_generate
from kdlib.drafts import formats
from kdlib.drafts.eagle3 import Eagle3Draft
from kdlib.drafts.eagle3_config import Eagle3Config
from kdlib.drafts.export import RECORD, export_draft, export_head, fit_vocabulary, written_whole
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENS = len(tiny_tokenizer())
PADDED = TOKENS + 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/ of a padded vocabulary, draft/ and tied/ (embeddings) without padding, stranger/ of another tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer(vocab_size=340)
    _saved(root / "target", tiny_llama(PADDED, layers=4), tokenizer)
    _saved(root / "draft", tiny_llama(TOKENS, seed=1, max_position_embeddings=128), tokenizer)
    _saved(root / "tied", tiny_llama(TOKENS, seed=2, tie_word_embeddings=True), tokenizer)
    _saved(root / "stranger", tiny_llama(len(other), seed=3), other)
    return root


def _saved(path: Path, model: nn.Module, tokenizer: Any) -> None:
    model.save_pretrained(path)  # type: ignore[operator]
    tokenizer.save_pretrained(path)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def some_ids() -> Tensor:
    return torch.randint(3, TOKENS, (4, 16), generator=torch.Generator().manual_seed(0))


# The vocabulary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["draft", "tied"])
def test_a_smaller_vocabulary_is_padded_with_entries_that_are_never_drafted(place: Path, tmp_path: Path, name: str) -> None:
    done = export_draft(str(place / name), tmp_path / "out", target=str(place / "target"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == PADDED == model.get_output_embeddings().weight.shape[0]
    assert model.config.tie_word_embeddings == (name == "tied")
    before = AutoModelForCausalLM.from_pretrained(place / name)
    found, wanted = logits(model, some_ids()), logits(before, some_ids())
    torch.testing.assert_close(found[..., :TOKENS], wanted, rtol=1e-5, atol=1e-5)
    assert (found[..., TOKENS:].amax(-1) < found[..., :TOKENS].amax(-1)).all()
    assert (found.softmax(-1)[..., TOKENS:] <= 1 / TOKENS).all()
    assert f"{PADDED - TOKENS} padding entries added" in done.notes[-1]


def test_rows_of_zeros_would_have_been_drafted() -> None:
    """Why the padding is a mean: a head whose logits are all below 0."""
    model = _always_negative()
    fit_vocabulary(model, TOKENS + 2, tokens=TOKENS)
    assert (logits(model, some_ids()).argmax(-1) < TOKENS).all()
    model.get_output_embeddings().weight.data[TOKENS:] = 0.0
    assert (logits(model, some_ids()).argmax(-1) >= TOKENS).all()


def _always_negative() -> LlamaForCausalLM:
    """Every hidden state has the same large last entry, and every row of the head a negative one there."""
    model = tiny_llama(TOKENS)
    model.get_input_embeddings().weight.data[:, -1] = 50.0
    head = model.get_output_embeddings().weight.data
    head.mul_(0.1)[:, -1] = -5.0
    assert (logits(model, some_ids()) < 0).all()
    return model


def test_a_bias_on_the_head_is_padded_too() -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=TOKENS, tie_word_embeddings=False, **sizes)).eval()
    model.lm_head = nn.Linear(16, TOKENS)
    nn.init.uniform_(model.lm_head.bias, -9.0, -7.0)
    assert fit_vocabulary(model, TOKENS + 3, tokens=TOKENS) == 3
    found = logits(model, some_ids())
    torch.testing.assert_close(
        found[..., TOKENS:].double(), found[..., :TOKENS].double().mean(-1, keepdim=True).expand(4, 16, 3)
    )


def test_a_larger_vocabulary_is_cut_to_the_targets(place: Path, tmp_path: Path) -> None:
    _saved(tmp_path / "wide", tiny_llama(PADDED + 16, seed=1), tiny_tokenizer())
    done = export_draft(str(tmp_path / "wide"), tmp_path / "out", target=str(place / "target"))
    model, before = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "wide"))
    torch.testing.assert_close(logits(model, some_ids()), logits(before, some_ids())[..., :PADDED])
    assert "16 padding entries cut off" in done.notes[-1]


def test_an_equal_vocabulary_leaves_every_weight_as_it_is(place: Path, tmp_path: Path) -> None:
    _saved(tmp_path / "fits", tiny_llama(PADDED, seed=1).to(torch.bfloat16), tiny_tokenizer())
    done = export_draft(str(tmp_path / "fits"), tmp_path / "out", target=str(place / "target"))
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "fits"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert done.notes == ()


def test_another_tokenizer_is_drafted_for_greedily_or_refused(place: Path, tmp_path: Path) -> None:
    done = export_draft(str(place / "stranger"), tmp_path / "out", target=str(place / "target"))
    assert done.speculative_config["use_heterogeneous_vocab"] is True
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size < PADDED
    with pytest.raises(ValueError, match=r"different tokenizers .*: vLLM drafts greedily"):
        export_draft(
            str(place / "stranger"), tmp_path / "other", target=str(place / "target"), draft_sample_method="probabilistic"
        )
    assert not (tmp_path / "other").exists()


# What is written ----------------------------------------------------------------------------------


def test_the_directory_drafts_and_says_how_it_is_served(place: Path, tmp_path: Path) -> None:
    done = export_draft(
        str(place / "draft"),
        tmp_path / "out",
        target=str(place / "target"),
        num_speculative_tokens=3,
        draft_sample_method="probabilistic",
    )
    assert done.speculative_config == {
        "method": "draft_model",
        "model": str(tmp_path / "out"),
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }
    words = shlex.split(done.serve)
    assert words[:3] == ["vllm", "serve", str(place / "target")] and json.loads(words[4]) == done.speculative_config
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["speculative_config"] == done.speculative_config
    assert done.notes[0] == "the draft reads 128 tokens, the target 512: vLLM does not draft beyond 128"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()
    target, draft = (AutoModelForCausalLM.from_pretrained(path) for path in (place / "target", tmp_path / "out"))
    ids = some_ids()[:1]
    spoken = speculative_generate(target.eval(), draft.eval(), ids, max_new_tokens=10, gamma=3, stop_ids=())
    alone = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(spoken.sequences, alone)


@pytest.mark.parametrize("name", ["my-eagle3-draft", "Eagle-2", "run/dflash/out", "DSpark"])
def test_paths_that_vllm_takes_for_another_method_are_refused(place: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="for a draft of another method"):
        export_draft(str(place / "draft"), tmp_path / name, target=str(place / "target"))
    assert list(tmp_path.iterdir()) == []


def test_the_whole_path_counts_also_of_a_relative_one(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eagle3-runs").mkdir()
    monkeypatch.chdir(tmp_path / "eagle3-runs")
    with pytest.raises(ValueError, match="'eagle3'"):
        export_draft(str(place / "draft"), "out", target=str(place / "target"))


def test_only_an_export_of_the_same_pair_is_replaced(place: Path, tmp_path: Path) -> None:
    pair = {"target": str(place / "target")}
    export_draft(str(place / "draft"), tmp_path / "out", **pair)
    (tmp_path / "out" / "note.txt").write_text("of the first export")
    export_draft(str(place / "draft"), tmp_path / "out", num_speculative_tokens=7, **pair)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["speculative_config"]["num_speculative_tokens"] == 7
    assert not (tmp_path / "out" / "note.txt").exists()
    with pytest.raises(ValueError, match="no export of this draft"):
        export_draft(str(place / "tied"), tmp_path / "out", **pair)
    with pytest.raises(ValueError, match="no export of this draft"):
        export_draft(str(place / "draft"), place / "target", **pair)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_fails_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(RuntimeError, match="in between"), written_whole(tmp_path / "out") as directory:
        (directory / "new").write_text("")
        raise RuntimeError("in between")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


# Checkpoints that are none ------------------------------------------------------------------------


def _changed(source: Path, path: Path, change: Any) -> str:
    """A copy of a checkpoint with its tensors changed in place."""
    _saved(path, AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source))
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(path)


NORM = "model.layers.1.input_layernorm.weight"
CHANGES = {
    "missing keys": lambda weights: weights.pop(NORM),
    "unexpected keys": lambda weights: weights.update(extra=torch.zeros(2)),
    "mismatched keys": lambda weights: weights.update({NORM: torch.zeros(3)}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_weights_that_do_not_fit_are_named(place: Path, tmp_path: Path, what: str) -> None:
    broken = _changed(place / "draft", tmp_path / "broken", CHANGES[what])
    with pytest.raises(ValueError, match=f"1 {what} in its weights, the first is .*(extra|{NORM})"):
        export_draft(broken, tmp_path / "out", target=str(place / "target"))
    assert not (tmp_path / "out").exists()


def test_what_is_no_draft_at_all(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        export_draft(str(tmp_path / "nowhere"), tmp_path / "out", target=str(place / "target"))
    with pytest.raises(ValueError, match="at least 1"):
        export_draft(str(place / "draft"), tmp_path / "out", target=str(place / "target"), num_speculative_tokens=0)
    adapter = tmp_path / "adapter"
    tiny_tokenizer().save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter"):
        export_draft(str(adapter), tmp_path / "out", target=str(place / "target"))


# EAGLE-3 heads ------------------------------------------------------------------------------------


def _head(path: Path, target: LlamaForCausalLM, **changes: Any) -> str:
    config = Eagle3Config.of_target(target.config, **changes)
    formats.write(Eagle3Draft(config), path, format="eagle")
    return str(path)


@pytest.mark.parametrize("format", ["eagle", "speculators"])
def test_a_head_is_written_in_either_format(place: Path, tmp_path: Path, format: formats.Format) -> None:
    target = AutoModelForCausalLM.from_pretrained(place / "target")
    head = _head(tmp_path / "head", target)
    done = export_head(head, tmp_path / "out", target=str(place / "target"), format=format, num_speculative_tokens=2)
    assert formats.is_head(done.directory)
    found, wanted = (formats.load(path, target).state_dict() for path in (done.directory, head))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert done.serve.split()[2] == (str(place / "target") if format == "eagle" else str(done.directory))
    assert done.speculative_config == {"method": "eagle3", "model": str(done.directory), "num_speculative_tokens": 2}


def test_a_head_of_another_target_is_refused(place: Path, tmp_path: Path) -> None:
    head = _head(tmp_path / "head", tiny_llama(PADDED, hidden=64, layers=4))
    with pytest.raises(ValueError, match=f"vocab_size {PADDED} and hidden_size 64"):
        export_head(head, tmp_path / "out", target=str(place / "target"))
    assert not (tmp_path / "out").exists()
