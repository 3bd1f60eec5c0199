"""Token ids and log-probs as bytes and back, whole arrays at a time.

- Ids: the low 16 bits in ``ids`` [n, k]; each bit above in a packed plane of ``ids_high`` [n, planes, bytes].
- Log-probs of 32 bits: float32, for comparing teachers with one another.
- Log-probs of 16 bits: float16, whose sign bit says nothing (log p <= 0) and so holds bit 16 of the id.
- Log-probs of 8 bits: log p = -range (code / 254)^2, 255 for -inf; steps are fine where the mass is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Stored = Mapping[str, NDArray]

_SIGN = np.uint16(0x8000)
_LEVELS = 254
_MINUS_INF = 255


@dataclass(frozen=True, kw_only=True)
class Signals:
    """``ids`` [n, k] int32, ``logp`` [n, k], ``rest`` [n]: log of the mass outside, None for sampled and given ids."""

    ids: NDArray
    logp: NDArray
    rest: NDArray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def joined(parts: list[Signals]) -> Signals:
        """All rows of the parts, in order; one part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        rest = [part.rest for part in parts if part.rest is not None]
        return Signals(
            ids=np.concatenate([part.ids for part in parts]),
            logp=np.concatenate([part.logp for part in parts]),
            rest=np.concatenate(rest) if rest else None,
        )


@dataclass(frozen=True, kw_only=True)
class Codec:
    """``id_bits`` (16 or more) per id and ``logp_bits`` (8, 16 or 32) per log-prob."""

    id_bits: int
    logp_bits: int

    @property
    def _first_plane(self) -> int:
        """The lowest id bit that is kept in a plane."""
        return 17 if self.logp_bits == 16 else 16

    def encode(self, signals: Signals) -> dict[str, NDArray]:
        """Arrays to store; log-probs above 0 (rounding) count as 0."""
        ids = signals.ids.astype(np.int32, copy=False)
        stored: dict[str, NDArray] = {"ids": ids.astype(np.uint16)}
        planes = np.arange(self._first_plane, self.id_bits, dtype=np.int32)
        if len(planes):
            stored["ids_high"] = np.packbits((ids[:, None, :] >> planes[:, None]) & 1, axis=-1)
        if self.logp_bits == 16:
            bit_16 = (ids >> 16 & 1).astype(np.uint16) << 15
            stored["logp"] = _half_bits(signals.logp) & ~_SIGN | bit_16
        else:
            stored |= self._numbers("logp", signals.logp)
        if signals.rest is not None:
            stored |= self._numbers("rest", signals.rest)
        return stored

    def _numbers(self, name: str, logp: NDArray) -> dict[str, NDArray]:
        if self.logp_bits == 32:
            return {name: np.minimum(logp, 0.0).astype(np.float32)}
        if self.logp_bits == 16:
            return {name: _half_bits(logp)}
        codes, span = _to_codes(logp)
        return {name: codes, f"{name}_range": span}

    def decode(self, stored: Stored) -> Signals:
        """The inverse of ``encode``: ids exactly, log-probs as float16 (16 bits) or float32 (8 and 32 bits)."""
        ids = stored["ids"].astype(np.int32)
        if self.logp_bits == 16 and self.id_bits > 16:
            ids |= (stored["logp"] >> 15).astype(np.int32) << 16
        for bit in range(self._first_plane, self.id_bits):
            plane = np.ascontiguousarray(stored["ids_high"][:, bit - self._first_plane])
            ids |= np.unpackbits(plane, axis=-1, count=ids.shape[-1]).astype(np.int32) << bit
        return Signals(ids=ids, logp=self._log_probs(stored, "logp"), rest=self._rest(stored))

    def _rest(self, stored: Stored) -> NDArray | None:
        return self._log_probs(stored, "rest") if "rest" in stored else None

    def _log_probs(self, stored: Stored, name: str) -> NDArray:
        if self.logp_bits == 16:
            return (stored[name] | _SIGN).view(np.float16)
        if self.logp_bits == 32:
            return stored[name]
        return _from_codes(stored[name], stored[f"{name}_range"])


def _half_bits(logp: NDArray) -> NDArray:
    """The bits of float16 log-probs, sign bit set (0 becomes -0)."""
    with np.errstate(over="ignore"):  # below -65504 is -inf
        return np.minimum(logp, 0.0).astype(np.float16).view(np.uint16) | _SIGN


def _to_codes(logp: NDArray) -> tuple[NDArray, NDArray]:
    """(codes uint8, range [1]): the range is the largest finite -log p here, so that nothing is clipped."""
    depth = np.maximum(-logp.astype(np.float32), 0.0)
    finite = np.isfinite(depth)
    span = np.max(depth, initial=np.finfo(np.float32).tiny, where=finite)
    codes = np.rint(np.sqrt(np.where(finite, depth, 0.0) / span) * _LEVELS).astype(np.uint8)
    return np.where(finite, codes, np.uint8(_MINUS_INF)), np.array([span], np.float32)


def _from_codes(codes: NDArray, span: NDArray) -> NDArray:
    logp = codes.astype(np.float32)
    logp *= logp
    logp *= -span / np.float32(_LEVELS**2)
    logp[codes == _MINUS_INF] = -np.inf
    return logp
