"""The options of problems that ``kdlib evaluate`` lets a model answer several times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdlib.cli.parsing import check_least


@dataclass
class SampledArguments:
    """Problems with answers: several completions each, judged.

    Args:
        problems: rows with a prompt (text or messages), messages or a question, and an answer; files, a glob or a Hub id.
        verify: what judges: exact_number, math-verify, or file.py:function of (completion, row).
        n: completions drawn for each problem; their mean is avg@n.
        pass_at: also the chance that one of k completions is right, for each k of this list, none above n.
        max_completion_length: new tokens of a completion; one that is cut there counts as truncated.
        temperature: divides the logits; the model's generation_config.json when left out; 0 is greedy, for n 1.
        top_p: draw among the likeliest tokens that together have this probability; left out, as temperature.
        top_k: draw among this many likeliest tokens; left out, as temperature.
        thinking_end: what is before the last one of these is not judged; auto takes the tokenizer's own, null judges all.
        answer_column: where a row has its reference answer.
        problems_config: configuration name of a Hub dataset of problems.
        problems_split: split of the problems.
        problems_as_chat: put problems that are text into a user turn; null does so where there is a chat template.
        chat_template_kwargs: passed to the chat template of problems, for example {enable_thinking: true}.
        generation_batch_size: completions asked for at once; what a killed run does again, at most.
        seed: of the draws; a draw depends on it, the problem and the number of the completion alone.
        resamples: of the bootstrap over problems.
    """

    problems: str | None = None
    verify: str | None = None
    n: int = 1
    pass_at: list[int] | None = None
    max_completion_length: int = 1024
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    thinking_end: str | None = "auto"
    answer_column: str = "answer"
    problems_config: str | None = None
    problems_split: str = "train"
    problems_as_chat: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    generation_batch_size: int = 256
    seed: int = 0
    resamples: int = 2000

    def __post_init__(self) -> None:
        check_least(self, dict.fromkeys(("n", "max_completion_length", "generation_batch_size", "resamples"), 1))
        if self.problems and not self.verify:
            raise ValueError("problems are judged: add --verify exact_number, math-verify, or file.py:function of your own")
        if self.verify and not self.problems:
            raise ValueError("verify judges problems: add --problems FILE")
        if wrong := [k for k in self.pass_at or () if not 1 <= k <= self.n]:
            raise ValueError(f"pass_at {wrong[0]} needs {wrong[0]} completions of each problem, and n is {self.n}: raise --n")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"temperature 0 gives the same answer {self.n} times: leave temperature out, or add --n 1")
