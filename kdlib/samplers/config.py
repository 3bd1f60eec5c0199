"""The options of rollouts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kdlib.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Which engine writes the student's completions, how they are drawn, and how the engine gets new weights.

    Args:
        engine: hf (the student itself, in this process), vllm (a vLLM engine in this process) or server (vLLM behind url).
        url: where the server answers, for example http://127.0.0.1:8000/v1; needed by engine server.
        temperature: divides the logits before a token is drawn; 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that together have this probability; 1 keeps all.
        top_k: draw among this many likeliest tokens; 0 keeps all.
        dtype: engine vllm: float32, bfloat16 or float16; null computes as training does, so that both draw the same.
        gpu_memory_utilization: engine vllm: the part of the GPU's memory that the engine takes.
        max_model_len: engine vllm: the longest prompt with its completion; null means the model's own limit.
        enforce_eager: engine vllm: no CUDA graphs, which starts sooner and generates more slowly.
        sleep: engine vllm: free the engine's memory while the student is updated (CUDA only).
        transfer: engine server: send new weights by nccl (between GPUs) or through files in transfer_dir.
        transfer_dir: a directory that trainer and server both see, for transfer files.
        group_port: the port on which trainer and server meet for transfer nccl.
        sync_tolerance: largest difference in log-prob (nats) between engine and student after new weights; null means 0.01,
            and 0.2 when one of them computes in 16 bits.
        timeout: engine server: seconds for one answer.
        patience: engine server: seconds for which a server that is away is tried again before the run stops.
    """

    engine: Literal["hf", "vllm", "server"] = "hf"
    url: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    gpu_memory_utilization: float = 0.3
    max_model_len: int | None = None
    enforce_eager: bool = False
    sleep: bool = False
    transfer: Literal["nccl", "files"] = "nccl"
    transfer_dir: str | None = None
    group_port: int = 51216
    sync_tolerance: float | None = None
    timeout: float = 600.0
    patience: float = 300.0

    def __post_init__(self) -> None:
        if self.engine not in ("hf", "vllm", "server"):
            raise ValueError(f"rollout.engine {self.engine!r}: choose hf, vllm or server")
        if self.transfer not in ("nccl", "files"):
            raise ValueError(f"rollout.transfer {self.transfer!r}: choose nccl or files")
        if self.engine == "server" and self.url is None:
            raise ValueError("rollout.engine server needs rollout.url, for example http://127.0.0.1:8000/v1")
        if self.engine != "server" and self.url is not None:
            raise ValueError(
                f"rollout.url is for rollout.engine server, not {self.engine}: set the engine or leave the url out"
            )
        if self.engine == "server" and self.transfer == "files" and self.transfer_dir is None:
            raise ValueError("rollout.transfer files needs rollout.transfer_dir, which trainer and server both see")
        if self.dtype is not None and self.engine != "vllm":
            raise ValueError(f"rollout.dtype is for rollout.engine vllm, not {self.engine}: leave it out")
        if self.sleep and self.engine != "vllm":
            raise ValueError(f"rollout.sleep is for rollout.engine vllm, not {self.engine}: leave it out")
        self._refuse_numbers()
        self.params(1)

    def _refuse_numbers(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"rollout.max_model_len must be at least 1, not {self.max_model_len}")
        for name in ("sync_tolerance", "timeout", "patience"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"rollout.{name} must be above 0, not {value}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"rollout.gpu_memory_utilization is a part of 1, not {self.gpu_memory_utilization}")
        if not 0 < self.group_port < 2**16:
            raise ValueError(f"rollout.group_port {self.group_port} is not a port: choose 1 to 65535")

    def params(self, max_tokens: int, stop_ids: Iterable[int] = ()) -> SamplingParams:
        """How completions of up to ``max_tokens`` tokens are drawn; ValueError when the numbers make no sense."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_ids=tuple(stop_ids),
        )
