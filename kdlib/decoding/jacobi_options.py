"""The choices of a Jacobi decoder, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass

from kdlib.decoding.jacobi_init import INITS, Init


@dataclass(frozen=True, kw_only=True)
class JacobiOptions:
    """What ``jacobi_generate`` says about them; ValueError for values out of range and for those that do not go together."""

    block_size: int
    max_new_tokens: int
    init: Init = "prompt"
    max_iterations: int | None = None
    sliding_window: bool = False
    blocks: int = 1
    spawn_ratio: float = 0.85
    pool: int = 0
    return_trajectories: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= self.max_new_tokens:
            raise ValueError(f"block_size {self.block_size}: choose 1 to max_new_tokens, which is {self.max_new_tokens}")
        if not callable(self.init) and self.init not in INITS:
            raise ValueError(f"init {self.init!r}: choose {', '.join(INITS)} or a function of Unknown")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ValueError(f"max_iterations {self.max_iterations}: choose at least 1, or None for exact blocks")
        if self.blocks < 1 or self.pool < 0:
            raise ValueError(f"blocks {self.blocks} and pool {self.pool}: choose at least 1 block, and a pool of 0 or more")
        if not 0 < self.spawn_ratio <= 1:
            raise ValueError(f"spawn_ratio {self.spawn_ratio}: choose a part of a block, above 0 and at most 1")
        if self.sliding_window and self.blocks > 1:
            raise ValueError(f"sliding_window has no blocks: drop it, or blocks={self.blocks}")
        plain = not self.sliding_window and self.blocks == 1 and self.pool == 0
        for name in ("max_iterations", "return_trajectories"):
            if getattr(self, name) and not plain:
                raise ValueError(f"{name} is for single blocks: drop it, or sliding_window, blocks and pool")

    @property
    def columns(self) -> int:
        """The most tokens of a row that a pass reads: one block that was taken as it is may stand before a new one."""
        return self.block_size * (self.blocks if self.max_iterations is None else 2)
