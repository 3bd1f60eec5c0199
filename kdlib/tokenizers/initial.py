"""First rows for the tokens of another vocabulary, as weighted sums of the rows of the old one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from kdlib.head import accumulation_dtype

Method = Literal["fvt", "mean", "tokenadapt"]

# TokenAdapt's published values
GLOBAL_SHARE, TEMPERATURE, NEIGHBOURS, THRESHOLD = 0.3, 0.3, 3, 0.6
_BLOCK = 256  # new tokens whose similarities to all old ones are held at a time

Sums = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each of V' new rows is made of, the same for every matrix of a model.

    copied [V']: the old token whose row is taken as it is, or -1. sums: (new token, old token, weight) [E] each, weights of a
    new token sum to 1. drawn [V'] bool: the mean of the old rows and normal noise; all others are that mean. old [V]: the
    old ids that are tokens, over which mean and standard deviation are taken.
    """

    copied: Tensor
    sums: Sums
    drawn: Tensor
    old: Tensor

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many rows are copied, sums of several (or one) others, and made otherwise."""
        copied, summed = int((self.copied >= 0).sum()), len(self.sums[0].unique())
        return copied, summed, len(self.copied) - copied - summed

    @torch.no_grad()
    def rows(self, matrix: Tensor, *, seed: int) -> Tensor:
        """[V', D] in the dtype of ``matrix`` [V, D]: e'_t = e_copied(t), sum_j w_tj e_j, or m (+ s z), z ~ N(0, 1).

        m and s are the mean and the standard deviation of the old tokens' rows, for each of the D. Sums are taken in float32
        (float64 for float64). Raises ValueError for a matrix with fewer rows than there are old tokens.
        """
        if len(matrix) <= int(self.old.max()):
            raise ValueError(
                f"the model has {len(matrix)} embedding rows and its tokenizer tokens up to id {int(self.old.max())}: "
                "give the tokenizer that the model was trained with"
            )
        wide = matrix.detach().to(accumulation_dtype(matrix))
        known = wide[self.old.to(wide.device)]
        made = known.mean(0).repeat(len(self.copied), 1)
        noise = torch.randn(int(self.drawn.sum()), wide.shape[1], generator=torch.Generator().manual_seed(seed))
        made[self.drawn.to(wide.device)] += known.std(0, correction=0) * noise.to(wide)
        summed, sums = self._summed(wide)
        made[summed] = sums
        made = made.to(matrix.dtype)
        copied = self.copied.to(matrix.device)
        made[copied >= 0] = matrix.detach()[copied[copied >= 0]]
        return made

    def _summed(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """The new tokens that have sums, and these."""
        new, old, weight = (part.to(wide.device) for part in self.sums)
        order = new.argsort(stable=True)
        ids, count = new[order].unique_consecutive(return_counts=True)
        start = count.cumsum(0) - count
        return ids, embedding_bag(old[order], wide, start, mode="sum", per_sample_weights=weight[order].to(wide))


def averages(pieces: Sequence[tuple[int, Sequence[int]]]) -> Sums:
    """Fast vocabulary transfer: a new token is the mean of its old pieces; ``pieces``: (new token, old tokens) of each.

    Gee et al., "Fast Vocabulary Transfer for Language Model Compression" (EMNLP 2022).
    """
    new, old, count = _flat(pieces)
    return new, old, 1 / count


def adapted(
    pieces: Sequence[tuple[int, Sequence[int]]], *, lengths: tuple[Tensor, Tensor], vectors: tuple[Tensor, Tensor], text: Tensor
) -> Sums:
    """TokenAdapt: (1 - w) local + w global for each new token t, w = 0.3; ``pieces`` as in ``averages``, also empty ones.

    local: its old pieces i with softmax_i((cos(x_t, x_i) + length_i / length_t) / 2 / 0.3). global: of the 3 old tokens k of
    highest cos(x_t, x_k) those with cos >= 0.6, with softmax_k(cos / 0.3). Where one of them is empty the other stands alone.
    lengths, vectors: bytes [V'], [V] and x [V', F], [V, F] of new and old tokens; text [V] bool: the old tokens that may be
    neighbours. Source: arXiv 2505.09738, with the local scores of commit 5b4721d9 of its code; x are surface vectors
    here, there those of a language model. Its code gives NaN where no token reaches the threshold.
    """
    x, y = (normalize(vectors_of, dim=1) for vectors_of in vectors)
    new, old, _ = _flat(pieces)
    cos = torch.cat([(x[n] * y[o]).sum(1) for n, o in zip(new.split(_BLOCK), old.split(_BLOCK), strict=True)])
    local = _softmax((cos + lengths[1][old] / lengths[0][new]) / 2, new, size=len(x))
    asked = torch.tensor([token for token, _ in pieces], dtype=torch.int64)
    near, neighbour, similarity = _neighbours(x, y, asked, text)
    around = _softmax(similarity, near, size=len(x))
    both = torch.zeros(2, len(x), dtype=torch.bool)
    both[0, new] = both[1, near] = True
    share = torch.where(both.all(0), GLOBAL_SHARE, both[1].float())
    weight = torch.cat([(1 - share[new]) * local, share[near] * around])
    return torch.cat([new, near]), torch.cat([old, neighbour]), weight


def nothing() -> Sums:
    """No sums."""
    return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)


def _flat(pieces: Sequence[tuple[int, Sequence[int]]]) -> Sums:
    """(new token, old token, how many pieces the new token has), one entry for each piece."""
    count = torch.tensor([len(found) for _, found in pieces], dtype=torch.int64)
    new = torch.tensor([token for token, _ in pieces], dtype=torch.int64).repeat_interleave(count)
    old = torch.tensor([piece for _, found in pieces for piece in found], dtype=torch.int64)
    return new, old, count.repeat_interleave(count).float()


def _neighbours(x: Tensor, y: Tensor, asked: Tensor, text: Tensor) -> Sums:
    """(new token, old token, cosine) of the nearest old tokens that reach the threshold, of each new token in ``asked``."""
    ids = text.nonzero()[:, 0]
    among = y[ids]
    k = min(NEIGHBOURS, len(ids))
    parts = [nothing()]
    for block in asked.split(_BLOCK):
        cos, found = (x[block] @ among.T).topk(k, dim=1)
        row, column = (cos >= THRESHOLD).nonzero(as_tuple=True)
        parts.append((block[row], ids[found[row, column]], cos[row, column]))
    new, old, cos = (torch.cat(column) for column in zip(*parts, strict=True))
    return new, old, cos


def _softmax(score: Tensor, group: Tensor, *, size: int) -> Tensor:
    """exp(score / temperature), divided by its sum over the entries of the same group; scores are at most 1."""
    weight = (score / TEMPERATURE).exp()
    return weight / torch.zeros(size).index_add_(0, group, weight)[group]
