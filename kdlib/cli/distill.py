"""``kdlib distill``: rows, teacher and student in; a scored, loadable final/ and a report out."""

from __future__ import annotations

import signal
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kdlib.cli.arguments import AdapterArguments, LaunchArguments, RunArguments
from kdlib.cli.launch import relaunch
from kdlib.cli.parsing import Options, parse
from kdlib.cli.run_directory import RunDirectory, Stage
from kdlib.cli.scoring import ScoringArguments, check_tasks

if TYPE_CHECKING:
    from kdlib.trainers import DistillationTrainer

DESCRIPTION = """Trains a student on a teacher's distributions.

The same command again resumes; --overwrite true starts anew. --preview 3 shows what would be scored.

Several processes: --num_processes N, or accelerate launch -m kdlib distill ..., or
torchrun -m kdlib distill ..."""


def run(words: list[str], *, quiet: bool = False) -> int:
    """The exit code; ``quiet`` leaves out the lines about the run, for a command that makes several."""
    from kdlib.trainers.config import DistillationConfig

    classes = [RunArguments, AdapterArguments, ScoringArguments, LaunchArguments, DistillationConfig]
    options = parse("distill", DESCRIPTION, classes, words)
    if options is None:
        return 0
    arguments = options.build(RunArguments)
    if arguments.preview:
        return _preview(arguments, options)
    if options.config["output_dir"] is None:
        raise ValueError("output_dir missing: add --output_dir DIR")
    directory = RunDirectory(options.config["output_dir"])
    stage = directory.stage(options.config, overwrite=arguments.overwrite)
    relaunch("distill", words, options.build(LaunchArguments))
    return _Run(options, directory=directory, words=words, quiet=quiet).start(stage)


def _preview(arguments: RunArguments, options: Options) -> int:
    """Rows as they would be trained on: needs the student's tokenizer, no model."""
    from kdlib.data import preview_rows
    from kdlib.trainers import setup
    from kdlib.trainers.config import DistillationConfig

    config = options.build(DistillationConfig)
    tokenizer = setup.student_tokenizer(arguments.model, config)
    rows = setup.prepared(_training_rows(arguments), tokenizer, config, packing=config.packing)
    assert rows is not None
    Console(soft_wrap=True, highlight=False).print(preview_rows(rows.dataset, tokenizer, count=arguments.preview))
    return 0


class _Run:
    """One call of the command: its options, its directory, and what happens in order."""

    def __init__(self, options: Options, *, directory: RunDirectory, words: list[str], quiet: bool) -> None:
        from kdlib.trainers.config import DistillationConfig

        self.options, self.directory, self.words = options, directory, words
        self.arguments, self.scoring = options.build(RunArguments), options.build(ScoringArguments)
        self.adapter, self.args = options.build(AdapterArguments), options.build(DistillationConfig)
        self.main, self.quiet = self.args.process_index == 0, quiet
        self.log = Console(stderr=True, soft_wrap=True, highlight=False, quiet=quiet or not self.main)

    def start(self, stage: Stage) -> int:
        """The exit code; nothing is written before all that can be checked has been."""
        if stage is Stage.DONE:
            self.log.print(
                f"{self.directory.path} holds this run, finished; --overwrite true starts it anew",
                markup=False,
            )
            self._closing_lines()
            return 0
        trainer, plan = self._prepared()
        trainer.accelerator.wait_for_everyone()  # all ranks have looked at the directory before it changes
        if self.main:
            self.directory.begin(self.options.config, words=["distill", *self.words], plan=plan, stage=stage)
        self.log.print(_plan_line(plan), markup=False)
        checkpoint = self.directory.checkpoint if stage is Stage.RESUME else None
        if checkpoint is not None:
            self.log.print(f"resuming from {checkpoint}", markup=False)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            trainer.close()
        stopped = trainer.signals_received.received is not None
        code = self._stopped(trainer) if stopped else self._finish(trainer)
        trainer.accelerator.end_training()  # gloo's threads, left running, can abort a process that has done its work
        return code

    def _prepared(self) -> tuple[DistillationTrainer, dict[str, Any]]:
        """The trainer and its plan; where something does not fit, output_dir stays as it was."""
        from kdlib.cli.plan import plan

        check_tasks(self.scoring)
        try:
            trainer = self._trainer()
            return trainer, plan(trainer)
        except BaseException:
            self.directory.remove_if_empty()
            raise

    def _trainer(self) -> DistillationTrainer:
        from transformers import TrainerCallback

        from kdlib.cli.adapters import peft_config, quantization_config
        from kdlib.trainers import DistillationTrainer

        callbacks: list[TrainerCallback] = []
        if self.scoring.tasks:
            from kdlib.eval import EvaluateCallback

            callbacks.append(EvaluateCallback(**self._scoring_options()))
        return DistillationTrainer(
            model=self.arguments.model,
            teacher=self.arguments.teacher,
            objective=self.arguments.objective,
            args=self.args,
            train_dataset=_training_rows(self.arguments),
            eval_dataset=self._evaluation_rows(),
            callbacks=callbacks,
            quantization_config=quantization_config(self.adapter),
            peft_config=peft_config(self.adapter),
        )

    def _evaluation_rows(self) -> Any:
        from kdlib.data import load_rows

        a = self.arguments
        if a.eval_dataset_name or a.dataset_test_split:
            name, split = a.eval_dataset_name or a.dataset_name, a.dataset_test_split or "train"
            return load_rows(name, split=split, config=a.dataset_config)
        if self.args.eval_strategy != "no":
            raise ValueError("eval_strategy without evaluation rows: add --eval_dataset_name or --dataset_test_split")
        return None

    def _scoring_options(self) -> dict[str, Any]:
        return {**asdict(self.scoring), "batch_size": self.args.per_device_eval_batch_size}

    def _stopped(self, trainer: DistillationTrainer) -> int:
        number = trainer.signals_received.received
        if self.main:
            line = f"stopped at step {trainer.state.global_step}; the same command resumes"
            Console(stderr=True, soft_wrap=True, highlight=False).print(line, markup=False)
        return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def _finish(self, trainer: DistillationTrainer) -> int:
        """Evaluation loss, final/ (whole or absent), scores of final/ itself, samples and the report."""
        from kdlib.cli.finish import finish

        loss = trainer.evaluate() if trainer.eval_dataset is not None else {}
        temporary = self.directory.path / "final.tmp"
        trainer.save_final(temporary)
        if self.main:
            finish(
                self.directory,
                trainer,
                temporary=temporary,
                loss=loss,
                arguments=self.arguments,
                scoring=self._scoring_options(),
            )
            self._closing_lines()
        return 0

    def _closing_lines(self) -> None:
        from kdlib.cli.finish import summary_table

        if self.main and not self.quiet:
            out, path = Console(soft_wrap=True, highlight=False), self.directory.path
            out.print(summary_table(self.directory))
            out.print(
                f"model   {path / 'final'}\nreport  {path / 'report.html'}\nmetrics {path / 'metrics.jsonl'}",
                markup=False,
            )
            out.print(f"next    kdlib evaluate --model {path / 'final'} --tasks TASK", markup=False)


def _training_rows(arguments: RunArguments) -> Any:
    from kdlib.data import load_rows

    return load_rows(arguments.dataset_name, split=arguments.dataset_train_split, config=arguments.dataset_config)


def _plan_line(plan: dict[str, Any]) -> str:
    return (
        f"student {plan['student_parameters']:,} parameters ({plan['trainable_parameters']:,} trained), "
        f"{plan['rows']:,} rows, {_step_line(plan)}, {plan['optimizer_steps']:,} steps"
    )


def _step_line(plan: dict[str, Any]) -> str:
    if "completions_per_step" not in plan:
        return f"{plan['scored_tokens_per_epoch']:,} scored tokens an epoch"
    return f"{plan['completions_per_step']:,} rollouts of up to {plan['max_completion_length']:,} tokens a step"
