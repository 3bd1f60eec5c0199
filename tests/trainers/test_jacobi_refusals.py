"""Options, rows, teachers and models that consistency training does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import MptConfig, MptForCausalLM

from kdlib.objectives import SampledReverseKL
from kdlib.teachers import EnsembleTeacher, HFTeacher, SelfTeacher
from kdlib.trainers import JacobiConfig
from tests.trainers.jacobi_plain import trajectories
from tests.trainers.jacobi_steps import (
    ROWS,
    jacobi_trainer,
)
from tests.trainers.small import V, double, settings_of


def refused(directory: Path, message: str, rows: Any = ROWS, *, config: dict[str, Any] | None = None, **given: Any) -> None:
    with pytest.raises(ValueError, match=message):
        jacobi_trainer(directory, rows, config=config, **given)
    assert not list(directory.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size must be at least 2, not 1"),
        ({"window_size": 0}, "window_size must be at least 1"),
        ({"states_per_block": 0}, "states_per_block must be at least 1"),
        ({"blocks_per_row": 0}, "blocks_per_row must be at least 1"),
        ({"min_noise": 0.6, "max_noise": 0.5}, "0 <= min_noise <= max_noise <= 1"),
        ({"max_noise": 1.5}, "0 <= min_noise <= max_noise <= 1"),
        ({"min_noise": -0.1}, "0 <= min_noise <= max_noise <= 1"),
        ({"ar_weight": -1.0}, "ar_weight are 0 or more"),
        ({"consistency_weight": -1.0}, "consistency_weight and"),
        ({"max_distance": 1.5}, "max_distance is from 0 to 1"),
        ({"init": "zeros"}, "choose prompt, random, last"),
        ({"packing": True}, "packing puts samples into one row.*leave it out"),
        ({"context": "noisy", "consistency": "local"}, "leave out consistency local"),
        ({"context": "noisy", "blocks_per_row": 2}, "leave out .*blocks_per_row"),
        ({"context": "noisy", "states_per_block": 2}, "leave out .*states_per_block"),
        ({"on_policy_fraction": 0.5, "state_source": "stored"}, "use state_source student"),
        ({"on_policy_fraction": 0.5, "ar_labels": "mixed"}, "ar_labels trajectory"),
        ({"on_policy_fraction": 0.5, "rollout_source": "corrected"}, "use student or teacher"),
        ({"schedule": "linear"}, "schedule.*progressive"),
        ({"context": "both"}, "context.*noisy"),
        ({"consistency": "both"}, "consistency.*local"),
        ({"state_source": "disk"}, "state_source.*stored"),
        ({"ar_labels": "both"}, "ar_labels.*mixed"),
    ],
    ids=str,
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(JacobiConfig, tmp_path, **options)


def plain_rows() -> Dataset:
    return Dataset.from_list([{key: row.row()[key] for key in ("input_ids", "labels", "sample_id")} for row in ROWS])


def test_rows_that_lack_what_is_asked_for(tmp_path: Path) -> None:
    refused(
        tmp_path, "the rows have no states; make them with kdlib trajectories", plain_rows(), config={"state_source": "stored"}
    )
    refused(tmp_path, r"states are of block_size \[4\], not 8: set block_size to theirs", config={"block_size": 8})
    refused(tmp_path, "ar_labels mixed needs rows of kdlib trajectories", plain_rows(), config={"ar_labels": "mixed"})


def test_evaluation_rows_need_states_too(tmp_path: Path) -> None:
    refused(tmp_path, "evaluation rows have no states", eval_dataset=plain_rows())
    others = Dataset.from_list([row.row(n=3) for row in trajectories(n=3)])
    refused(tmp_path, r"evaluation rows' states are of block_size \[3\]", eval_dataset=others)


def test_teachers_and_objectives_that_do_not_fit(tmp_path: Path) -> None:
    two = EnsembleTeacher([HFTeacher(double(1)), HFTeacher(double(2))])
    refused(tmp_path, "consistency needs whole distributions on the text as it is", teacher=two)
    refused(tmp_path, "NotARow is no row objective", objective=NotARow())
    refused(tmp_path, "SampledReverseKL learns from tokens that were drawn", objective=SampledReverseKL())
    refused(tmp_path, "needs a student with an adapter", teacher=SelfTeacher("adapter_off"))
    for teacher in (None, SelfTeacher("student")):
        message = "ar_labels teacher needs a teacher with weights of its own"
        refused(tmp_path, message, teacher=teacher, config={"ar_labels": "teacher"})


class NotARow:
    """An objective on whole signals."""

    accepts, layers = None, ()

    def __call__(self, student: Any, teacher: Any) -> Any:
        raise AssertionError


def test_models_that_cannot_read_streams_are_refused_before_training(tmp_path: Path) -> None:
    flash = double()
    flash.config._attn_implementation = "flash_attention_2"
    refused(tmp_path, "need attn_implementation sdpa, eager or flex_attention", model=flash)
    sizes = {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2}
    alibi = MptForCausalLM(MptConfig(**sizes))
    refused(tmp_path, "the student .MptForCausalLM. does not place tokens by position_ids", model=alibi)
    options = {"consistency": "local"}
    refused(tmp_path, "the teacher .MptForCausalLM. does not place", teacher=MptForCausalLM(MptConfig(**sizes)), config=options)
