"""The spec of a model from its configuration."""

from __future__ import annotations

from typing import Any

from kdlib.diffusion.spec import DiffusionSpec


def known_spec(config: Any) -> DiffusionSpec | None:
    """As ``spec_of``; None for a configuration of no diffusion model."""
    try:
        return spec_of(config)
    except ValueError:
        return None


def spec_of(config: Any) -> DiffusionSpec:
    """The DiffusionSpec of a transformers configuration; ValueError for one that is of no diffusion model kdlib knows.

    What kdlib has written itself says so under ``diffusion``; published models are known by their model_type.
    """
    written = getattr(config, "diffusion", None)  # not every configuration has the entry
    if written is not None:
        return DiffusionSpec.from_json(written)
    raise ValueError(
        f"{config.name_or_path or config.model_type} is no diffusion language model that kdlib knows: "
        "train it as one with kdlib diffusion (--mask_token), or give its DiffusionSpec"
    )
