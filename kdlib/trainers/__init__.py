"""Trainers: the base DistillationTrainer and, one file each, its subclasses.

Importing this package loads nothing heavy: each name is fetched from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.lazy import exports

if TYPE_CHECKING:
    from kdlib.trainers.config import DistillationConfig
    from kdlib.trainers.cross_tokenizer import CrossTokenizerTrainer
    from kdlib.trainers.diffusion import DiffusionDistillationTrainer, DiffusionTrainer
    from kdlib.trainers.diffusion_config import DiffusionConfig
    from kdlib.trainers.distillation import DistillationTrainer
    from kdlib.trainers.draft import DraftTrainer
    from kdlib.trainers.eagle import EagleTrainer
    from kdlib.trainers.eagle_config import EagleConfig
    from kdlib.trainers.jacobi import JacobiTrainer
    from kdlib.trainers.jacobi_config import JacobiConfig
    from kdlib.trainers.pairs import PairedTrainer
    from kdlib.trainers.sinkhorn import SinkhornTrainer

_HOME = {
    "CrossTokenizerTrainer": "cross_tokenizer",
    "DiffusionConfig": "diffusion_config",
    "DiffusionDistillationTrainer": "diffusion",
    "DiffusionTrainer": "diffusion",
    "DistillationConfig": "config",
    "DistillationTrainer": "distillation",
    "DraftTrainer": "draft",
    "EagleConfig": "eagle_config",
    "EagleTrainer": "eagle",
    "JacobiConfig": "jacobi_config",
    "JacobiTrainer": "jacobi",
    "PairedTrainer": "pairs",
    "SinkhornTrainer": "sinkhorn",
}

__all__ = [
    "CrossTokenizerTrainer",
    "DiffusionConfig",
    "DiffusionDistillationTrainer",
    "DiffusionTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "DraftTrainer",
    "EagleConfig",
    "EagleTrainer",
    "JacobiConfig",
    "JacobiTrainer",
    "PairedTrainer",
    "SinkhornTrainer",
]


__getattr__ = exports(__name__, {name: f"{__name__}.{module}" for name, module in _HOME.items()})
