"""The loop of decoding a diffusion language model: read, propose, commit, until no token is masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.decoding.diffusion_blocks import Window
from kdlib.decoding.diffusion_reader import Reader
from kdlib.decoding.diffusion_step import Step, Strategy, proposals


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Tokens that end a response, on its device, and the token that fills what is behind the first of them."""

    stop_ids: Tensor
    fill: int

    def first(self, response: Tensor, *, masked: Tensor) -> Tensor:
        """[b, 1] the column of the first committed stop token of ``response`` [b, G], G without one."""
        stops = torch.isin(response, self.stop_ids) & ~masked
        return torch.where(stops.any(-1), stops.int().argmax(-1), response.shape[1])[:, None]


class Denoising:
    """Rows whose responses are decoded, each at its own pace; state of all B rows is on the model's device.

    ``canvas`` [B, L]; ``masked`` [B, G] what is not known yet; ``commit_step`` [B, G]; ``forwards`` [B].
    """

    def __init__(self, reader: Reader, *, canvas: Tensor, strategy: Strategy, ending: Ending, temperature: float) -> None:
        self.reader, self.strategy, self.ending, self.temperature = reader, strategy, ending, temperature
        self.blocks, self.canvas = reader.blocks, canvas
        B, G = len(canvas), self.blocks.gen_length
        self.masked = canvas.new_ones(B, G, dtype=torch.bool)
        self.commit_step = canvas.new_zeros(B, G)
        self.forwards = torch.zeros(B, dtype=torch.long)
        self.memory: dict[str, Tensor] = {}
        self._current = torch.full((B,), -1)  # each row's first incomplete block in its last pass, on the CPU
        self._step = torch.zeros(B, dtype=torch.long)  # its passes since that became the current one

    def run(self, seeds: Sequence[int]) -> None:
        """Decodes all rows; ``seeds``: one for each row where proposals are drawn, else none."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = torch.arange(len(self.canvas))
        for _ in range(self.blocks.gen_length):  # a pass commits a token of every row
            self._pass(rows, uniform=self._uniform([generators[row] for row in rows.tolist()] if generators else []))
            alive = self.masked[rows].any(-1)
            self.memory = {name: states[alive] for name, states in self.memory.items()}
            rows = rows[alive.cpu()]
            if not len(rows):
                return
        raise ValueError(f"{type(self.strategy).__name__} commits no token in some pass: every row needs at least one")

    def _uniform(self, generators: Sequence[torch.Generator]) -> Tensor | None:
        """[b, G] numbers in [0, 1), drawn on the CPU, so that they are the same on every device."""
        draws = [torch.rand(self.blocks.gen_length, generator=g, dtype=torch.float64) for g in generators]
        return torch.stack(draws).to(self.canvas.device) if draws else None

    def _pass(self, rows: Tensor, *, uniform: Tensor | None) -> None:
        """One forward pass of ``rows`` [b] and what is committed after it."""
        column = self.masked[rows].int().argmax(-1).cpu()
        current = self.blocks[rows].number(column[:, None])[:, 0]
        begins = current != self._current[rows]
        self._step[rows] = torch.where(begins, 1, self._step[rows] + 1)
        self._current[rows] = current
        self.forwards[rows] += 1
        window = Window(blocks=self.blocks[rows], current=current, live=self.strategy.live_blocks)
        logits = self.reader.logits(self.canvas, rows=rows, window=window, begins=begins)
        step = self._seen(rows, window=window, logits=logits, uniform=uniform)
        self._commit(rows, step=step, chosen=self.strategy.commits(step))

    def _seen(self, rows: Tensor, *, window: Window, logits: Tensor, uniform: Tensor | None) -> Step:
        column, block = (x.to(self.canvas.device) for x in window.columns())
        uniform = None if uniform is None else uniform.gather(1, column)
        return Step(
            logits=logits,
            tokens=proposals(logits, temperature=self.temperature, uniform=uniform),
            masked=self.masked[rows].gather(1, column) & (block >= 0),
            column=column,
            block=block,
            current=window.current.to(self.canvas.device),
            step=self._step[rows].to(self.canvas.device),
            blocks=window.blocks.count.to(self.canvas.device),
            block_length=self.blocks.block_length,
            canvas=self.canvas[rows],
            visible=self.reader.visible[rows],
            start=self.blocks.start,
            memory=self.memory,
            temperature=self.temperature,
            uniform=uniform,
        )

    def _commit(self, rows: Tensor, *, step: Step, chosen: Tensor) -> None:
        """Writes the ``chosen`` [b, n] proposals; fills what is behind a stop token."""
        row, entry = chosen.nonzero(as_tuple=True)
        response, masked, when = self.canvas[rows, self.blocks.start :], self.masked[rows], self.commit_step[rows]
        column = step.column[row, entry]
        response[row, column], masked[row, column] = step.tokens[row, entry], False
        when[row, column] = self.forwards[rows].to(when.device)[row]
        behind = torch.arange(response.shape[1], device=response.device) > self.ending.first(response, masked=masked)
        self.canvas[rows, self.blocks.start :] = response.masked_fill(behind, self.ending.fill)
        self.masked[rows] = masked & ~behind
        self.commit_step[rows] = when.masked_fill(behind, 0)
