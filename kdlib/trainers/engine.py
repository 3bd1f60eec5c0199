"""The engine that draws rollouts for a trainer, with the student's weights or the teacher's."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from kdlib.files import write_whole
from kdlib.models import inner
from kdlib.samplers import HFSampler, ServerSampler, VLLMSampler, merged_weights, probe_sequences, verify_sync
from kdlib.teachers import HFTeacher
from kdlib.trainers.snapshot import Snapshot
from kdlib.types import Sampler


class Engine:
    """``sampler`` as the trainer's options ask for; ``student`` draws from and scores with the live model.

    has_own_weights: it must be given the student's. ahead: rollouts are drawn while the student changes. keeps_weights: it
    draws with weights that the student has left behind, and so needs a copy of them.
    Raises ValueError for combinations that cannot work.
    """

    def __init__(self, trainer: Any, *, ahead: bool) -> None:
        self.trainer, self.ahead, self.untied = trainer, ahead, False
        self.keeps_weights = ahead or trainer.args.rollout_refresh_steps > 1
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.student = self._of(model)
        writes = trainer.args.rollout_source != "teacher"
        self.sampler = self._made(model) if writes else self._teachers()
        self.has_own_weights = writes and self.sampler is not self.student

    def _made(self, model: nn.Module) -> Sampler:
        args, several = self.trainer.args, self.trainer.accelerator.num_processes > 1
        if args.rollout.engine == "hf":
            return self._of(model, own_copy=True) if self.keeps_weights else self.student
        if several and self.ahead:
            raise ValueError("max_staleness above 0 with a server needs one training process: set it to 0, or use engine hf")
        if args.rollout.engine == "server":
            return ServerSampler(args.rollout.url, args.rollout)
        if several:
            raise ValueError("rollout.engine vllm runs inside one training process: with several use rollout.engine server")
        # vLLM on CPU packs the output embeddings once and would keep them when tied ones change
        self.untied = not torch.cuda.is_available()
        return VLLMSampler(self._checkpoint(model), args.rollout, dtype=self._dtype, seed=args.seed)

    @property
    def _dtype(self) -> str:
        """What the engine computes in: what training does, unless the options say otherwise."""
        args = self.trainer.args
        return args.rollout.dtype or str(args.compute_dtype or torch.float32).removeprefix("torch.")

    def _of(self, model: nn.Module, *, own_copy: bool = False) -> HFSampler:
        return HFSampler(
            model,
            pad_token_id=self.trainer.processing_class.pad_token_id,
            batch_size=self.trainer.args.generation_batch_size,
            own_copy=own_copy,
            autocast=self.trainer.accelerator.autocast,
        )

    def _teachers(self) -> Sampler:
        """The teacher as a writer: its own model in this process, or the server at ``rollout.url``."""
        args, teacher = self.trainer.args, self.trainer.teacher
        if args.rollout.engine == "server":
            return ServerSampler(args.rollout.url, args.rollout)
        if isinstance(teacher, HFTeacher):
            return self._of(teacher.model)
        raise ValueError(
            f"rollout_source teacher: {type(teacher).__name__} writes nothing; add rollout.engine server and rollout.url, "
            "or run kdlib generate first and train on what it wrote"
        )

    def _checkpoint(self, model: nn.Module) -> str:
        """The student as it starts, on disk, for an engine to load its shape from; weights are pushed before each step."""
        path = self._directory
        config = copy.deepcopy(inner(model).config)
        if self.untied:
            config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
        config.save_pretrained(path)
        self.trainer.processing_class.save_pretrained(path)
        tensors = {name: tensor.cpu().clone() for name, tensor in merged_weights(model, untied=self.untied)}
        write_whole(path / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        return str(path)

    @property
    def _directory(self) -> Path:
        return Path(self.trainer.args.output_dir) / "rollout_engine"

    def snapshot(self, step: int) -> Snapshot:
        """The student as it is now; its tensors are copied where it goes on changing meanwhile."""
        args = self.trainer.args
        found = merged_weights(self.trainer.accelerator.unwrap_model(self.trainer.model), untied=self.untied)
        weights = [(name, tensor.clone() if self.keeps_weights else tensor) for name, tensor in found]
        if args.rollout.engine == "hf":  # a copy of the same modules: names and shapes are checked when they are loaded
            return Snapshot(step=step, weights=weights, probes=[], expected=[])
        probes = probe_sequences(self.trainer.vocab_size, seed=args.seed + step)
        return Snapshot(step=step, weights=weights, probes=probes, expected=self.student.score(probes))

    def sync(self, snapshot: Snapshot) -> None:
        """Loads the weights and compares log-probs; a server is given them by one process. StaleEngineError."""
        accelerator = self.trainer.accelerator
        if accelerator.is_main_process or self.trainer.args.rollout.engine != "server":
            self.sampler.load(iter(snapshot.weights))
            self.verify(snapshot)
        if not self.ahead:
            accelerator.wait_for_everyone()

    def verify(self, snapshot: Snapshot) -> None:
        """StaleEngineError when the engine does not have these weights."""
        if snapshot.probes:
            tolerance = self.trainer.args.rollout.sync_tolerance or (0.01 if self._dtype == "float32" else 0.2)
            verify_sync(self.sampler, snapshot.expected, snapshot.probes, tolerance=tolerance)

    def close(self) -> None:
        """Ends what this object started."""
        if self.sampler is not self.student:
            self.sampler.close()
        if isinstance(self.sampler, VLLMSampler):
            shutil.rmtree(self._directory, ignore_errors=True)  # it has been read; closing twice finds nothing
