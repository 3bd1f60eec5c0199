"""Packed Jacobi states against a loop over one block at a time, without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from kdlib.decoding import generate
from kdlib.decoding.jacobi import jacobi_generate
from kdlib.decoding.jacobi_init import Unknown
from kdlib.decoding.jacobi_states import PackedStates, packed_states
from kdlib.decoding.sampling import uniforms
from kdlib.types import SamplingParams
from tests.decoding.test_sampling import MODELS, V, prompts_of
from tests.tiny import tiny_llama

PROMPTS, COMPLETIONS = (5, 1, 9), (11, 14, 3)  # tokens of each row: last blocks of 3, 2 (or 6) and 3 tokens
SEEDS = [7, 8, 9]
Rows = list[tuple[list[int], list[int]]]  # prompt and completion


def greedy_rows(model: nn.Module, *, lengths: tuple[int, ...] = COMPLETIONS) -> Rows:
    prompts = prompts_of(PROMPTS)
    drawn = generate(model, prompts, SamplingParams(max_tokens=max(lengths), temperature=0.0), seeds=SEEDS, pad_token_id=0)
    return [(prompt, one.ids[:n]) for prompt, one, n in zip(prompts, drawn, lengths, strict=True)]


def packed(model: nn.Module, rows: Rows, **options: Any) -> PackedStates:
    longest = max(len(x) + len(y) for x, y in rows)
    ids = torch.tensor([x + y + [0] * (longest - len(x) - len(y)) for x, y in rows])
    mask = torch.tensor([[1] * (len(x) + len(y)) + [0] * (longest - len(x) - len(y)) for x, y in rows])
    lengths = torch.tensor([len(x) for x, _ in rows])
    return packed_states(model, ids, attention_mask=mask, prompt_lengths=lengths, **options)


@torch.no_grad()
def one_block(model: Any, prefix: list[int], state: list[int]) -> list[list[int]]:
    """The distinct states of a block after ``prefix``, from passes over prefix ++ state."""
    states = [state]
    while True:
        choice = model(input_ids=torch.tensor([prefix + states[-1]])).logits[0].argmax(-1).tolist()
        following = [state[0], *choice[len(prefix) : len(prefix) + len(state) - 1]]
        if following == states[-1]:
            return states
        states.append(following)


def initial(init: str, prompt: list[int], block: list[int], *, start: int, seed: int) -> list[int]:
    places = range(start + 1, start + len(block))
    u = uniforms(seed, start + len(block)).tolist()
    guess = {
        "prompt": [prompt[p % len(prompt)] for p in places],
        "last": [block[0] for _ in places],
        "random": [prompt[int(u[p] * len(prompt))] for p in places],
    }
    return [block[0], *guess[init]]


def kept(output: PackedStates, row: int, block: int) -> list[list[int]]:
    """The states of a block as far as it has tokens, until the first that repeats."""
    states = output.states[:, row, block, : int(output.lengths[row, block])].tolist()
    distinct = [states[0]]
    for state in states[1:]:
        if state != distinct[-1]:
            distinct.append(state)
    return distinct


def check_rows(model: nn.Module, rows: Rows, output: PackedStates, *, block_size: int, init: str) -> None:
    for row, (prompt, completion) in enumerate(rows):
        starts = range(0, len(completion), block_size)
        assert (output.lengths[row] > 0).sum() == len(starts)
        for number, start in enumerate(starts):
            block = completion[start : start + block_size]
            first = initial(init, prompt, block, start=start, seed=SEEDS[row])
            expected = one_block(model, prompt + completion[:start], first)
            assert kept(output, row, number) == expected
            assert output.lengths[row, number] == len(block)
            assert output.iterations[row, number] == len(expected)
            assert output.converged[row, number] == (expected[-1] == block)
    longest = int(output.iterations.max())
    # a block needs no pass to put its last token right, nor to show that it is the text: the pass over the text says both
    assert longest - 2 <= output.forwards <= longest


@pytest.mark.parametrize("init", ["prompt", "random", "last"])
@pytest.mark.parametrize("name", list(MODELS))
def test_packed_states_are_those_of_one_block_alone(name: str, init: str) -> None:
    model = MODELS[name]()
    rows = greedy_rows(model)
    for block_size in (4, 12):
        output = packed(model, rows, block_size=block_size, init=init, seeds=SEEDS)
        check_rows(model, rows, output, block_size=block_size, init=init)
        assert output.converged[output.lengths > 0].all()
        assert output.iterations.max() <= block_size


@pytest.mark.parametrize("init", ["prompt", "random"])
def test_packed_states_are_those_of_jacobi_decoding(init: str) -> None:
    model, prompts = tiny_llama(V), prompts_of(PROMPTS)
    longest = max(PROMPTS)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"attention_mask": mask, "max_new_tokens": 14, "block_size": 4, "stop_at_eos": False}
    decoded = jacobi_generate(model, ids, init=init, seeds=SEEDS, return_trajectories=True, **options)
    rows = [(prompt, new[longest:].tolist()) for prompt, new in zip(prompts, decoded.sequences, strict=True)]
    output = packed(model, rows, block_size=4, init=init, seeds=SEEDS)
    assert decoded.trajectories is not None and output.converged.all()
    for row, blocks in enumerate(decoded.trajectories):
        assert [kept(output, row, number) for number in range(4)] == [block.tolist() for block in blocks]


def test_a_text_that_the_model_would_not_write_converges_to_something_else() -> None:
    model, prompts = tiny_llama(V), prompts_of(PROMPTS)
    rows = list(zip(prompts, prompts_of(COMPLETIONS, seed=1), strict=True))
    output = packed(model, rows, block_size=4, seeds=SEEDS)
    check_rows(model, rows, output, block_size=4, init="prompt")
    assert not output.converged[:, 0].any()


def test_an_iteration_limit_ends_with_what_the_state_is_then() -> None:
    model = tiny_llama(V)
    rows = greedy_rows(model)
    whole = packed(model, rows, block_size=12)
    cut = packed(model, rows, block_size=12, max_iterations=3)
    assert whole.iterations.max() > 3 == cut.forwards and cut.iterations.max() == 3
    assert torch.equal(cut.states, whole.states[:4])
    assert not cut.converged[0, 0] and whole.converged[0, 0]


def test_a_block_of_one_token_is_known_and_rows_without_padding_need_no_mask() -> None:
    model = tiny_llama(V)
    [(prompt, completion)] = greedy_rows(model)[:1]
    ids = torch.tensor([prompt + completion[:1]])
    output = packed_states(model, ids, prompt_lengths=torch.tensor([len(prompt)]), block_size=4)
    assert (output.forwards, output.iterations.tolist(), output.converged.tolist()) == (0, [[1]], [[True]])
    assert output.states[:, 0, 0, 0].tolist() == completion[:1]


def test_a_function_gives_the_initial_state() -> None:
    model, seen = tiny_llama(V), []

    def init(unknown: Unknown) -> Tensor:
        seen.append(unknown)
        return unknown.position % V

    rows = greedy_rows(model)
    output = packed(model, rows, block_size=4, init=init)
    assert output.states[0, 0, 1].tolist() == [rows[0][1][4], 5, 6, 7]
    assert seen[0].prompts[1, -1] == rows[1][0][0] and seen[0].lengths.tolist() == list(PROMPTS)
    assert seen[0].last[0, :12].tolist() == [token for token in rows[0][1][::4] for _ in range(4)]


def test_gradient_and_training_mode_are_left_alone() -> None:
    model = tiny_llama(V, attention_dropout=0.5).train()
    rows = greedy_rows(model.eval())
    quiet = packed(model, rows, block_size=4)
    assert torch.equal(packed(model.train(), rows, block_size=4).states, quiet.states)
    assert model.training and not quiet.states.requires_grad


def test_bfloat16_chooses_as_the_model_itself() -> None:
    """Two logits that are equal in 16 bits: the model takes the first of them, whatever they would be in 32."""
    model: Any = tiny_llama(V).bfloat16()
    head = model.get_output_embeddings().weight
    head.data[48:] = head.data[:48]
    head.data[48:, :2] *= 1.0078125  # a step of bfloat16 in two places of 32: less than most of the logits can show
    rows = greedy_rows(model, lengths=(60, 60, 60))
    output = packed(model, rows, block_size=4)
    assert output.converged.sum() > 0.6 * (output.lengths > 0).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 1}, "block_size 1"),
        ({"block_size": 0}, "block_size 0"),
        ({"prompt_lengths": torch.tensor([3, 0])}, "row 1 has no prompt"),
        ({"prompt_lengths": torch.tensor([6, 3])}, "row 0 has no tokens after"),
        ({"init": "zeros"}, "choose prompt, random, last"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    options = {"prompt_lengths": torch.tensor([3, 3]), "block_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        packed_states(tiny_llama(V), torch.randint(3, V, (2, 6)), **options)


def test_a_recurrent_model_is_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="attention"):
        packed_states(mamba, torch.randint(3, V, (1, 6)), prompt_lengths=torch.tensor([3]), block_size=4)
