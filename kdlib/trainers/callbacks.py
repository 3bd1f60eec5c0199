"""What happens around steps: metrics on disk, complete checkpoints, and stopping in good order on a signal."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdlib.files import write_whole

STATE_FILE = "kdlib_state.json"


def last_checkpoint(run: str | Path) -> Path | None:
    """The newest checkpoint whose writing was finished, or None: kdlib_state.json is written last."""
    steps = {int(p.name.split("-")[1]): p for p in Path(run).glob("checkpoint-*") if (p / STATE_FILE).is_file()}
    return steps[max(steps)] if steps else None


class MetricsWriter(TrainerCallback):
    """Appends each log line to metrics.jsonl; on resume lines after the checkpoint's step are dropped, as they happen again."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        path = Path(args.output_dir) / "metrics.jsonl"
        if not state.is_world_process_zero or not path.exists():
            return
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step and state.global_step > 0]
        write_whole(path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return  # the Trainer's last line sums up this call, not the run
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in logs.items()}
        path = Path(args.output_dir)
        path.mkdir(parents=True, exist_ok=True)
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": state.global_step, **finite}) + "\n")


class StopOnSignal(TrainerCallback):
    """SIGTERM or Ctrl-C: finish the step, save a checkpoint, stop. A second one, a second or more later, stops at once.

    received: the signal this process got. agreed: any rank got one; set by the trainer when there are several, between steps.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed = False
        self._when = 0.0
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.received, self.agreed = None, False
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agreed or (self.received is not None and args.world_size == 1):
            self.received = self.received or signal.SIGTERM  # on ranks that stop because another was told to
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Gives the signals back to whoever had them; also after training that ended with an error."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self._when = number, time.monotonic()
        elif (
            time.monotonic() - self._when > 1.0
        ):  # launchers pass on a Ctrl-C that the terminal has sent to all processes already
            raise KeyboardInterrupt


class StepHooks(TrainerCallback):
    """Calls the trainer at the points that TrainerCallback alone can see."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.after_step()


class Progress(TrainerCallback):
    """A progress bar over optimizer steps with loss, KL and tokens/s beside it."""

    SHOWN: ClassVar[dict[str, str]] = {"loss": "loss", "kl_forward": "kl", "eval_loss": "eval", "tokens_per_second": "tok/s"}

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.values: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if self.bar is not None:
            self.values |= {short: f"{logs[name]:.4g}" for name, short in self.SHOWN.items() if name in logs}
            self.bar.set_postfix(self.values, refresh=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
