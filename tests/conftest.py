"""Settings of the whole test run: no network, no progress bars, caches in a temporary directory."""

from __future__ import annotations

import os
import tempfile

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
