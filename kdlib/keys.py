"""Seeds that follow from what is drawn, so that order, neighbours and processes do not matter."""

from __future__ import annotations

import numpy as np
import xxhash


def draw_key(*parts: int) -> int:
    """A 63-bit seed of the integers ``parts``, the same on every machine."""
    return xxhash.xxh64_intdigest(np.array(parts, "<i8").tobytes()) & (2**63 - 1)
