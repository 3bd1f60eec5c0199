"""``kdlib transplant`` and the function behind it: what a model is after it has changed its tokenizer."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kdlib.cli.help import docs, shown_default
from kdlib.cli.transplant import TransplantArguments
from kdlib.cli.transplant_model import transplant
from kdlib.tokenizers.pure_bytes import byte_tokenizer
from kdlib.tokenizers.transplant import transplanted_rows
from kdlib.trainers.turns import end_of_turn
from tests.cli.conftest import Command, conversation, tree, write_rows
from tests.cli.test_docs import DOCS, rows
from tests.tiny import CHATML_TEMPLATE, PLAIN_TEMPLATE, tiny_llama, tiny_tokenizer
from tests.tokenizers.test_transplant import METHODS, tiny_unigram, words

OLD = tiny_tokenizer()
TURNS = conversation("Two?", "Four.")["messages"]


def logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def weights(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Of embeddings and head, before they change."""
    return model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()


def saved(model: PreTrainedModel, tokenizer: Any, path: Path) -> tuple[PreTrainedModel, Any]:
    """Both as ``from_pretrained`` finds them."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_onto_its_own_tokenizer_no_logit_changes(tied: bool, method: Any) -> None:
    model = tiny_llama(len(OLD) + 8, tie_word_embeddings=tied)
    ids = OLD.encode("She had seven apples.")
    before = logits(model, ids)
    done = transplant(model, old=OLD, new=tiny_tokenizer(), method=method)
    assert torch.equal(logits(model, ids), before[:, : len(OLD)])
    assert done.notes == () and done.tokenizer.chat_template == OLD.chat_template
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tied", "untie"), [(True, False), (True, True), (False, False), (False, True)])
def test_both_matrices_have_their_rows_and_ties_are_as_asked(
    tied: bool, untie: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_llama(len(OLD), tie_word_embeddings=tied).to(dtype)
    before = weights(model)
    done = transplant(model, old=OLD, new=tiny_unigram(), untie=untie)
    expected = [transplanted_rows(matrix, OLD, done.tokenizer) for matrix in before]
    assert all(torch.equal(a, b) for a, b in zip(weights(model), expected, strict=True))
    one = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert one == (tied and not untie) == model.config.tie_word_embeddings
    loaded, _ = saved(model, done.tokenizer, tmp_path)
    assert loaded.dtype == dtype and loaded.config.vocab_size == len(done.tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(weights(loaded), weights(model), strict=True))
    one = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert one == (tied and not untie)


def test_the_bias_of_a_head_moves_with_its_rows() -> None:
    config = PhiConfig(vocab_size=len(OLD), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = PhiForCausalLM(config)
    model.lm_head.bias.data.normal_()
    bias = model.lm_head.bias.detach().clone()
    done = transplant(model, old=OLD, new=tiny_unigram())
    expected = transplanted_rows(bias[:, None], OLD, done.tokenizer)[:, 0]
    assert torch.equal(model.lm_head.bias, expected) and len(expected) == len(done.tokenizer)


def test_a_model_of_bytes_speaks_its_template_and_generates(tmp_path: Path) -> None:
    model = tiny_llama(len(OLD))
    before = weights(model)[0]
    done = transplant(model, old=OLD, new=byte_tokenizer(OLD))
    loaded, tokenizer = saved(model, done.tokenizer, tmp_path)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text == OLD.apply_chat_template(TURNS, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    special = [token for token in ids if token > 255]
    assert [tokenizer.convert_ids_to_tokens(i) for i in special] == ["<|bos|>", "<|user|>", "<|assistant|>", "<|eos|>"]
    rows_of = loaded.get_input_embeddings().weight
    for token in ("<|user|>", "<|system|>", "<|eos|>"):  # the second is in no template text as it stands
        assert torch.equal(rows_of[tokenizer.convert_tokens_to_ids(token)], before[OLD.convert_tokens_to_ids(token)])
    made = loaded.generate(torch.tensor([ids[:-1]]), max_new_tokens=4, do_sample=False)
    assert made.shape[1] > len(ids) - 1 and int(made.max()) < len(tokenizer)
    for config in (loaded.config, loaded.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id and config.pad_token_id == tokenizer.pad_token_id


def test_the_old_template_is_written_with_the_new_special_tokens() -> None:
    """The new tokenizer ends texts with </s>, and has nothing that opens a turn."""
    old = tiny_tokenizer(chat_template=CHATML_TEMPLATE, eos_token="<|im_end|>")
    model = tiny_llama(len(old), eos_token_id=[7, 2])
    before = weights(model)[0]
    done = transplant(model, old=old, new=tiny_unigram())
    assert done.notes == () and tiny_unigram().chat_template is None
    text = done.tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text == old.apply_chat_template(TURNS, tokenize=False).replace("<|im_end|>", "</s>")
    ids = done.tokenizer.convert_tokens_to_ids(["</s>", "<|im_start|>"])
    assert end_of_turn(done.tokenizer, {}) == ids[0] and ids[1] == len(tiny_unigram())
    found = model.get_input_embeddings().weight
    assert torch.equal(found[ids], before[old.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])])
    assert model.config.eos_token_id == [ids[0]]  # <|eos|> went nowhere
    assert model.config.pad_token_id is None and model.get_input_embeddings().padding_idx is None


def test_a_template_that_is_no_longer_what_it_was_is_named() -> None:
    old = tiny_tokenizer(chat_template="{{ messages[0]['content'] }}{{ '\t' if 'bos' in bos_token else '' }}")
    done = transplant(tiny_llama(len(old)), old=old, new=tiny_unigram())
    assert len(done.notes) == 1 and "reads differently" in done.notes[0]
    old = tiny_tokenizer(chat_template=CHATML_TEMPLATE)
    lossy = words("?", "Hello", special=("</s>",), eos_token="</s>", unk_token="?")
    done = transplant(tiny_llama(len(old)), old=old, new=lossy)
    assert len(done.notes) == 1 and "does not know all of the chat template" in done.notes[0]


def test_a_template_of_its_own_stays_and_ends_turns_with_the_old_token() -> None:
    new = tiny_tokenizer(chat_template=CHATML_TEMPLATE.replace("<|im_end|>", "<end>"), vocab_size=300)
    new.add_tokens([AddedToken("<end>", special=True, normalized=False)], special_tokens=True)
    old = tiny_tokenizer(chat_template=CHATML_TEMPLATE)
    model = tiny_llama(len(old))
    model.generation_config = GenerationConfig(eos_token_id=[2, 7], bos_token_id=1, pad_token_id=0)
    before = weights(model)[0]
    done = transplant(model, old=old, new=new)
    end = new.convert_tokens_to_ids("<end>")
    assert done.tokenizer.chat_template == new.chat_template and len(done.tokenizer) == len(new)
    # <|im_end|> is in both and keeps its row, so that <end> is made of pieces
    assert torch.equal(model.get_input_embeddings().weight[7], before[7]) and int(done.plan.copied[end]) == -1
    assert model.generation_config.eos_token_id == [2, 7]


def test_an_end_of_turn_that_only_the_new_one_has_is_the_old_end_of_turn() -> None:
    new = PreTrainedTokenizerFast(tokenizer_object=tiny_unigram().backend_tokenizer, unk_token="<unk>", eos_token="</s>")
    new.add_tokens([AddedToken("<end>", special=True, normalized=False)], special_tokens=True)
    new.chat_template = CHATML_TEMPLATE.replace("<|im_end|>", "<end>")
    old = tiny_tokenizer(chat_template=CHATML_TEMPLATE)
    model = tiny_llama(len(old))
    model.generation_config = GenerationConfig(eos_token_id=[2, 7])
    done = transplant(model, old=old, new=new)
    end, eos = new.convert_tokens_to_ids(["<end>", "</s>"])
    assert (int(done.plan.copied[end]), int(done.plan.copied[eos])) == (7, 2)
    assert model.generation_config.eos_token_id == [eos, end]


def test_what_is_unknown_behind_a_turn_does_not_end_it() -> None:
    template = CHATML_TEMPLATE.replace("<|im_end|>", "<end>")
    new = words("<unk>", special=("<unk>", "<end>", "</s>"), eos_token="</s>", unk_token="<unk>", chat_template=template)
    done = transplant(tiny_llama(len(OLD)), old=tiny_tokenizer(chat_template=CHATML_TEMPLATE), new=new)
    assert int(done.plan.copied[new.unk_token_id]) == -1


def test_a_head_of_its_own_stays_one_in_a_vocabulary_of_the_same_size(tmp_path: Path) -> None:
    model = tiny_llama(len(OLD), tie_word_embeddings=True)
    transplant(model, old=OLD, new=OLD, untie=True)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    model.tie_weights()
    loaded, _ = saved(model, OLD, tmp_path)
    embeddings, head = weights(loaded)
    assert torch.equal(head, 2 * embeddings)


def test_an_end_of_text_is_added_where_there_is_none() -> None:
    new = PreTrainedTokenizerFast(tokenizer_object=tiny_unigram().backend_tokenizer, unk_token="<unk>")
    model = tiny_llama(len(OLD))
    done = transplant(model, old=tiny_tokenizer(chat_template=None), new=new)
    assert done.tokenizer.eos_token == "<|eos|>" and new.eos_token is None
    assert model.config.eos_token_id == done.tokenizer.eos_token_id < model.config.vocab_size


def test_padding_rows_are_never_the_likeliest() -> None:
    model = tiny_llama(len(OLD))
    done = transplant(model, old=OLD, new=tiny_unigram(), pad_to_multiple_of=64)
    size = len(done.tokenizer)
    assert model.config.vocab_size % 64 == 0 and 0 < model.config.vocab_size - size < 64
    found = logits(model, done.tokenizer.encode("She had apples."))
    assert (found[:, size:] < found[:, :size].max(1, keepdim=True).values).all()


def test_models_that_cannot_change_say_why() -> None:
    model = tiny_llama(len(OLD))
    model.config.is_causal = False
    with pytest.raises(ValueError, match="reads both ways"):
        transplant(model, old=OLD, new=tiny_unigram())
    del model.config.is_causal
    model.set_output_embeddings(None)
    with pytest.raises(ValueError, match="has no output embeddings"):
        transplant(model, old=OLD, new=tiny_unigram())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, unigram/ and rows.jsonl."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama(len(OLD), tie_word_embeddings=True).save_pretrained(root / "model")
    OLD.save_pretrained(root / "model")
    tiny_unigram().save_pretrained(root / "unigram")
    write_rows(root / "rows.jsonl", [conversation("How many apples?", "She had seven apples.")] * 3)
    return root


def cells(out: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    return dict(lines)


def test_the_command_writes_a_model_and_says_what_comes_next(kdlib: Command, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = {"model": models / "model", "tokenizer": models / "unigram", "dataset_name": models / "rows.jsonl"}
    done = kdlib("transplant", "--untie", output_dir=out, method="tokenadapt", pad_to_multiple_of=8, **asked)
    assert done.code == 0, done.err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert not model.config.tie_word_embeddings
    found = cells(done.out)
    counts = [int(found[name]) for name in ("tokens copied", "made of pieces", "made otherwise")]
    assert sum(counts) == len(tokenizer) and found["vocabulary"] == f"{len(OLD)} -> {model.config.vocab_size} rows"
    text = "How many apples?She had seven apples."
    ratios = [
        sum(len(t.encode(part)) for part in ("How many apples?", "She had seven apples.")) / len(text) for t in (OLD, tokenizer)
    ]
    assert found["tokens per byte"] == f"{ratios[0]:.3f} -> {ratios[1]:.3f} ({models / 'rows.jsonl'})"
    assert "are unknown" not in done.out
    [line] = [line for line in done.out.splitlines() if line.startswith("next")]
    words = shlex.split(line)[1:]
    assert words[:2] == ["kdlib", "distill"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--model"] == str(out) and given["--teacher"] == str(models / "model") and given["--objective"] == "ALM"
    assert given["--dataset_name"] == str(models / "rows.jsonl")
    again = kdlib("transplant", output_dir=out, **asked)
    assert again.code == 2 and again.err == f"kdlib transplant: output_dir {out} is not empty: choose another directory\n"


def test_to_bytes_by_name_and_what_a_tokenizer_does_not_know(kdlib: Command, models: Path, tmp_path: Path) -> None:
    done = kdlib("transplant", model=models / "model", tokenizer="bytes", output_dir=tmp_path / "bytes")
    assert done.code == 0, done.err
    assert cells(done.out)["made of pieces"] == "0" and "-> 1.000 (built-in sample)" in done.out and "unknown" not in done.out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bytes")
    assert tokenizer.chat_template == PLAIN_TEMPLATE and tokenizer.encode("é") == [0xC3, 0xA9]
    less = kdlib("transplant", model=models / "model", tokenizer=models / "unigram", output_dir=tmp_path / "unigram")
    assert less.code == 0 and "tokens are unknown" in less.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere/at/all"}, "no tokenizer at nowhere/at/all"),
        ({"tokenizer": "nowhere/at/all"}, "no tokenizer at nowhere/at/all"),
        ({"output_dir": "rows.jsonl"}, "rows.jsonl is not empty"),
        ({"output_dir": "model"}, "model is not empty"),
        ({"dataset_name": "missing.jsonl"}, "dataset missing.jsonl does not exist"),
        ({"dataset_name": "empty.jsonl"}, "has no text in its first 200 rows"),
        ({"pad_to_multiple_of": "0"}, "pad_to_multiple_of must be at least 1, not 0"),
        ({"method": "zett"}, "method: expected"),
        ({"model": "adapter"}, "adapter is an adapter: give the merged model"),
        ({"tokenizer": "strange"}, "the bytes of the tokens of TokenizersBackend are not known (a decoder of CTC)"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    kdlib: Command, models: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    from tokenizers import Tokenizer, decoders
    from tokenizers import models as kinds

    monkeypatch.chdir(models)
    Path("adapter").mkdir(exist_ok=True)
    Path("adapter", "adapter_config.json").write_text("{}")
    strange = Tokenizer(kinds.BPE(vocab={"a": 0}, merges=[]))
    strange.decoder = decoders.CTC()
    PreTrainedTokenizerFast(tokenizer_object=strange).save_pretrained("strange")
    write_rows(Path("empty.jsonl"), [{"number": 1}])
    before = tree(models)
    done = kdlib("transplant", **{"model": "model", "tokenizer": "unigram", "output_dir": "out", **options})
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert tree(models) == before


def test_every_option_is_on_the_page() -> None:
    found = rows((DOCS / "transplant.md").read_text(encoding="utf-8"))
    assert found == {name: shown_default(TransplantArguments, name) for name in docs(TransplantArguments)}
