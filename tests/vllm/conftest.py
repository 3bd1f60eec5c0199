"""What the tests with real engines share; without vLLM they are skipped (`make test-vllm` installs it)."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.tiny import tiny_llama, tiny_tokenizer
from tests.vllm.servers import ServedModel, serving

Serve = Callable[..., ServedModel]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tiny_tokenizer and a tiny_llama as vLLM on CPU wants it: heads of 32 or wider, embeddings not tied."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer), hidden=128, tie_word_embeddings=False).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """``serve(directory, *arguments, env={}, wait=True)`` starts a server that lives until the module ends.

    Longer, and those of all modules would fill the memory: each has a KV cache of 1 GiB beside its process.
    ``.url``, ``.process``, ``.kill()``, ``.start()`` (same port) and ``.wait()`` are those of servers.ServedModel.
    """
    logs, number = tmp_path_factory.mktemp("servers"), itertools.count()
    with ExitStack() as stack:

        def start(model: str | Path, *arguments: str, **options: object) -> ServedModel:
            log = logs / f"{next(number)}.log"
            return stack.enter_context(serving(model, *arguments, log=log, **options))  # type: ignore[arg-type]

        yield start
