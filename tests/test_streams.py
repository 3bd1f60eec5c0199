"""A packed forward pass against separate plain passes over each continuation alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kdlib.models import hidden_states, inner
from kdlib.streams import CLEAN, PADDING, Streams, attention_mask
from tests.tiny import tiny_llama

V = 64
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
QWEN = {**SMALL, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
GEMMA = {**SMALL, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2}


def made(kind: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = kind(config)
    return model.eval().double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny_llama(V).double(),
    "llama, eager": lambda: tiny_llama(V, attn_implementation="eager").double(),
    "mistral, window 6": lambda: made(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=6)),
    "mistral, window 6, eager": lambda: made(
        MistralForCausalLM, MistralConfig(**SMALL, sliding_window=6, attn_implementation="eager")
    ),
    "qwen2, one full layer": lambda: made(Qwen2ForCausalLM, Qwen2Config(**QWEN)),
    "qwen2, windows throughout": lambda: made(Qwen2ForCausalLM, Qwen2Config(**{**QWEN, "max_window_layers": 0})),
    "qwen2, window unused": lambda: made(Qwen2ForCausalLM, Qwen2Config(**{**QWEN, "use_sliding_window": False})),
    "gemma 3, windows of 4": lambda: made(Gemma3ForCausalLM, Gemma3TextConfig(**GEMMA)),
    "gemma 3, windows of 4, eager": lambda: made(Gemma3ForCausalLM, Gemma3TextConfig(**GEMMA, attn_implementation="eager")),
    "gpt2, learned positions": lambda: made(
        GPT2LMHeadModel, GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    ),
}
# eager attention takes its softmax in float32 whatever the weights are
TOLERANCE = {name: 1e-5 if "eager" in name or "gemma" in name or "gpt2" in name else 1e-11 for name in MODELS}


@dataclass(frozen=True)
class Piece:
    """Tokens of stream ``stream`` that start at ``start`` and see the clean text before ``clean_until``."""

    tokens: list[int]
    start: int
    stream: int
    clean_until: int


Line = list[Piece]


def draw(count: int, *, seed: int) -> list[int]:
    return torch.randint(3, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def cllm(text: list[int], *, prompt: int, n: int) -> Line:
    """Every block has two states of its own, each after the clean text."""
    pieces = [Piece(text, 0, CLEAN, 0)]
    for block, start in enumerate(range(prompt, len(text), n)):
        length = min(n, len(text) - start)
        for copy in range(2):
            stream = 1 + 2 * block + copy
            pieces.append(Piece(draw(length, seed=100 + stream), start, stream, start))
    return pieces


def forcing(text: list[int], *, prompt: int, n: int, window: int) -> Line:
    """The blocks of a window are one stream, after the text before the window."""
    pieces = [Piece(text, 0, CLEAN, 0)]
    for block, start in enumerate(range(prompt, len(text), n)):
        length, number = min(n, len(text) - start), block // window
        pieces.append(Piece(draw(length, seed=200 + block), start, 1 + number, prompt + number * window * n))
    return pieces


def packed(lines: list[Line], *, extra: int = 0, shuffle: bool = False) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    """The batch, with ``extra`` columns of padding, and each piece's columns; ``shuffle`` mixes the columns."""
    width = max(sum(len(piece.tokens) for piece in line) for line in lines) + extra
    shape = (len(lines), width)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long), "position_ids": torch.zeros(shape, dtype=torch.long)}
    batch |= {"stream": torch.full(shape, PADDING), "clean_until": torch.zeros(shape, dtype=torch.long)}
    places: list[list[Tensor]] = []
    for row, line in enumerate(lines):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(row)) if shuffle else torch.arange(width)
        used, of_row = 0, []
        for piece in line:
            columns = order[used : used + len(piece.tokens)]
            batch["input_ids"][row, columns] = torch.tensor(piece.tokens)
            batch["position_ids"][row, columns] = piece.start + torch.arange(len(piece.tokens))
            batch["stream"][row, columns] = piece.stream
            batch["clean_until"][row, columns] = piece.clean_until
            of_row.append(columns)
            used += len(piece.tokens)
        places.append(of_row)
    return batch, places


def alone(model: nn.Module, line: Line, piece: Piece) -> Tensor:
    """What the decoder says of a piece in a plain pass over all that it should see."""
    text = line[0].tokens
    seen = dict(enumerate(text[: piece.clean_until]))
    for other in line:
        if other.stream == piece.stream:
            seen |= {other.start + i: token for i, token in enumerate(other.tokens)}
    end = piece.start + len(piece.tokens)
    ids = torch.tensor([[seen[place] for place in range(end)]])
    return inner(model).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, piece.start :]


def lines_of(layout: str) -> list[Line]:
    """Three rows of unequal length, the last block of two of them partial."""
    texts = [draw(length, seed=length) for length in (17, 10, 14)]
    if layout == "text":
        return [[Piece(text, 0, CLEAN, 0)] for text in texts]
    if layout == "cllm":
        return [cllm(text, prompt=3, n=4) for text in texts]
    return [forcing(text, prompt=3, n=3, window=2) for text in texts]


def assert_equals_separate_passes(model: nn.Module, lines: list[Line], *, tolerance: float, **how: Any) -> None:
    batch, places = packed(lines, **how)
    found = hidden_states(model, batch)[0]
    assert found.isfinite().all()
    for row, line in enumerate(lines):
        for piece, columns in zip(line, places[row], strict=True):
            torch.testing.assert_close(found[row, columns], alone(model, line, piece), rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["text", "cllm", "forcing"])
@pytest.mark.parametrize("name", list(MODELS))
def test_each_stream_is_read_as_if_alone(name: str, layout: str) -> None:
    assert_equals_separate_passes(MODELS[name](), lines_of(layout), tolerance=TOLERANCE[name], extra=2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral, window 6", "gemma 3, windows of 4"])
def test_columns_have_no_order(name: str) -> None:
    for layout in ("cllm", "forcing"):
        assert_equals_separate_passes(MODELS[name](), lines_of(layout), tolerance=TOLERANCE[name], extra=3, shuffle=True)


@torch.no_grad()
def test_the_layouts_differ_in_what_they_see() -> None:
    """A check of the oracle: a noisy block says something else after noisy ones than after clean ones."""
    model, text = MODELS["llama"](), draw(17, seed=17)
    noisy = forcing(text, prompt=3, n=3, window=2)
    second = noisy[2]
    after_clean = Piece(second.tokens, second.start, 9, second.start)
    difference = alone(model, noisy, second) - alone(model, [noisy[0], after_clean], after_clean)
    assert (difference.abs().amax(-1) > 1e-3).all()


def gradients(model: nn.Module, batch: dict[str, Tensor], scored: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    hidden_states(model, batch)[0][scored].square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "llama, eager", "mistral, window 6", "gemma 3, windows of 4"])
def test_padding_leaves_values_and_gradients_alone(name: str) -> None:
    """Whatever ids and positions stand in padded columns."""
    model, lines = MODELS[name](), lines_of("cllm")
    batch, _ = packed(lines)
    wide, _ = packed(lines, extra=7)
    pads = wide["stream"] == PADDING
    wide["input_ids"][pads] = V - 1
    wide["position_ids"][pads] = torch.arange(int(pads.sum()))
    expected = gradients(model, batch, batch["stream"] != PADDING)
    found = gradients(model, wide, ~pads)
    assert expected.keys() == found.keys() and len(found) > 10
    for key, value in expected.items():
        assert value.isfinite().all()
        torch.testing.assert_close(found[key], value, rtol=TOLERANCE[name], atol=100 * TOLERANCE[name], msg=key)


def test_a_loss_on_padding_itself_has_finite_gradients() -> None:
    for name in ("llama", "llama, eager"):
        batch, _ = packed(lines_of("forcing"), extra=4)
        found = gradients(MODELS[name](), batch, torch.ones_like(batch["stream"], dtype=torch.bool))
        assert all(value.isfinite().all() for value in found.values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama, eager", "mistral, window 6", "qwen2, one full layer"])
def test_cached_keys_with_queries_of_their_own(name: str) -> None:
    """The text's keys are computed once; then only the noisy columns are read."""
    model, lines = MODELS[name](), lines_of("cllm")
    batch, _ = packed(lines, extra=1)
    whole = hidden_states(model, batch)[0]
    every = Streams(position=batch["position_ids"], stream=batch["stream"], clean_until=batch["clean_until"])
    S = min(len(line[0].tokens) for line in lines)  # columns of clean text in all rows
    cache, decoder, config = DynamicCache(), model.get_decoder(), model.config  # type: ignore[operator]
    for columns in (slice(0, S), slice(S, None)):
        queries, keys = every[columns], every[: columns.stop]
        found = decoder(
            input_ids=batch["input_ids"][:, columns],
            attention_mask=attention_mask(config, queries=queries, keys=keys),
            position_ids=queries.position,
            past_key_values=cache,
        ).last_hidden_state
        seen = queries.stream != PADDING
        torch.testing.assert_close(found[seen], whole[:, columns][seen], rtol=TOLERANCE[name], atol=TOLERANCE[name])


@torch.no_grad()
def test_sdpa_equals_eager() -> None:
    for first, second in (("llama", "llama, eager"), ("gemma 3, windows of 4", "gemma 3, windows of 4, eager")):
        for layout in ("cllm", "forcing"):
            batch, _ = packed(lines_of(layout), extra=2)
            used = batch["stream"] != PADDING
            found, expected = (hidden_states(MODELS[name](), batch)[0][used] for name in (first, second))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_stays_close(attention: str) -> None:
    batch, _ = packed(lines_of("forcing"), extra=2)
    expected = hidden_states(tiny_llama(V), batch)[0]
    found = hidden_states(tiny_llama(V, attn_implementation=attention).bfloat16(), batch)[0]
    used = batch["stream"] != PADDING
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert (found.float() - expected)[used].abs().mean() < 0.03 * expected[used].abs().mean()


def windowed() -> nn.Module:
    return made(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=6)).float()


def mixed() -> nn.Module:
    return made(Gemma3ForCausalLM, Gemma3TextConfig(**GEMMA)).float()


@torch.no_grad()
def flex_close_to_sdpa(model: nn.Module) -> None:
    """Noisy context and padding through the compiled kernel."""
    batch, _ = packed(lines_of("forcing"), extra=2)
    batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
    used = batch["stream"] != PADDING
    expected = hidden_states(model, batch)[0][used]
    model.config._attn_implementation = "flex_attention"  # type: ignore[union-attr]
    found = hidden_states(model, batch)[0][used]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention on CPU is compiled with g++")
def test_flex_attention() -> None:
    flex_close_to_sdpa(windowed())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", [windowed, mixed])
def test_flex_attention_on_a_gpu(model: Callable[[], nn.Module]) -> None:
    flex_close_to_sdpa(model().cuda())


def streams(length: int = 4) -> Streams:
    place = torch.arange(length)[None]
    return Streams(position=place, stream=torch.zeros_like(place), clean_until=torch.zeros_like(place))


def test_flash_attention_takes_no_such_mask() -> None:
    config = tiny_llama(V).config
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attn_implementation sdpa, eager or flex_attention, not flash_attention_2"):
        attention_mask(config, queries=streams(), keys=streams())


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention"])
def test_layers_of_another_kind_are_refused(kind: str) -> None:
    config = tiny_llama(V).config
    config.layer_types = ["full_attention", kind]
    with pytest.raises(ValueError, match=f"need attention layers, not {kind}"):
        attention_mask(config, queries=streams(), keys=streams())


def test_columns_are_cut_together() -> None:
    whole = Streams(position=torch.arange(6).view(2, 3), stream=torch.ones(2, 3), clean_until=torch.zeros(2, 3))
    part = whole[1:]
    assert part.position.tolist() == [[1, 2], [4, 5]] and part.stream.shape == part.clean_until.shape == (2, 2)
