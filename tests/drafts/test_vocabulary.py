"""Draft vocabularies: who is in, in which order, and that the maps of a checkpoint say the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdlib.drafts.vocabulary import DraftVocabulary, draft_vocabulary, restricted
from kdlib.head import Head


def test_the_most_frequent_win_ties_go_to_the_lower_id_and_room_is_filled_from_below() -> None:
    counts = torch.tensor([0, 5, 1, 1, 0, 9, 1])
    assert draft_vocabulary(counts, 3, vocab_size=8).ids.tolist() == [1, 2, 5]
    assert draft_vocabulary(counts, 4, vocab_size=8).ids.tolist() == [1, 2, 3, 5]
    assert draft_vocabulary(counts, 7, vocab_size=8).ids.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert draft_vocabulary(counts, 3, vocab_size=8).covered == pytest.approx(15 / 17)
    assert draft_vocabulary(counts, 5, vocab_size=8).covered == 1.0
    assert draft_vocabulary(torch.zeros(4, dtype=torch.long), 2, vocab_size=8).covered is None


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=30), room=st.integers(0, 5), data=st.data())
def test_maps_and_back(counts: list[int], room: int, data: st.DataObject) -> None:
    V = len(counts) + room
    size = data.draw(st.integers(1, V))
    found = draft_vocabulary(torch.tensor(counts), size, vocab_size=V)
    # an oracle by plain sorting
    padded = counts + [0] * room
    assert found.ids.tolist() == sorted(sorted(range(V), key=lambda i: (-padded[i], i))[:size])
    d2t, t2d = found.d2t, found.t2d
    assert [i + offset for i, offset in enumerate(d2t.tolist())] == found.ids.tolist()
    assert t2d.dtype == torch.bool and int(t2d.sum()) == size and bool(t2d[found.ids].all())
    assert torch.equal(found.draft_ids[found.ids], torch.arange(size))
    assert int((found.draft_ids >= 0).sum()) == size
    again = DraftVocabulary.of_maps(d2t, t2d, vocab_size=V)
    assert torch.equal(again.ids, found.ids)


def test_the_whole_vocabulary_is_the_identity() -> None:
    found = draft_vocabulary(torch.tensor([3, 0, 1]), 4, vocab_size=4)
    assert found.d2t.tolist() == [0, 0, 0, 0] and bool(found.t2d.all())
    assert torch.equal(DraftVocabulary.whole(4).ids, found.ids)


def test_contradictions_are_refused() -> None:
    good = draft_vocabulary(torch.tensor([0, 5, 1, 1, 0, 9]), 3, vocab_size=6)
    with pytest.raises(ValueError, match="offsets"):
        DraftVocabulary.of_maps(good.ids + 3, None, vocab_size=6)  # beyond V
    with pytest.raises(ValueError, match="offsets"):
        DraftVocabulary.of_maps(torch.tensor([2, 0, 0]), None, vocab_size=6)  # not rising: 2, 1, 2
    other = good.t2d.clone()
    other[0], other[1] = True, False
    with pytest.raises(ValueError, match="different tokens"):
        DraftVocabulary.of_maps(good.d2t, other, vocab_size=6)
    with pytest.raises(ValueError, match="different tokens"):
        DraftVocabulary.of_maps(good.d2t, good.t2d[:-1], vocab_size=6)
    with pytest.raises(ValueError, match="between 1 and"):
        draft_vocabulary(torch.ones(4), 5, vocab_size=4)
    with pytest.raises(ValueError, match="counted up to id 4"):
        draft_vocabulary(torch.ones(5), 2, vocab_size=4)


def test_a_restricted_head_is_some_columns_of_the_logits() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([1, 4, 6])
    lora = (torch.randn(2, 5), torch.randn(7, 2), 0.5)
    head = Head(weight=torch.randn(7, 5), bias=torch.randn(7), scale=0.3, softcap=2.0, lora=lora)
    hidden = torch.randn(3, 5)
    torch.testing.assert_close(restricted(head, ids)(hidden), head(hidden)[:, ids])
