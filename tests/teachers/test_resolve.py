"""From what users write for a teacher to the teacher, and one line for what is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from kdlib.data import prepare_dataset
from kdlib.teachers import (
    CachedTeacher,
    EnsembleTeacher,
    HFTeacher,
    RoutedTeacher,
    SelfTeacher,
    leaves,
    resolve_teacher,
    vllm,
)
from kdlib.teachers.write_cache import write_cache
from kdlib.types import Support
from tests.tiny import tiny_llama, tiny_tokenizer


class Served:
    """In place of VLLMTeacher: remembers what it was made with."""

    provides = Support.FULL

    def __init__(self, source: str | Sequence[str], **options: Any) -> None:
        self.source, self.options = source, options


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "VLLMTeacher", Served)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("teacher")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    tiny_llama(len(tokenizer)).save_pretrained(directory)
    return str(directory)


def resolved(spec: Any, **options: Any) -> Any:
    return resolve_teacher(spec, options)


def test_what_is_a_teacher_or_none_stays() -> None:
    own = SelfTeacher()
    assert resolved(own) is own and resolved(None) is None
    assert isinstance(resolved(tiny_llama(16)), HFTeacher)


def test_paths_are_loaded_with_their_options(path: str) -> None:
    teacher = resolved(path, dtype="bfloat16", served={"k": 4})
    assert isinstance(teacher, HFTeacher) and next(teacher.model.parameters()).dtype == torch.bfloat16


def test_a_directory_of_kdlib_cache_is_a_cache(path: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    dataset = prepare_dataset(Dataset.from_list([{"text": "two plus two"}]), tokenizer, max_length=16).dataset
    write_cache(HFTeacher(path), dataset, directory=tmp_path / "c", tokenizer=tokenizer, teacher_name="t", k=3)
    assert isinstance(resolved(str(tmp_path / "c"), backend="vllm"), CachedTeacher)


@pytest.mark.usefixtures("served")
def test_urls_are_served_teachers() -> None:
    one = resolved("http://localhost:8000/v1", dtype="auto", served={"signal": "topk", "k": 8})
    assert (one.source, one.options) == ("http://localhost:8000/v1", {"signal": "topk", "k": 8})
    replicas = resolved(("http://a:1/v1", "https://b:2/v1"), served=None)
    assert (replicas.source, replicas.options) == (["http://a:1/v1", "https://b:2/v1"], {})


@pytest.mark.usefixtures("served")
def test_a_path_may_be_run_by_vllm(path: str) -> None:
    teacher = resolved(path, backend="vllm", dtype="auto", served={"k": 2})
    assert (teacher.source, teacher.options) == (path, {"k": 2})
    with pytest.raises(ValueError, match="run by hf or by vllm"):
        resolved(path, backend="sglang")


def test_the_student_itself() -> None:
    plain, averaged, empty = (
        resolved(spec) for spec in ("SelfTeacher", {"SelfTeacher": {"kind": "ema", "decay": 0.9}}, {"SelfTeacher": None})
    )
    assert [teacher.kind for teacher in (plain, averaged, empty)] == ["student", "ema", "student"]
    assert averaged.decay == 0.9


def test_ensembles_and_routes_nest(path: str) -> None:
    teacher = resolved(
        {"math": {"EnsembleTeacher": {"teachers": [path, tiny_llama(16), "SelfTeacher"], "weights": [2, 1, 1]}}, "code": path},
        dtype="float32",
    )
    assert isinstance(teacher, RoutedTeacher) and list(teacher.teachers) == ["math", "code"]
    mixed = teacher.teachers["math"]
    assert isinstance(mixed, EnsembleTeacher) and mixed.weights == (0.5, 0.25, 0.25)
    assert [type(leaf) for leaf in leaves(teacher)] == [HFTeacher, HFTeacher, SelfTeacher, HFTeacher]
    assert leaves(None) == () and leaves(mixed.teachers[2]) == (mixed.teachers[2],)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["model-a", "model-b"], r"a list of teachers holds the URLs .*EnsembleTeacher"),
        ([], "a list of teachers holds the URLs"),
        ({"EnsembleTeacher": {"teacher": ["a"]}}, "EnsembleTeacher takes teachers and weights, not teacher"),
        ({"EnsembleTeacher": {"teachers": "a"}}, "is a list of teachers, not 'a'"),
        ({"EnsembleTeacher": {"teachers": []}}, "EnsembleTeacher needs teachers"),
        ({"EnsembleTeacher": ["a"]}, r"EnsembleTeacher takes teachers and weights, not \['a'\]"),
        ({"SelfTeacher": {"kinds": "ema"}}, "SelfTeacher takes kind and decay, not kinds"),
        ({"SelfTeacher": {"kind": "mean"}}, "student, ema, copy or adapter_off, not 'mean'"),
        ({"SelfTeacher": {}, "math": "a"}, "EnsembleTeacher and SelfTeacher stand alone"),
        ({"math": None}, "a teacher among several is null"),
        ({}, "RoutedTeacher needs teachers"),
        ("./nowhere", "no model at ./nowhere"),
    ],
)
def test_what_names_no_teacher_is_told_in_one_line(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        resolved(spec)
    assert "\n" not in str(error.value), json.dumps(str(error.value))
