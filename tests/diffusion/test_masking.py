"""Ways of masking: what each draws, and that a row's noise is its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from kdlib.diffusion import Noise, Rows
from kdlib.diffusion.masking import KINDS, Draws, Masking

every_kind = pytest.mark.parametrize("kind", KINDS)
Row = tuple[int, int, int]  # tokens of prompt and of response, seed

ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(0, 99)), min_size=1, max_size=4)
BLOCKS = st.integers(1, 12)
PROGRESS = st.floats(0.0, 1.0)
few = settings(max_examples=40, deadline=None)


def made(rows: list[Row], *, left: int = 0, right: int = 0, before: bool = False) -> Rows:
    """Rows of one turn, the shortest padded most on both sides; each row's tokens and steps follow from its seed alone."""
    width = left + right + max(prompt + response for prompt, response, _ in rows)
    ids, maskable, steps = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (prompt, response, seed) in enumerate(rows):
        generator = torch.Generator().manual_seed(seed + 1000)
        own = slice(left + prompt, left + prompt + response)
        ids[i, own] = torch.randint(5, 50, (response,), generator=generator)
        steps[i, own] = torch.randint(0, 6, (response,), generator=generator)
        maskable[i, own] = 1
    where = maskable.bool()
    rank = torch.where(where, maskable.cumsum(1) - 1, -1)
    start = torch.tensor([prompt for prompt, _, _ in rows]) if before else None
    return Rows(ids=ids, maskable=where, rank=rank, length=where.sum(1), commit_step=steps, before=start)


def noise(rows: list[Row], masking: Masking, *, progress: float = 0.5, **padding: int | bool) -> Noise:
    tokens = made(rows, **padding)  # type: ignore[arg-type]
    return masking.noise(tokens, Draws.of([seed for _, _, seed in rows], length=tokens.length), progress=progress)


def by_rank(found: Tensor, rows: Rows, row: int) -> list[float]:
    return found[row][rows.maskable[row]].tolist()


@every_kind
@few
@given(rows=ROWS, block=BLOCKS, progress=PROGRESS, left=st.integers(0, 3), right=st.integers(0, 3), before=st.booleans())
def test_a_rows_noise_depends_on_nothing_else(
    kind: str, rows: list[Row], block: int, progress: float, left: int, right: int, before: bool
) -> None:
    masking = Masking(kind=kind, block_length=block)
    together = noise(rows, masking, progress=progress, left=left, right=right, before=before)
    for i, row in enumerate(rows):
        alone = noise([row], masking, progress=progress, before=before)
        for name in ("segment", "tail"):
            assert by_rank(getattr(together, name), together.rows, i) == by_rank(getattr(alone, name), alone.rows, 0)
        assert by_rank(together.masked(), together.rows, i) == by_rank(alone.masked(), alone.rows, 0)
        assert by_rank(together.p, together.rows, i) == pytest.approx(by_rank(alone.p, alone.rows, 0), rel=1e-5)
        assert together.v[i] == alone.v[0]


@every_kind
@few
@given(rows=ROWS, block=BLOCKS, shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_views_of_one_noise(kind: str, rows: list[Row], block: int, shares: tuple[float, float]) -> None:
    found = noise(rows, Masking(kind=kind, block_length=block))
    whole, rest = found.masked(), found.complement
    assert not (whole & rest).any() and torch.equal(whole | rest, found.segment)
    assert not (found.segment & found.tail).any() and not ((found.segment | found.tail) & ~found.rows.maskable).any()
    assert torch.equal(found.segment.any(1), found.rows.length > 0), "a segment is empty where there is nothing to mask alone"
    less, more = (found.masked(share) for share in sorted(shares))
    assert not (less & ~more).any() and not (more & ~whole).any() and not found.masked(0.0).any()
    assert bool(((found.u >= 0) & (found.u < 1))[found.segment].all())


@few
@given(rows=ROWS, block=BLOCKS, before=st.booleans())
def test_a_segment_is_one_block(rows: list[Row], block: int, before: bool) -> None:
    found = noise(rows, Masking(kind="blocks", block_length=block), before=before)
    for i, (prompt, length, _) in enumerate(rows):
        offset = prompt % block if before else 0
        inside = [rank for rank, chosen in enumerate(by_rank(found.segment, found.rows, i)) if chosen]
        whole = [[rank for rank in range(length) if (rank + offset) // block == k] for k in range(length + 1)]
        assert inside in [ranks for ranks in whole if ranks] or not length
        tail = by_rank(found.tail, found.rows, i)
        assert tail == [rank > inside[-1] for rank in range(length)] if inside else not any(tail)


def test_every_block_is_as_likely() -> None:
    rows, block = 6000, 16
    tokens = made([(1, 70, 0)] * rows)
    generator = torch.Generator().manual_seed(5)
    draws = Draws(row=torch.rand(rows, 3, generator=generator), block=torch.rand(rows, 70), token=torch.rand(rows, 70))
    found = Masking(kind="blocks", block_length=block).noise(tokens, draws, progress=0.0)
    first = torch.where(found.segment, tokens.rank, 70).min(1).values // block
    counts = torch.bincount(first, minlength=5)
    assert len(counts) == 5 and chisquare(counts.numpy()).pvalue > 0.001


def test_the_last_block_is_reached_by_a_draw_that_rounds_up() -> None:
    tokens = made([(0, 3, 0)])
    draws = Draws(row=torch.full((1, 3), 1.0 - 2**-24), block=torch.zeros(1, 3), token=torch.zeros(1, 3))
    found = Masking(kind="blocks", block_length=1).noise(tokens, draws, progress=0.0)
    assert found.segment.tolist() == [[False, False, True]]


def test_the_shares_of_masked_tokens() -> None:
    rows, length = 400, 64
    tokens = made([(0, length, 0)] * rows)
    generator = torch.Generator().manual_seed(1)
    draws = Draws(
        row=torch.rand(rows, 3, generator=generator),
        block=torch.rand(rows, length, generator=generator),
        token=torch.rand(rows, length, generator=generator),
    )
    for kind, share in (("response", 0.3), ("blocks", 0.3 * 0.999 + 0.001)):
        found = Masking(kind=kind, mask_ratio=0.3, block_length=16).noise(tokens, draws, progress=0.0)
        assert torch.allclose(found.p[found.segment], torch.tensor(share))
        chosen = int(found.segment.sum())
        assert abs(found.masked().sum().item() - share * chosen) < 4 * math.sqrt(share * (1 - share) * chosen)
    uniform = Masking().noise(tokens, draws, progress=0.0)
    assert torch.allclose(uniform.p, 0.999 * draws.row[:, :1] + 0.001) and torch.equal(uniform.segment, tokens.maskable)
    per_block = Masking(kind="per_block", block_length=10).noise(tokens, draws, progress=0.0)
    for rank in range(length):
        assert torch.allclose(per_block.p[:, rank], 0.999 * draws.block[:, rank // 10] + 0.001)


@few
@given(rows=ROWS, block=BLOCKS)
def test_monotone_shares_rise_as_in_the_published_code(rows: list[Row], block: int) -> None:
    tokens = made(rows)
    draws = Draws.of([seed for _, _, seed in rows], length=tokens.length)
    found = Masking(kind="monotone", block_length=block).noise(tokens, draws, progress=0.0)
    for i, (_, length, _) in enumerate(rows):
        blocks = math.ceil(length / block)
        wanted, share = [], 0.2 + 0.5 * float(draws.row[i, 0])
        first = share
        for k in range(blocks):
            if k:
                share += float(draws.block[i, k]) * (0.7 - first) / (blocks - 1)
            wanted += [share] * min(block, length - k * block)
        shares = by_rank(found.p, tokens, i)
        assert shares == pytest.approx(wanted, rel=1e-4)
        assert shares == sorted(shares) and all(0.2 <= share <= 0.7 + 1e-6 for share in shares)


@few
@given(rows=ROWS, block=BLOCKS, progress=PROGRESS, least=st.floats(0, 1), most=st.floats(0, 1))
def test_a_trajectory_is_masked_from_its_end(rows: list[Row], block: int, progress: float, least: float, most: float) -> None:
    least, most = sorted((least, most))
    tokens = made(rows, left=1)
    draws = Draws.of([seed for _, _, seed in rows], length=tokens.length)
    masking = Masking(kind="trajectory", block_length=block, ratio_range=(least, most))
    found = masking.noise(tokens, draws, progress=progress)
    assert tokens.commit_step is not None
    for i in range(len(rows)):
        inside = [c for c in range(tokens.ids.shape[1]) if found.segment[i, c]]
        if not inside:
            continue
        low = least + (most - least) * progress
        ratio = low + (most - low) * draws.row[i, 1]
        number = min(len(inside), max(1, math.floor(float(ratio * len(inside) + 0.5))))

        def last_first(column: int, i: int = i) -> tuple[float, float]:
            step = int(tokens.commit_step[i, column])  # type: ignore[index]
            return -(step or math.inf), float(draws.token[i, tokens.rank[i, column]])

        wanted = sorted(inside, key=last_first)[:number]
        assert found.masked()[i].nonzero().flatten().tolist() == sorted(wanted)
        half = found.masked(0.5)[i].nonzero().flatten().tolist()
        assert set(half) == set(sorted(inside, key=last_first)[: len(half)]) and abs(len(half) - number / 2) <= 0.5


def test_ratios_rise_over_training() -> None:
    rows = [(0, 10, seed) for seed in range(40)]
    masking = Masking(kind="trajectory", block_length=10, ratio_range=(0.0, 0.8))
    early, late = ({int(n) for n in noise(rows, masking, progress=p).masked().sum(1)} for p in (0.0, 1.0))
    assert min(early) == 1 and max(early) <= 8 and len(early) > 4 and late == {8}


def test_block_lengths_follow_the_schedule() -> None:
    masking = Masking(kind="blocks", block_schedule=(16, 24, 32))
    assert [masking.block_length_at(p) for p in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [16, 16, 24, 24, 32, 32]
    rows = [(0, 96, seed) for seed in range(8)]
    assert set(noise(rows, masking, progress=1.0).segment.sum(1).tolist()) == {32}


def test_ranks_run_over_all_turns() -> None:
    maskable = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0]]).bool()
    rank = torch.where(maskable, maskable.cumsum(1) - 1, -1)
    tokens = Rows(ids=torch.zeros(1, 9, dtype=torch.long), maskable=maskable, rank=rank, length=maskable.sum(1))
    seen = set()
    for seed in range(20):
        found = Masking(kind="blocks", block_length=3).noise(tokens, Draws.of([seed], length=tokens.length), progress=0.0)
        seen.add(tuple(found.segment[0].nonzero().flatten().tolist()))
    assert seen == {(1, 2, 5), (6, 7)}


def test_draws_are_a_rows_own_and_uniform() -> None:
    lengths = torch.tensor([3, 0, 500])
    draws = Draws.of([4, 5, 6], length=lengths)
    alone = Draws.of([6], length=lengths[2:])
    assert draws.token.shape == draws.block.shape == (3, 500) and draws.row.shape == (3, 3)
    assert torch.equal(draws.token[2], alone.token[0]) and torch.equal(draws.block[2], alone.block[0])
    assert not draws.token[0, 3:].any() and not torch.equal(draws.token[2], draws.block[2])
    assert abs(draws.token[2].mean().item() - 0.5) < 0.06
    assert Draws.of([1], length=torch.tensor([0])).token.shape == (1, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "nonsense"}, "masking 'nonsense': choose uniform, response, blocks"),
        ({"mask_ratio": 0.0}, "mask_ratio must be above 0"),
        ({"ratio_range": (0.5, 0.2)}, "ratio_range needs"),
        ({"block_length": 0}, "at least 1"),
        ({"block_schedule": ()}, "block_schedule is empty"),
        ({"block_schedule": (16, 0)}, "at least 1"),
        ({"eps": 0.0}, "eps must be above 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "options",
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Masking(**options)  # type: ignore[arg-type]


def test_trajectory_needs_commit_steps() -> None:
    tokens = made([(1, 4, 0)])
    bare = Rows(ids=tokens.ids, maskable=tokens.maskable, rank=tokens.rank, length=tokens.length)
    with pytest.raises(ValueError, match="commit_step: write them with kdlib trajectories diffusion"):
        Masking(kind="trajectory").noise(bare, Draws.of([0], length=bare.length), progress=0.0)
