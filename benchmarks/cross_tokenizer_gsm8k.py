"""A teacher of one tokenizer, students of two others: fine-tuning against ULD, HybridULD and ALM on the same text.

python benchmarks/cross_tokenizer_gsm8k.py --seeds 0 1 2 --output docs/results/cross_tokenizer_gsm8k.md
Teacher: the 4.2M-parameter Llama of GSM8K (4096 BPE tokens). Students: what `kdlib transplant` makes of it with tokens that are
bytes or a Unigram tokenizer trained on the training text. First on few rows: all methods of a tokenizer see the same rows in
the same order, so equal bytes, other rows with every seed, and are scored by bits per byte on answers of test questions. Then
on all rows, by the model as it was: how much of the gap that the new tokenizer opened is closed. --quick trains few steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from gsm8k import TEACHER, begun, head, run
from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training import trained, typed
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdlib.files import write_whole
from kdlib.models import load_tokenizer
from kdlib.tokenizers import byte_tokenizer

RUNS = Path("runs/cross-tokenizer-gsm8k")
METHODS: dict[str, Any] = {
    "fine-tuning": "CrossEntropy",
    "ULD": "ULD",
    "HybridULD": "HybridULD",
    "ALM": {"ALM": {"cross_entropy": 0.1, "hidden": 1.0}},
    "fine-tuning, a quarter of the steps": "CrossEntropy",  # before it has learnt the rows by heart
}
TEACHER_FREE = "fine-tuning"
SCORED = 250  # the first test questions; rows that the teacher was not trained on are taken from behind them
FEW = {"Unigram": 160, "bytes": 40}  # rows of a student: those of bytes are four times as long
BATCH = {"Unigram": 8, "bytes": 2}  # rows a step on few rows
ALL = {  # on all rows
    "Unigram": {"batch": 8, "rate": 1e-3, "steps": 600},
    "bytes": {"batch": 4, "rate": 2e-3, "steps": 400},
}
RATE = 1e-3  # on few rows
Found = dict[str, list[float]]  # bits per byte of each seed, by method


def common(rows: int, rate: float, *, seed: int, quick: bool) -> dict[str, Any]:
    """The options that all runs share: those of examples/reasoning.yaml, with room for bytes."""
    options = yaml.safe_load(Path("examples/reasoning.yaml").read_text())
    kept = ("warmup_steps", "weight_decay", "logging_steps")
    fixed = {"max_length": 1024, "save_strategy": "no", "disable_tqdm": True, "seed": seed, "learning_rate": rate}
    return {**{key: options[key] for key in kept}, **fixed, "per_device_train_batch_size": 4 if quick else rows}


def texts(rows: str) -> Iterator[str]:
    for line in Path(rows).read_text().splitlines():
        for message in json.loads(line)["messages"]:
            yield message["content"]


def unigram(like: PreTrainedTokenizerBase, *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer of the training text with byte fallback and the special tokens of ``like``."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()]
    )
    roles = {name: str(getattr(like, name)) for name in ("pad_token", "bos_token", "eos_token")}
    added = [str(token) for token in like.added_tokens_decoder.values()]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    size = vocab_size - len(pieces) - len(added)
    trainer = trainers.UnigramTrainer(vocab_size=size, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts("runs/gsm8k/train.jsonl"), trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"][1:1] = [[piece, -30.0] for piece in pieces]
    content["model"]["byte_fallback"] = True
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="<unk>", **roles)
    return made


def speaking(tokenizer: PreTrainedTokenizerBase, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template of ``like`` and the special tokens that it writes."""
    known = set(tokenizer.all_special_tokens)
    marks = [str(token) for token in like.added_tokens_decoder.values() if str(token) not in known]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = like.chat_template
    return tokenizer


def tokenizers() -> dict[str, Path]:
    """A directory for each tokenizer."""
    like = load_tokenizer(TEACHER)
    found = {}
    for kind, tokenizer in {"bytes": byte_tokenizer(like), "Unigram": unigram(like, vocab_size=2048)}.items():
        found[kind] = RUNS / f"tokenizer-{kind}"
        speaking(tokenizer, like).save_pretrained(found[kind])
    return found


def transplanted(kind: str, tokenizer: Path) -> Path:
    """The teacher in new tokens, as it is before any training."""
    start = RUNS / f"transplanted-{kind}" / "final"
    if not start.is_dir():
        run("-m", "kdlib", "transplant", *typed({"model": TEACHER, "tokenizer": tokenizer, "output_dir": start}))
    return start


def scored(model: Path, rows: str) -> float:
    """Bits per byte on the test questions' answers; a score that lies beside the model is not taken again."""
    kept = model.parent / "eval" / f"{Path(rows).stem}.json"
    if not kept.is_file():
        words = {"model": model, "dataset_name": rows, "max_length": 1024, "batch_size": 16, "output_path": kept}
        run("-m", "kdlib", "evaluate", *typed(words))
    return float(json.loads(kept.read_text())["bits_per_byte"])


def few(kind: str, *, seed: int) -> str:
    """Rows that the teacher was not trained on, others for each seed."""
    rows = Path("runs/gsm8k/test.jsonl").read_text().splitlines(keepends=True)[SCORED:]
    target = RUNS / f"rows-{kind}-{seed}.jsonl"
    write_whole(target, "".join(rows[FEW[kind] * seed : FEW[kind] * (seed + 1)]))
    return str(target)


def taught(kind: str, start: Path, method: str, *, seed: int, arguments: argparse.Namespace) -> Path:
    """The ``final`` of a student on few rows; a finished one is not trained again."""
    steps = arguments.steps // 4 if method.endswith("a quarter of the steps") else arguments.steps
    options = common(BATCH[kind], RATE, seed=seed, quick=arguments.quick) | {"max_steps": max(1, steps)}
    where = RUNS / f"{kind}-{list(METHODS).index(method)}-{seed}"
    rows = {"dataset_name": few(kind, seed=seed)}
    return trained("distill", where, model=start, objective=METHODS[method], **teacher_of(method), **rows, **options)


def teacher_of(method: str) -> dict[str, str]:
    return {} if method.startswith(TEACHER_FREE) else {"teacher": TEACHER}


def recovered(kind: str, start: Path, method: str, arguments: argparse.Namespace) -> Path:
    """The ``final`` of the transplanted teacher after training on all rows, seed 0."""
    options = common(int(ALL[kind]["batch"]), ALL[kind]["rate"], seed=0, quick=arguments.quick)
    options |= {"dataset_name": "runs/gsm8k/train.jsonl", "max_steps": 2 if arguments.quick else int(ALL[kind]["steps"])}
    where = RUNS / f"transfer-{kind}-{list(METHODS).index(method)}"
    return trained("distill", where, model=start, objective=METHODS[method], **teacher_of(method), **options)


def student(kind: str, start: Path, arguments: argparse.Namespace) -> Path:
    """What training on few rows starts from. In bytes the transplanted model writes no text yet, and few rows teach it little
    by any method: it is fine-tuned on all rows before.
    """
    return recovered(kind, start, TEACHER_FREE, arguments) if kind == "bytes" else start


def transferred(kind: str, start: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Bits per byte of the teacher in new tokens: before, after fine-tuning, and after ALM by what it was."""
    found = {"transplanted": scored(start, arguments.rows)}
    for method in arguments.transfer:
        found[method] = scored(recovered(kind, start, method, arguments), arguments.rows)
    return found


def student_lines(results: Mapping[str, Found]) -> list[list[str]]:
    """Mean, spread and every seed, and at how many seeds a method is below fine-tuning."""
    lines = []
    for kind, of in results.items():
        base = of["fine-tuning"]
        for method, values in of.items():
            below = sum(a < b for a, b in zip(values, base, strict=True))
            better = "" if method == "fine-tuning" else f"{below} of {len(base)}"
            lines.append([kind, method, _shown(values), better, ", ".join(f"{value:.4f}" for value in values)])
    return lines


def _shown(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{spread}"


def transfer_lines(results: Mapping[str, dict[str, float]], teacher: float) -> list[list[str]]:
    """Bits per byte, and the share of the gap to the teacher that is closed."""
    lines = []
    for kind, found in results.items():
        gap = found["transplanted"] - teacher
        for name, value in found.items():
            closed = "" if name == "transplanted" else f"{(found['transplanted'] - value) / gap:.1%}"
            lines.append([kind, name, f"{value:.4f}", closed])
    return lines


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the rows, their order and the draws")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps on few rows")
    parser.add_argument("--kinds", nargs="+", default=list(FEW), choices=list(FEW))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--transfer", nargs="+", default=["fine-tuning", "ALM"], choices=list(METHODS), help="methods on all rows"
    )
    parser.add_argument("--only", choices=["few", "transfer"], help="one of the two parts")
    parser.add_argument("--runs", help="where the students are kept, runs/cross-tokenizer-gsm8k when left out")
    parser.add_argument("--output", type=Path, help="write the tables as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps and rows")
    given = parser.parse_args()
    given.questions = 8 if given.quick else SCORED
    if given.quick:
        given.seeds, given.steps, given.kinds = [0], 2, ["Unigram"]
    return given


STUDENTS = ("student's tokens", "method", "bits per byte", "below fine-tuning", "each seed")
TRANSFERS = ("new tokens", "model", "bits per byte", "gap closed")


def page(students: Mapping[str, Found], transfers: Mapping[str, dict[str, float]], teacher: float, given: Any) -> list[str]:
    rows = ", ".join(f"{FEW[kind]} with {kind} ({BATCH[kind]} a step)" for kind in students or transfers)
    return [
        f"Answers of {given.questions} test questions. Teacher: a 4.2M-parameter Llama with 4096 BPE tokens, {teacher:.4f} "
        "bits per byte. Students: the teacher after `kdlib transplant`. Linear warm-up over 5% of the steps, then cosine; "
        f"weight decay 0.1. ALM with {json.dumps(METHODS['ALM']['ALM'])}; everything else, ULD and HybridULD too, at its "
        "defaults.",
        f"## Few rows, {given.steps} steps",
        f"Rows of GSM8K's test split behind the scored ones, which the teacher was not trained on: {rows}, others for each "
        f"seed; peak learning rate {RATE:g}. Students start from the transplanted model, in bytes from the one fine-tuned on "
        f"all rows below. Mean ± standard deviation over seeds {given.seeds}; the same rows in the same order for all "
        "methods of a tokenizer and seed, so equal bytes.",
        markdown_table(STUDENTS, student_lines(students)),
        "## All rows",
        "The training split, by cross-entropy alone and by ALM with the model as it was as the teacher; rows a step, peak "
        f"learning rate and steps: {json.dumps(ALL)}, seed 0. The gap is that between the transplanted model and the teacher.",
        markdown_table(TRANSFERS, transfer_lines(transfers, teacher)),
    ]


def main() -> None:
    global RUNS
    arguments = parsed()
    output = None if arguments.output is None else arguments.output.resolve()
    RUNS = RUNS if arguments.runs is None else Path(arguments.runs).resolve()
    begun(RUNS)
    arguments.rows = head("runs/gsm8k/test.jsonl", arguments.questions, RUNS / f"test-{arguments.questions}.jsonl")
    starts = {kind: transplanted(kind, path) for kind, path in tokenizers().items() if kind in arguments.kinds}
    students: dict[str, Found] = {}
    transfers: dict[str, dict[str, float]] = {}
    for kind, transplant in starts.items() if arguments.only != "transfer" else ():
        start, students[kind] = student(kind, transplant, arguments), {method: [] for method in arguments.methods}
        for seed in arguments.seeds:
            for method in arguments.methods:
                model = taught(kind, start, method, seed=seed, arguments=arguments)
                students[kind][method].append(scored(model, arguments.rows))
    for kind, start in starts.items() if arguments.only != "few" else ():
        transfers[kind] = transferred(kind, start, arguments)
    kept = RUNS / "teacher.json"
    run("-m", "kdlib", "evaluate", *typed({"model": TEACHER, "dataset_name": arguments.rows, "output_path": kept}))
    teacher = float(json.loads(kept.read_text())["bits_per_byte"])
    for columns, shown in ((STUDENTS, student_lines(students)), (TRANSFERS, transfer_lines(transfers, teacher))):
        table = Table(*columns)
        for row in shown:
            table.add_row(*row)
        Console().print(table)
    if output:
        parts = page(students, transfers, teacher, arguments)
        write_results(str(output), title="GSM8K: students and teacher of different tokenizers", parts=parts)


if __name__ == "__main__":
    main()
