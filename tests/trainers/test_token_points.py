"""Where the token vectors of sample-wise transport come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kdlib.teachers import CachedTeacher, EnsembleTeacher, HFTeacher, RoutedTeacher, SelfTeacher, VLLMTeacher
from kdlib.tokenizers import surface_vectors
from kdlib.trainers.token_points import check_token_points, token_points
from kdlib.types import Teacher
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
PADDED = V + 7


def points(source: str, teacher: Teacher | None = None) -> Tensor:
    found = token_points(source, teacher=teacher, tokenizer=TOKENIZER, vocab_size=V, device=torch.device("cpu"))
    assert found is not None and found.teacher is None
    return found.student


def hf_teacher(vocab_size: int = PADDED) -> HFTeacher:
    return HFTeacher(tiny_llama(vocab_size, seed=1), tokenizer=TOKENIZER)


def stored(path: Path, **tensors: Tensor) -> str:
    save_file(tensors, path)
    return str(path)


def refusal(source: str, teacher: Teacher | None = None, *, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        points(source, teacher)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_teachers_input_embeddings() -> None:
    teacher = hf_teacher()
    found = points("teacher", teacher)
    embeddings: Any = teacher.model.get_input_embeddings()
    assert torch.equal(found, embeddings.weight[:V])
    assert not torch.equal(found, teacher.model.lm_head.weight[:V])  # type: ignore[operator, union-attr, index]
    assert not found.requires_grad
    assert torch.equal(points("teacher", EnsembleTeacher([teacher])), found)


def test_the_students_change_in_training() -> None:
    given: dict[str, Any] = {"tokenizer": TOKENIZER, "vocab_size": V, "device": torch.device("cpu")}
    assert token_points("student", teacher=hf_teacher(), **given) is None
    assert token_points("student", teacher=None, **given) is None


def test_vectors_of_the_tokens_text() -> None:
    assert torch.equal(points("surface"), surface_vectors(TOKENIZER, vocab_size=V))


@pytest.mark.parametrize("rows", [V, PADDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_a_file_are_cut_to_the_tokenizer(tmp_path: Path, rows: int, dtype: torch.dtype) -> None:
    vectors = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = points(stored(tmp_path / "points.safetensors", any_name=vectors))
    assert torch.equal(found, vectors[:V])


def test_vectors_are_put_on_the_device(tmp_path: Path) -> None:
    name = stored(tmp_path / "points.safetensors", x=torch.zeros(V, 5))
    for source in (name, "teacher", "surface"):
        found = token_points(source, teacher=hf_teacher(), tokenizer=TOKENIZER, vocab_size=V, device=torch.device("meta"))
        assert found is not None and found.student.device.type == "meta"


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    two = stored(tmp_path / "two.safetensors", b=torch.zeros(V, 5), a=torch.zeros(V, 5))
    assert refusal(two) == f"{two} holds 2 tensors (a, b): token_points needs one [V, F]"
    empty = stored(tmp_path / "empty.safetensors")
    assert refusal(empty) == f"{empty} holds 0 tensors (): token_points needs one [V, F]"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    assert refusal(str(broken)).startswith(f"token_points {broken} cannot be read as safetensors: ")
    for vectors in (torch.zeros(V, 5, dtype=torch.int64), torch.full((V, 5), torch.nan)):
        name = stored(tmp_path / "x.safetensors", x=vectors)
        assert refusal(name) == f"token_points {name} must hold finite floating-point numbers"


def test_vectors_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    fix = f"the tokenizer has {V} tokens: give one vector for each token of its own vocabulary"
    small = stored(tmp_path / "small.safetensors", x=torch.zeros(V - 1, 5))
    assert refusal(small) == f"token_points {small} has shape [{V - 1}, 5], {fix}"
    flat = stored(tmp_path / "flat.safetensors", x=torch.zeros(V))
    assert refusal(flat) == f"token_points {flat} has shape [{V}], {fix}"
    assert refusal("teacher", hf_teacher(V - 1)) == f"token_points teacher has shape [{V - 1}, 32], {fix}"


def test_sources_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.safetensors")
    assert refusal(missing, kind=FileNotFoundError) == f"no file {missing} (token_points)"
    directory = tmp_path / "directory.safetensors"
    directory.mkdir()
    assert refusal(str(directory), kind=FileNotFoundError) == f"no file {directory} (token_points)"
    for word in ("Teacher", "", "points.pt"):
        assert refusal(word, hf_teacher()) == f"token_points is teacher, student, surface or a .safetensors file, not {word!r}"


def test_teachers_without_embeddings_here_are_refused() -> None:
    cached, served = CachedTeacher.__new__(CachedTeacher), VLLMTeacher.__new__(VLLMTeacher)  # nothing of them is read
    two = [hf_teacher(), hf_teacher()]
    refused = [None, cached, served, SelfTeacher(), EnsembleTeacher(two), RoutedTeacher({"a": two[0], "b": two[1]})]
    for teacher in refused:
        assert refusal("teacher", teacher) == (
            "token_points teacher reads the embeddings of a single teacher in this process: "
            "set objective.token_points to student, surface or a .safetensors file"
        )


def test_student_vectors_in_parts_are_refused() -> None:
    fsdp: Any = SimpleNamespace(distributed_type="FSDP")
    with pytest.raises(ValueError, match="token_points student needs whole embeddings, FSDP keeps them in parts"):
        check_token_points("student", fsdp)
    check_token_points("surface", fsdp)
    check_token_points("student", SimpleNamespace(distributed_type="MULTI_CPU"))  # type: ignore[arg-type]
