"""Draft models for speculative decoding: how they are made, and the checkpoints that vLLM loads.

Importing this package loads nothing heavy: each name is fetched from its module when it is first used.
"""

from __future__ import annotations

from kdlib.lazy import exports

_HOME: dict[str, str] = {
    "DraftExport": "export",
    "Eagle3Config": "eagle3_config",
    "Eagle3Draft": "eagle3",
    "export_draft": "export",
    "export_head": "export",
    "pruned": "prune",
}

__all__ = list(_HOME)

__getattr__ = exports(__name__, {name: f"{__name__}.{module}" for name, module in _HOME.items()})
