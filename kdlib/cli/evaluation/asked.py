"""Everything that ``kdlib evaluate`` was asked, checked before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlib.cli.evaluation.sampled import SampledArguments
from kdlib.cli.scoring import ScoringArguments

if TYPE_CHECKING:
    from kdlib.cli.evaluate import EvaluateArguments
    from kdlib.cli.evaluation.kept import Kept

NAME = "student"
COMPARISON = "comparison"


@dataclass
class EngineArguments:
    """How vLLM runs; backends vllm and server.

    Args:
        gpu_memory_utilization: backend vllm: the part of the GPU's memory that the engine takes.
        max_model_len: backend vllm: the longest prompt with its completion; null means the model's own limit.
        enforce_eager: backend vllm: no CUDA graphs, which starts sooner and generates more slowly.
        tokenizer: path or Hub id of the tokenizer; the model's own, or that of the checkpoint a server names.
        timeout: of a server: seconds for one answer.
        patience: of a server: seconds for which one that is away is tried again.
    """

    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    enforce_eager: bool = False
    tokenizer: str | None = None
    timeout: float = 3600.0
    patience: float = 300.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of the command, by the dataclasses that they are declared in."""

    general: EvaluateArguments
    sampled: SampledArguments
    engine: EngineArguments
    scoring: ScoringArguments

    @property
    def models(self) -> dict[str, str]:
        """{name: path, Hub id or URL}, in the order of comparison."""
        return {**(self.general.compare or {}), self.name: self.general.model}

    @property
    def name(self) -> str:
        return self.general.name or NAME

    @property
    def keeps(self) -> bool:
        """Whether output_path is a directory of named models."""
        g = self.general
        return bool(g.compare or g.name or self.sampled.problems)

    @property
    def directory(self) -> Path | None:
        """Where what is done is kept; None keeps nothing."""
        path = self.general.output_path
        return Path(path) if path is not None and self.keeps else None

    @property
    def problems_task(self) -> str:
        """What the problems are called in results: as their file is, unless the text for bits per byte is called so."""
        assert self.sampled.problems is not None
        stem = Path(self.sampled.problems).stem
        return f"{stem}-problems" if self.general.dataset_name and Path(self.general.dataset_name).stem == stem else stem

    def kept(self, name: str) -> Kept:
        """What is done of one model."""
        from kdlib.cli.evaluation.kept import Kept

        directory = None if self.directory is None else self.directory / name
        return Kept(directory=directory, overwrite=self.general.overwrite)

    def backend(self, name: str) -> str:
        """hf, vllm or server; a URL is a server's whatever the option says."""
        from kdlib.serving.client import is_url

        return "server" if is_url(self.models[name]) else self.general.backend

    def settings(self, name: str) -> dict[str, Any]:
        """Which model, with which weights, is run by what."""
        from kdlib.eval.diffusion_point import weights_of

        model = self.models[name]
        return {"model": model, "weights": weights_of(model), "backend": self.backend(name), "dtype": self.general.dtype}

    def check(self) -> None:
        """ValueError, of one line, for options that do not fit together."""
        g = self.general
        if not (self.scoring.tasks or g.dataset_name or self.sampled.problems):
            raise ValueError(
                "nothing to score: add --tasks TASK, --problems FILE with --verify, or --dataset_name FILE for bits per byte"
            )
        if g.teacher and not g.dataset_name:
            raise ValueError("KL to a teacher is measured on rows: add --dataset_name FILE")
        _check_names(g.compare or {}, self.name)
        if self.keeps and str(g.output_path).endswith(".json"):
            raise ValueError(f"output_path {g.output_path}: with problems, compare or name it is a directory")
        for name in self.models:
            self._check_backend(name)

    def _check_backend(self, name: str) -> None:
        from kdlib.eval.diffusion_config import is_adapter

        model, backend = self.models[name], self.backend(name)
        served = backend == "server"
        if served and "://" not in model:
            raise ValueError(f"backend server asks a URL: give it in place of {model}, such as http://127.0.0.1:8000/v1")
        if backend == "vllm" and is_adapter(model):
            raise ValueError(f"{model} is an adapter, and backend vllm runs whole models: merge it, or add --backend hf")
        if served and self.general.dataset_name:
            raise ValueError(f"{name} is a server's, and bits per byte are measured on weights: leave dataset_name out")


def _check_names(compare: Mapping[str, str], name: str) -> None:
    """Names are those of files."""
    for one in (*compare, name):
        if not re.fullmatch(r"\w[\w.-]*", one) or one == COMPARISON:
            raise ValueError(f"{one!r} cannot be a model's name: choose letters, digits, - and _, and not {COMPARISON!r}")
    if name in compare:
        raise ValueError(f"two models are called {name}: call the model otherwise, with --name")
