"""What all tests of trainers share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="session")
def imported_modules_are_not_collected() -> None:
    """accelerate collects garbage before every training, which goes through all that was imported: half a second each time."""
    gc.freeze()
