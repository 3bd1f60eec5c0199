"""Watching a golden metric while a student trains: does it still follow the loss?"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdlib.data import load_rows
from kdlib.drafts.eagle3 import Eagle3Draft
from kdlib.eval.bpb import scored_bytes
from kdlib.eval.hacking import LOOKS_FILE, Look, Verdict, alarm_text, judge, read_looks, write_looks
from kdlib.eval.row_sums import row_divergences, row_nats
from kdlib.models import check_causal, load_model, load_tokenizer
from kdlib.tokenizers import explain_difference, same_tokenizer
from kdlib.trainers import setup
from kdlib.trainers.config import DistillationConfig
from kdlib.trainers.golden_options import BEST_GOLDEN

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("kdlib.golden")


@dataclass(frozen=True, kw_only=True)
class GoldenText:
    """-log q of held-out text in nats, per UTF-8 byte: ``rows`` are verified answers, or those of a better model."""

    rows: Dataset
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    unit: str = "byte"

    @property
    def per(self) -> list[float]:
        return [float(scored_bytes(row["input_ids"], row["labels"], tokenizer=self.tokenizer)) for row in self.rows]

    def nats(self, student: Any) -> list[float]:
        found = row_nats(student, self.rows, tokenizer=self.tokenizer, batch_size=self.batch_size)
        return list(found.of.tolist())


@dataclass(frozen=True, kw_only=True)
class GoldenTeacher:
    """KL(p || q) to a better ``teacher`` p in nats, per scored token of the evaluation rows."""

    teacher: Any
    rows: Dataset
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    unit: str = "token"

    @property
    def per(self) -> list[float]:
        return [float(sum(label != -100 for label in row["labels"][1:])) for row in self.rows]

    def nats(self, student: Any) -> list[float]:
        self.teacher.to(student.device)
        found = row_divergences(student, self.teacher, self.rows, tokenizer=self.tokenizer, batch_size=self.batch_size)
        return list(found.of.tolist())


class GoldenCallback(TrainerCallback):
    """Measures ``golden`` at every evaluation, warns of teacher hacking, and stops there where ``stop`` says so.

    The metrics are ``golden/*`` of ``kdlib.eval.hacking.Verdict`` in metrics.jsonl; eval/golden.jsonl keeps what each row
    said, so that a resumed run goes on as if it had not been stopped. Rank 0 measures, all ranks hear of it.
    """

    def __init__(self, golden: GoldenText | GoldenTeacher, *, stop: bool) -> None:
        self.golden, self.stop = golden, stop
        self.per, self.looks, self.alarmed = golden.per, list[Look](), False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if isinstance(model, Eagle3Draft):
            raise ValueError("a golden metric is one of language models, which an EAGLE-3 head is not: leave golden_* out")
        check_causal(model, role="student")
        if args.fsdp_plugin_args is not None:
            raise ValueError("a golden metric needs the student's whole weights on rank 0: use ddp, or leave golden_* out")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.looks = read_looks(_file(args), until=state.global_step) if state.global_step else []
        alarmed = bool(self.looks) and self._judged(state).alarm
        self.alarmed = bool(broadcast_object_list([alarmed])[0])  # ranks on other machines may not see the file

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.alarmed and self.stop:  # also where a run was killed between its alarm and its end
            control.should_training_stop = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if any(look.step == state.global_step for look in self.looks):
            return  # the evaluation after the last step
        heard: list[Verdict | None] = [self._measured(model, args, state) if state.is_world_process_zero else None]
        verdict = broadcast_object_list(heard)[0]
        assert verdict is not None and metrics is not None
        if not state.is_world_process_zero:
            self.looks.append(Look(step=state.global_step, nats=()))
        metrics[BEST_GOLDEN] = verdict.value  # where load_best_model_at_end looks
        self.alarmed = self.alarmed or verdict.alarm
        if self.alarmed and self.stop:
            control.should_training_stop = True

    def _measured(self, student: Any, args: TrainingArguments, state: TrainerState) -> Verdict:
        self.looks.append(Look(step=state.global_step, nats=self.golden.nats(student)))
        write_looks(_file(args), self.looks)
        verdict = self._judged(state)
        if verdict.alarm and not self.alarmed:
            logger.warning("%s", alarm_text(verdict, unit=self.golden.unit))
        state.log_history.append({**verdict.metrics(), "step": state.global_step})
        with (Path(str(args.output_dir)) / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **verdict.metrics()}) + "\n")
        return verdict

    def _judged(self, state: TrainerState) -> Verdict:
        losses = [(line["step"], line["loss"]) for line in state.log_history if "loss" in line]
        return judge(self.looks, self.per, losses=losses)


def golden_callbacks(args: DistillationConfig, student: str, *, evaluation_rows: Any) -> list[TrainerCallback]:
    """The callback that the options ask for, if any; ValueError for golden rows or a golden teacher that do not fit.

    ``student``: the path or Hub id beside which its tokenizer lies.
    """
    if args.golden_dataset_name is None and args.golden_teacher is None:
        return []
    tokenizer = setup.student_tokenizer(student, args)
    shared: Mapping[str, Any] = {"tokenizer": tokenizer, "batch_size": args.per_device_eval_batch_size}
    golden: GoldenText | GoldenTeacher
    if args.golden_dataset_name is not None:
        golden = GoldenText(rows=_prepared(load_rows(args.golden_dataset_name), tokenizer, args), **shared)
        if not sum(golden.per):
            raise ValueError(f"golden_dataset_name {args.golden_dataset_name} holds no text to score: give rows with answers")
    else:
        teacher = _golden_teacher(args, tokenizer)
        golden = GoldenTeacher(teacher=teacher, rows=_prepared(evaluation_rows, tokenizer, args), **shared)
    return [GoldenCallback(golden, stop=args.golden_stop)]


def _prepared(rows: Any, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig) -> Dataset:
    found = setup.prepared(rows, tokenizer, args, packing=False)
    assert found is not None
    return found.dataset


def _golden_teacher(args: DistillationConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    assert args.golden_teacher is not None
    other = load_tokenizer(args.golden_teacher, trust_remote_code=args.trust_remote_code)
    if not same_tokenizer(tokenizer, other):
        raise ValueError(
            f"student and golden_teacher have different tokenizers ({explain_difference(tokenizer, other)}): give text that it "
            "wrote instead, as golden_dataset_name"
        )
    return load_model(args.golden_teacher, dtype=args.teacher_dtype, trust_remote_code=args.trust_remote_code)


def _file(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir)) / "eval" / LOOKS_FILE
