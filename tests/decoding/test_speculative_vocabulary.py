"""Which tokens two tokenizers share, and greedy decoding with a draft that has another tokenizer."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kdlib.decoding import generate
from kdlib.decoding.spec_vocabulary import SharedVocabulary
from kdlib.decoding.speculative import speculative_generate
from kdlib.types import SamplingParams
from tests.decoding.test_sampling import prompts_of
from tests.decoding.test_speculative import new_tokens, padded
from tests.tiny import tiny_llama, tiny_tokenizer


def sentencepiece_like(*words: str, **roles: str) -> PreTrainedTokenizerFast:
    names = ["<unk>", "<s>", "</s>", *words]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **roles)


def test_tokens_are_shared_by_bytes_and_by_role() -> None:
    ours = tiny_tokenizer()
    theirs = sentencepiece_like("\u2581the", "<0x0A>", "s", "\u2581", "nobody", "\u00e9")
    shared = SharedVocabulary(ours, theirs, sizes=(len(ours), len(theirs)))
    pairs = dict(zip(shared.target_ids.tolist(), shared.draft_ids.tolist(), strict=True))
    spelled = {ours.decode([a]): theirs.convert_ids_to_tokens(b) for a, b in pairs.items()}
    # é is two bytes, which no token of ours holds together; eos and bos differ in name
    assert spelled == {" the": "\u2581the", "\n": "<0x0A>", "s": "s", " ": "\u2581", "<|bos|>": "<s>", "<|eos|>": "</s>"}
    assert shared.to_draft(torch.tensor([[1, 2, 0]])).tolist() == [[1, 2, 0]]  # pad is none of theirs: shown as <unk>
    logits = torch.arange(9.0)[None]
    mapped = shared.to_target(logits)
    assert mapped.shape == (1, len(ours)) and int(mapped.isfinite().sum()) == 6
    assert mapped[0, ours.convert_tokens_to_ids("\u0120the")] == 3


def test_too_little_in_common_is_an_error() -> None:
    with pytest.raises(ValueError, match="share 2 of the target's"):
        SharedVocabulary(tiny_tokenizer(), sentencepiece_like("nobody"), sizes=(384, 4))
    lonely = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(ValueError, match="neither an unk nor an eos"):
        SharedVocabulary(tiny_tokenizer(), lonely, sizes=(384, 1))


def test_tokens_beyond_the_logits_are_not_shared() -> None:
    tokenizer = tiny_tokenizer()
    shared = SharedVocabulary(tokenizer, tokenizer, sizes=(300, 280))
    assert shared.target_ids.tolist() == shared.draft_ids.tolist() == list(range(280))


@pytest.mark.parametrize("gamma", [1, 4])
def test_greedy_tokens_are_the_targets_own(gamma: int) -> None:
    ours, theirs = tiny_tokenizer(), tiny_tokenizer(vocab_size=300, eos_token="<|im_end|>")
    target, draft = tiny_llama(len(ours)), tiny_llama(len(theirs) + 4)  # a padded vocabulary
    prompts = [*prompts_of(), ours("The answer is four.")["input_ids"]]
    params = SamplingParams(max_tokens=20, temperature=0.0, stop_ids=(2,))
    expected = [one.ids for one in generate(target, prompts, params, seeds=range(7), pad_token_id=0)]
    output = speculative_generate(
        target, draft, **padded(prompts), max_new_tokens=20, gamma=gamma, tokenizer=ours, draft_tokenizer=theirs
    )
    assert new_tokens(output, prompts) == expected


def test_the_same_model_under_renumbered_tokens_accepts_everything() -> None:
    names = [f"w{i}" for i in range(60)]
    ours, theirs = sentencepiece_like(*names), sentencepiece_like(*reversed(names))
    target, draft = tiny_llama(63), tiny_llama(63)
    order = torch.tensor([0, 1, 2, *range(62, 2, -1)])  # theirs[i] is ours[order[i]]
    for module in (draft.model.embed_tokens, draft.lm_head):
        module.weight.data = module.weight.data[order]
    ids = torch.tensor([[5, 40, 7], [9, 60, 3]])
    for given in ({}, {"temperature": 0.9, "top_p": 0.9, "seeds": (0, 1)}):
        options = {"max_new_tokens": 20, "gamma": 3, "stop_ids": (), **given}
        output = speculative_generate(target, draft, ids, tokenizer=ours, draft_tokenizer=theirs, **options)
        assert output.acceptance_rate == 1
        assert speculative_generate(target, draft, ids, **options).acceptance_rate < 0.5  # by number they mean other words
