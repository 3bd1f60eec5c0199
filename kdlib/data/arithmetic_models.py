"""A tokenizer and two small Llama models for the arithmetic problems, made from nothing but the generator."""

from __future__ import annotations

from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdlib.data.arithmetic import make_problems

PIECES = r"\n| ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]+|\s"
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "teacher": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
    "student": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token per word of the generator (with its leading space) and per digit."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words: set[str] = set()
    for problem in make_problems(2000, seed=0, split="train", slips=0.5):
        for message in problem["messages"]:
            words.update(piece for piece, _ in splitter.pre_tokenize_str(message["content"]))
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(sorted(letters) + sorted(words - letters))}
    backend = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(kind: Literal["teacher", "student"], tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings: about 0.7M parameters for the teacher, 0.13M for the student."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES[kind],
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,  # the default suits models that are many times wider
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
