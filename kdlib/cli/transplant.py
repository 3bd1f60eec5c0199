"""``kdlib transplant``: a model with another tokenizer, ready to be trained."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from kdlib.cli.parsing import check_least, parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdlib.cli.transplant_model import Transplanted

DESCRIPTION = """Writes a model that reads and writes with another tokenizer. Tokens that both tokenizers have keep their rows
in the embeddings and in the head, the others get rows made of old ones; special tokens and the chat template move by role.

It is a start and no more: train it with its old self as the teacher, by the command that is printed."""
SAMPLE = """Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.
def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # 3.14159
Der schnelle braune Fuchs springt über den faulen Hund. Où est la bibliothèque ? ¿Cuántos años tienes?
Быстрая лиса перепрыгивает через ленивую собаку. 敏捷的棕色狐狸跳过了懒狗。素早い狐がのろまな犬を飛び越える。 😀
"""


@dataclass
class TransplantArguments:
    """Which model gets which tokenizer.

    Args:
        model: the causal language model, a directory or Hub id.
        tokenizer: its new tokenizer, a directory or Hub id; bytes makes one whose tokens are bytes.
        output_dir: the directory to write; it must be empty or not there.
        method: the rows of tokens that the old tokenizer does not have: fvt takes the mean of the old tokens that spell them,
            tokenadapt weighs these and the old tokens that look most alike, mean takes the mean of all.
        untie: give a head that shares its weights with the embeddings weights of its own.
        pad_to_multiple_of: add unused rows up to a multiple of this, for tensor cores or tensor parallelism.
        seed: of the noise in rows of tokens that the old tokenizer cannot spell.
        dataset_name: rows on which tokens per byte are counted; a few lines of English, code and other languages when left out.
        dataset_config: configuration name of a Hub dataset.
        dataset_train_split: split of the rows.
        limit: count on the first rows only.
        dtype: the weights, auto (as saved), float32 or bfloat16.
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
    """

    model: str
    tokenizer: str
    output_dir: str
    method: Literal["fvt", "mean", "tokenadapt"] = "fvt"
    untie: bool = False
    pad_to_multiple_of: int | None = None
    seed: int = 0
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    limit: int = 200
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_least(self, {"pad_to_multiple_of": 1, "limit": 1, "seed": 0})


def run(words: list[str]) -> int:
    options = parse("transplant", DESCRIPTION, [TransplantArguments], words)
    if options is None:
        return 0
    a = options.build(TransplantArguments)
    _check_free(Path(a.output_dir))
    if Path(a.model, "adapter_config.json").is_file():
        raise ValueError(f"{a.model} is an adapter: give the merged model (final/ of a run is)")
    _written(a)
    return 0


def _written(a: TransplantArguments) -> None:
    """Tokenizers and rows are read, and checked, before the model."""
    from kdlib.cli.transplant_model import transplant
    from kdlib.drafts.export import written_whole
    from kdlib.models import load_model, load_tokenizer
    from kdlib.tokenizers import token_bytes
    from kdlib.tokenizers.pure_bytes import byte_tokenizer

    old = load_tokenizer(a.model, trust_remote_code=a.trust_remote_code)
    new = byte_tokenizer(old) if a.tokenizer == "bytes" else load_tokenizer(a.tokenizer, trust_remote_code=a.trust_remote_code)
    for tokenizer in (old, new):
        token_bytes(tokenizer)  # a ValueError where they are not known
    texts = _texts(a)
    model = load_model(a.model, dtype=a.dtype, trust_remote_code=a.trust_remote_code)
    before = model.get_input_embeddings().weight.shape[0]
    done = transplant(
        model, old=old, new=new, method=a.method, seed=a.seed, untie=a.untie, pad_to_multiple_of=a.pad_to_multiple_of
    )
    with written_whole(Path(a.output_dir)) as directory:
        model.save_pretrained(directory)
        done.tokenizer.save_pretrained(directory)
    console = Console(soft_wrap=True, highlight=False)
    sizes = f"{before:,} -> {model.get_input_embeddings().weight.shape[0]:,} rows"
    console.print(_table(a, done, sizes=sizes, per_byte=[_per_byte(t, texts) for t in (old, done.tokenizer)]))
    console.print("\n".join([*done.notes, *_unknown(done.tokenizer, texts), _next_command(a)]), markup=False)


def _table(a: TransplantArguments, done: Transplanted, *, sizes: str, per_byte: list[float]) -> Table:
    copied, summed, otherwise = done.plan.counts
    table = Table(title=a.output_dir, show_header=False, title_justify="left")
    table.add_row("vocabulary", sizes)
    table.add_row("tokens copied", f"{copied:,}")
    table.add_row("made of pieces", f"{summed:,}")
    table.add_row("made otherwise", f"{otherwise:,}")
    table.add_row("tokens per byte", f"{per_byte[0]:.3f} -> {per_byte[1]:.3f} ({a.dataset_name or 'built-in sample'})")
    return table


def _unknown(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[str]:
    """A line where the new tokenizer does not know all of the sample: what it skips is no saving."""
    from kdlib.tokenizers.pieces import unknown_ids

    unknown = unknown_ids(tokenizer)
    ids = [index for text in texts for index in tokenizer.encode(text, add_special_tokens=False)]
    if count := sum(index in unknown for index in ids):
        yield f"the new tokenizer does not know all of this text: {count:,} of its {len(ids):,} tokens are unknown"


def _next_command(a: TransplantArguments) -> str:
    """The training that makes it a model again: it learns from its old self."""
    words = ["kdlib", "distill", "--model", a.output_dir, "--teacher", a.model, "--objective", "ALM"]
    return f"next    {shlex.join([*words, '--dataset_name', a.dataset_name or 'ROWS', '--output_dir', 'OUT'])}"


def _check_free(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output_dir {path} is not empty: choose another directory")


def _texts(a: TransplantArguments) -> list[str]:
    if a.dataset_name is None:
        return [SAMPLE]
    from kdlib.data.load import load_rows

    rows = load_rows(a.dataset_name, split=a.dataset_train_split, config=a.dataset_config, limit=a.limit)
    found = [text for row in rows for text in _strings(row)]
    if not found:
        raise ValueError(f"dataset {a.dataset_name} has no text in its first {a.limit} rows: leave dataset_name out")
    return found


def _strings(value: Any) -> Iterator[str]:
    """The texts of a row, however deep, without the roles of its messages."""
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "role":
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _per_byte(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return tokens / sum(len(text.encode()) for text in texts)
