"""Models, rows and an objective on disk, and the command called as users call it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdlib.cli.main import main
from tests.tiny import tiny_llama, tiny_tokenizer

OWN_OBJECTIVE = '''
from dataclasses import dataclass
from kdlib.objectives import ForwardKL

@dataclass(frozen=True, kw_only=True)
class Scaled(ForwardKL):
    """ForwardKL times a factor."""
    factor: float = 2.0

    def row(self, q, p, labels):
        return self.factor * super().row(q, p, labels)

@dataclass
class NoObjective:
    x: int = 0
'''


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def kdlib(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``kdlib("distill", "--overwrite", model=path)``: words and, as keywords, options.

    Progress bars are taken out: here even quick ones show, because tqdm was imported before the command.
    """
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str, **options: Any) -> Outcome:
        typed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        capfd.readouterr()
        code = main([*words, *typed])
        captured = capfd.readouterr()
        return Outcome(code=code, out=captured.out, err=re.sub(r"(\r[^\r\n]*)+\n?", "", captured.err))

    return run


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student/, teacher/, stranger/ (another tokenizer), rows.jsonl and own.py."""
    root = tmp_path_factory.mktemp("place")
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer(vocab_size=340)
    for name, words, seed in (("student", tokenizer, 0), ("teacher", tokenizer, 1), ("stranger", other, 2)):
        words.save_pretrained(root / name)
        tiny_llama(len(words), seed=seed).save_pretrained(root / name)
    write_rows(root / "rows.jsonl", [conversation(f"What is {i} plus two?", f"It is {i + 2}.") for i in range(16)])
    (root / "own.py").write_text(OWN_OBJECTIVE)
    return root


@pytest.fixture
def options(place: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of two steps; nothing but CPU."""
    return {
        "model": place / "student",
        "teacher": place / "teacher",
        "dataset_name": place / "rows.jsonl",
        "output_dir": tmp_path / "run",
        "use_cpu": "true",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
    }


def conversation(question: str, *answers: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            *({"role": "assistant", "content": answer} for answer in answers),
        ]
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tree(directory: Path) -> dict[str, bytes]:
    """Every file under a directory with its content."""
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
