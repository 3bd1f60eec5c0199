"""Settings of the whole test run: no network, no progress bars, caches in a temporary directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Read when the libraries are imported, so set before any test module is.
_SCRATCH = tempfile.TemporaryDirectory(prefix="kdlib-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _SCRATCH.name
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The same examples in every run: a failure then belongs to the change that shows it.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


_ENVIRONMENT = os.environ


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """``Dataset.map`` in several processes leaves a copy in the place of os.environ; rich goes on reading the first one."""
    os.environ = _ENVIRONMENT  # noqa: B003, the object itself comes back
    yield
    os.environ = _ENVIRONMENT  # noqa: B003, the object itself comes back
