"""A teacher of one tokenizer, students of two others: fine-tuning against ULD, HybridULD and ALM on the same text.

python benchmarks/cross_tokenizer_gsm8k.py --seeds 0 1 2 --output docs/results/cross_tokenizer_gsm8k.md
Teacher: the 4.2M-parameter Llama of GSM8K (4096 BPE tokens). Students: new weights, with tokens that are bytes or a Unigram
tokenizer trained on the training text. All of one tokenizer see the same rows in the same order, so equal bytes, and are scored
by bits per byte on the answers of test questions. Then the teacher itself is given each tokenizer (kdlib transplant) and taught
by what it was (ALM): how much of the gap that the new tokenizer opened is closed. --quick trains for a few steps.
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
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdlib.models import load_tokenizer
from kdlib.tokenizers import byte_tokenizer

RUNS = Path("runs/cross-tokenizer-gsm8k")
METHODS: dict[str, Any] = {
    "fine-tuning": "CrossEntropy",
    "ULD": "ULD",
    "HybridULD": "HybridULD",
    "ALM, T = 1": {"ALM": {"temperature": 1.0}},
    "ALM, T = 100": {"ALM": {"temperature": 100.0}},
}
BATCH = {"bytes": 8, "Unigram": 16}  # rows a step: those of bytes are four times as long
Found = dict[str, list[float]]  # bits per byte of each seed, by method


def common(kind: str, *, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that all runs of a tokenizer share: those of examples/reasoning.yaml, with room for bytes."""
    options = yaml.safe_load(Path("examples/reasoning.yaml").read_text())
    kept = ("dataset_name", "learning_rate", "warmup_steps", "weight_decay", "logging_steps")
    rows = 4 if arguments.quick else BATCH[kind]
    fixed = {"max_length": 1024, "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": rows, "seed": seed}
    return {**{key: options[key] for key in kept}, **fixed}


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


def new_students() -> dict[str, Path]:
    """A directory for each tokenizer: it, and the configuration of a student with new weights."""
    like = load_tokenizer(TEACHER)
    overrides = yaml.safe_load(Path("examples/reasoning.yaml").read_text())["config_overrides"]
    found = {}
    for kind, tokenizer in {"bytes": byte_tokenizer(like), "Unigram": unigram(like, vocab_size=2048)}.items():
        found[kind] = RUNS / f"new-{kind}"
        speaking(tokenizer, like).save_pretrained(found[kind])
        AutoConfig.from_pretrained(TEACHER, **overrides, vocab_size=len(tokenizer)).save_pretrained(found[kind])
    return found


def scored(model: Path, rows: str) -> float:
    """Bits per byte on the test questions' answers; a score that lies beside the model is not taken again."""
    kept = model.parent / "eval" / f"{Path(rows).stem}.json"
    if not kept.is_file():
        words = {"model": model, "dataset_name": rows, "max_length": 1024, "batch_size": 16, "output_path": kept}
        run("-m", "kdlib", "evaluate", *typed(words))
    return float(json.loads(kept.read_text())["bits_per_byte"])


def taught(kind: str, start: Path, method: str, *, seed: int, arguments: argparse.Namespace) -> Path:
    """The ``final`` of a student with new weights; a finished one is not trained again."""
    options = {**common(kind, seed=seed, arguments=arguments), "max_steps": arguments.steps, "from_scratch": True}
    teacher = {} if method == "fine-tuning" else {"teacher": TEACHER}
    where = RUNS / f"{kind}-{list(METHODS).index(method)}-{seed}"
    return trained("distill", where, model=start, objective=METHODS[method], **teacher, **options)


def transferred(kind: str, tokenizer: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Bits per byte of the teacher in new tokens: before, after fine-tuning, and after ALM by what it was (seed 0)."""
    start = RUNS / f"transplanted-{kind}" / "final"
    if not start.is_dir():
        given = "bytes" if kind == "bytes" else tokenizer
        run("-m", "kdlib", "transplant", *typed({"model": TEACHER, "tokenizer": given, "output_dir": start}))
    options = {**common(kind, seed=0, arguments=arguments), "max_steps": arguments.transfer_steps, "learning_rate": 1e-3}
    found = {"transplanted": scored(start, arguments.rows)}
    for method in ("fine-tuning", "ALM, T = 1"):
        teacher = {} if method == "fine-tuning" else {"teacher": TEACHER}
        where = RUNS / f"transfer-{kind}-{list(METHODS).index(method)}"
        model = trained("distill", where, model=start, objective=METHODS[method], **teacher, **options)
        found[method] = scored(model, arguments.rows)
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of students with new weights")
    parser.add_argument("--transfer-steps", type=int, default=200, help="steps of the transplanted teacher")
    parser.add_argument("--questions", type=int, default=250, help="test questions whose answers are scored")
    parser.add_argument("--kinds", nargs="+", default=["Unigram", "bytes"], choices=list(BATCH))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--only", choices=["students", "transfer"], help="one of the two parts")
    parser.add_argument("--runs", help="where the students are kept, runs/cross-tokenizer-gsm8k when left out")
    parser.add_argument("--output", type=Path, help="write the tables as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps and rows")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.steps, given.transfer_steps, given.questions, given.kinds = [0], 2, 2, 8, ["Unigram"]
    return given


STUDENTS = ("student's tokens", "method", "bits per byte", "below fine-tuning", "each seed")
TRANSFERS = ("new tokens", "model", "bits per byte", "gap closed")


def page(students: Mapping[str, Found], transfers: Mapping[str, dict[str, float]], teacher: float, given: Any) -> list[str]:
    rows = ", ".join(f"{BATCH[kind]} rows a step with {kind}" for kind in students or transfers)
    return [
        f"Answers of {given.questions} test questions. Teacher: a 4.2M-parameter Llama with 4096 BPE tokens, {teacher:.4f} "
        f"bits per byte. {rows}; otherwise the settings of `examples/reasoning.yaml` and each objective's defaults, "
        "cross-entropy beside it included.",
        f"## Students with new weights, {given.steps} steps",
        "1.1M parameters less the embeddings that a smaller vocabulary does not need. Mean ± standard deviation over seeds "
        f"{given.seeds}; the same rows in the same order for all methods of a tokenizer, so equal bytes.",
        markdown_table(STUDENTS, student_lines(students)),
        f"## The teacher in new tokens, {given.transfer_steps} steps",
        "`kdlib transplant` with its defaults, then `kdlib distill` by cross-entropy alone and by ALM with the model as it was "
        "as the teacher; learning rate 1e-3, seed 0. The gap is that between the transplanted model and the teacher.",
        markdown_table(TRANSFERS, transfer_lines(transfers, teacher)),
    ]


def main() -> None:
    global RUNS
    arguments = parsed()
    output = None if arguments.output is None else arguments.output.resolve()
    RUNS = RUNS if arguments.runs is None else Path(arguments.runs).resolve()
    begun(RUNS)
    arguments.rows = head("runs/gsm8k/test.jsonl", arguments.questions, RUNS / f"test-{arguments.questions}.jsonl")
    started = {kind: start for kind, start in new_students().items() if kind in arguments.kinds}
    students: dict[str, Found] = {}
    transfers: dict[str, dict[str, float]] = {}
    for kind, start in started.items() if arguments.only != "transfer" else ():
        students[kind] = {method: [] for method in arguments.methods}
        for seed in arguments.seeds:
            for method in arguments.methods:
                model = taught(kind, start, method, seed=seed, arguments=arguments)
                students[kind][method].append(scored(model, arguments.rows))
    for kind, start in started.items() if arguments.only != "students" else ():
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
