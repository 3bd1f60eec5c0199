"""What the training commands share: options in, a run directory with a scored, loadable final/ and a report out."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console

from kdlib.cli.arguments import AdapterArguments, LaunchArguments, RunArguments
from kdlib.cli.launch import relaunch
from kdlib.cli.parsing import Options, parse
from kdlib.cli.planning.text import short
from kdlib.cli.run_directory import RunDirectory, Stage
from kdlib.cli.scoring import ScoringArguments, check_tasks

if TYPE_CHECKING:
    from kdlib.eval.page import Section
    from kdlib.trainers import DistillationConfig, DistillationTrainer


class Run:
    """One call of a training command: its options, its directory, and what happens in order.

    Subclasses name the command and make the trainer.
    """

    command: ClassVar[str]
    description: ClassVar[str]
    arguments_class: ClassVar[type[RunArguments]] = RunArguments

    @classmethod
    def classes(cls) -> list[type]:
        """The dataclasses whose fields are the command's options."""
        return [cls.arguments_class, AdapterArguments, ScoringArguments, LaunchArguments, cls.config_class()]

    @classmethod
    def config_class(cls) -> type[DistillationConfig]:
        """The trainer's configuration, whose fields are options too."""
        from kdlib.trainers.config import DistillationConfig

        return DistillationConfig

    @classmethod
    def run(cls, words: list[str], *, quiet: bool = False) -> int:
        """The exit code; ``quiet`` leaves out the lines about the run, for a command that makes several."""
        options = parse(cls.command, cls.description, cls.classes(), words)
        if options is None:
            return 0
        if options.build(cls.arguments_class).preview:
            return cls(options, words=words, quiet=quiet).preview()
        if options.config["output_dir"] is None:
            raise ValueError("output_dir missing: add --output_dir DIR")
        directory = RunDirectory(options.config["output_dir"])
        stage = directory.stage(options.config, overwrite=options.build(cls.arguments_class).overwrite)
        cls.check(options)
        if stage is not Stage.DONE:
            from kdlib.cli.hub.run import check_push

            check_push(options.config)
        relaunch(cls.command, words, options.build(LaunchArguments))
        return cls(options, words=words, quiet=quiet).start(stage)

    @classmethod
    def check(cls, options: Options) -> None:
        """ValueError for options that cannot work together, before other processes are started."""

    def __init__(self, options: Options, *, words: list[str], quiet: bool) -> None:
        from kdlib.cli.hub.run import taken_target

        self.options, self.words = options, words
        self.arguments, self.scoring = options.build(self.arguments_class), options.build(ScoringArguments)
        self.adapter, self.args = options.build(AdapterArguments), self.build_args()
        self.directory = RunDirectory(str(self.args.output_dir))
        self.hub = taken_target(self.args)
        self.main, self.quiet = self.args.process_index == 0, quiet
        self.log = Console(stderr=True, soft_wrap=True, highlight=False, quiet=quiet or not self.main)

    def build_args(self) -> DistillationConfig:
        """The trainer's configuration, made of the options."""
        return self.options.build(self.config_class())

    def preview(self) -> int:
        """Rows as they would be trained on: needs the student's tokenizer, no model."""
        from kdlib.data import preview_rows
        from kdlib.trainers import setup

        tokenizer = setup.student_tokenizer(self.tokenizer_source(), self.args)
        rows = setup.prepared(self.training_rows(), tokenizer, self.args, packing=self.args.packing)
        assert rows is not None
        Console(soft_wrap=True, highlight=False).print(preview_rows(rows.dataset, tokenizer, count=self.arguments.preview))
        return 0

    def tokenizer_source(self) -> str:
        """The path or Hub id beside which the student's tokenizer lies."""
        return str(self.arguments.model)

    def start(self, stage: Stage) -> int:
        """The exit code; nothing is written before all that can be checked has been."""
        from kdlib.cli.hub.run import push_each_save

        if stage is Stage.DONE:
            self.log.print(
                f"{self.directory.path} holds this run, finished; --overwrite true starts it anew",
                markup=False,
            )
            self._closing_lines()
            return 0
        trainer, plan = self._prepared()
        push_each_save(trainer, self.arguments, self.hub, log=self.log)
        trainer.accelerator.wait_for_everyone()  # all ranks have looked at the directory before it changes
        if self.main:
            self.directory.begin(self.options.config, words=[self.command, *self.words], plan=plan, stage=stage)
        for line in short(plan):
            self.log.print(line, markup=False)
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
        from kdlib.cli.planning.training import fitting

        check_tasks(self.scoring)
        try:
            trainer = self._trainer()
            return trainer, fitting(trainer)
        except BaseException:
            self.directory.remove_if_empty()
            raise

    def make_trainer(self, **given: Any) -> DistillationTrainer:
        """The trainer with what every command gives it: ``given``."""
        raise NotImplementedError

    def _trainer(self) -> DistillationTrainer:
        from kdlib.cli.adapters import peft_config, quantization_config
        from kdlib.trainers.golden import golden_callbacks

        rows = self._evaluation_rows()
        callbacks = golden_callbacks(self.args, self.tokenizer_source(), evaluation_rows=rows)
        if self.scoring.tasks:
            from kdlib.eval import EvaluateCallback

            callbacks.append(EvaluateCallback(**self._scoring_options()))
        return self.make_trainer(
            objective=self.arguments.objective,
            args=self.args,
            train_dataset=self.training_rows(),
            eval_dataset=rows,
            callbacks=callbacks,
            quantization_config=quantization_config(self.adapter),
            peft_config=peft_config(self.adapter),
        )

    def training_rows(self) -> Any:
        """The rows that ``dataset_name`` names."""
        return self.read_rows(self.arguments.dataset_name, split=self.arguments.dataset_train_split)

    def _evaluation_rows(self) -> Any:
        a = self.arguments
        if a.eval_dataset_name or a.dataset_test_split:
            return self.read_rows(a.eval_dataset_name or a.dataset_name, split=a.dataset_test_split or "train")
        if self.args.eval_strategy != "no":
            raise ValueError("eval_strategy without evaluation rows: add --eval_dataset_name or --dataset_test_split")
        return None

    def read_rows(self, name: str, *, split: str) -> Any:
        """The rows that ``name`` stands for; trajectories were made with the student's tokenizer."""
        from kdlib.data import load_rows
        from kdlib.data.trajectories import is_trajectories
        from kdlib.trainers import setup

        tokenizer = setup.student_tokenizer(self.tokenizer_source(), self.args) if is_trajectories(name) else None
        return load_rows(name, split=split, config=self.arguments.dataset_config, tokenizer=tokenizer)

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
        from kdlib.cli.hub.run import push_final

        loss = trainer.evaluate() if trainer.eval_dataset is not None else {}
        temporary = self.directory.path / "final.tmp"
        trainer.save_final(temporary)
        if self.main:
            sections = self.measure(trainer)
            finish(
                self.directory,
                trainer,
                temporary=temporary,
                loss=loss,
                arguments=self.arguments,
                scoring=self._scoring_options(),
                sections=sections,
            )
            if self.hub is not None:
                url = push_final(self.directory, self.hub, step=trainer.state.global_step)
                self.log.print(f"pushed to {url}", markup=False)
            self._closing_lines()
        return 0

    def measure(self, trainer: DistillationTrainer) -> Sequence[Section]:
        """What a command measures of its own on the model in final.tmp, as sections of the report."""
        return ()

    def _closing_lines(self) -> None:
        from kdlib.cli.finish import summary_table

        if self.main and not self.quiet:
            out, path = Console(soft_wrap=True, highlight=False), self.directory.path
            out.print(summary_table(self.directory))
            out.print(
                f"model   {path / 'final'}\nreport  {path / 'report.html'}\nmetrics {path / 'metrics.jsonl'}",
                markup=False,
            )
            out.print(f"next    {self.next_command()}", markup=False)

    def next_command(self) -> str:
        """What a user types next."""
        return f"kdlib evaluate --model {self.directory.final} --tasks TASK"
