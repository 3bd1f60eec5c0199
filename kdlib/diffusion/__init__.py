"""Masked diffusion language models: what has to be known of one, how another model becomes one, how tokens are masked.

Importing this package loads nothing heavy: each name is fetched from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.lazy import exports

if TYPE_CHECKING:
    from kdlib.diffusion.convert import as_diffusion, check_diffusion, with_mask_token
    from kdlib.diffusion.known import spec_of
    from kdlib.diffusion.noise import Noise, Rows
    from kdlib.diffusion.spec import DiffusionSpec

_HOME = {
    "DiffusionSpec": "spec",
    "Noise": "noise",
    "Rows": "noise",
    "as_diffusion": "convert",
    "check_diffusion": "convert",
    "spec_of": "known",
    "with_mask_token": "convert",
}

__all__ = ["DiffusionSpec", "Noise", "Rows", "as_diffusion", "check_diffusion", "spec_of", "with_mask_token"]

__getattr__ = exports(__name__, {name: f"{__name__}.{module}" for name, module in _HOME.items()})
