"""What the package promises as a whole: light imports, public names that exist, a version, types."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files

import pytest

import kdlib

HEAVY = ("accelerate", "datasets", "lm_eval", "peft", "transformers", "trl", "vllm")


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_of_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import kdlib").isdisjoint({*HEAVY, "torch"})


@pytest.mark.parametrize("module", ["kdlib.types", "kdlib.kernels", "kdlib.objectives"])
def test_torch_alone(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert "torch" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("name", kdlib.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(kdlib, name) is not None


def test_every_objective_is_exported() -> None:
    import kdlib.objectives as objectives

    bases = {"Divergence", "Interpolated", "Objective", "RowObjective"}
    assert set(objectives.__all__) - bases <= set(kdlib.__all__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        kdlib.Nonsense  # noqa: B018  (the access is what is tested)


def test_version_is_the_installed_one() -> None:
    assert kdlib.__version__ == version("kdlib"), "the installation is stale: run `make install`"


def test_types_are_shipped() -> None:
    assert (files("kdlib") / "py.typed").is_file()
