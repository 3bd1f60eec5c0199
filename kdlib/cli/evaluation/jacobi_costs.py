"""What training for Jacobi decoding cost: accuracy by both ways of decoding, and bits per byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kdlib.cli.scoring import ScoringArguments, check_tasks

if TYPE_CHECKING:
    from kdlib.eval.bpb import BitsPerByte
    from kdlib.eval.page import Section


@dataclass
class CostArguments:
    """What training may have cost: accuracy by lm-eval and bits per byte.

    Args:
        tasks: lm-eval tasks, names or YAML files, each answered by Jacobi decoding and by greedy decoding.
        num_fewshot: examples in the prompt of a task.
        task_limit: score only this many problems per task, or below 1 this share of them.
        gen_kwargs: generation options of tasks, {max_gen_toks: 256} or max_gen_toks=256; nothing that samples.
        include_path: directory with YAML tasks of your own.
        dataset_name: rows for bits per byte, as for kdlib distill.
        dataset_test_split: split of these rows.
        max_length: rows longer than this keep their first max_length tokens.
    """

    tasks: list[str] | None = None
    num_fewshot: int | None = None
    task_limit: int | float | None = None
    gen_kwargs: dict[str, Any] | str | None = None
    include_path: str | None = None
    dataset_name: str | None = None
    dataset_test_split: str = "train"
    max_length: int = 1024


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one model: lm-eval's results by both ways of decoding, None without tasks; ``text``: None without rows."""

    greedy: dict[str, Any] | None
    jacobi: dict[str, Any] | None
    text: BitsPerByte | None


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """The tasks and rows that every model is scored on."""

    scoring: ScoringArguments
    rows: Any
    max_length: int
    batch_size: int
    decoder: Mapping[str, Any]

    @staticmethod
    def of(a: CostArguments, *, apply_chat_template: bool, batch_size: int, decoder: Mapping[str, Any]) -> Scorer:
        """ValueError when lm-eval is missing or does not know a task, and what ``load_rows`` refuses."""
        from kdlib.data import load_rows

        scoring = ScoringArguments(
            tasks=a.tasks,
            num_fewshot=a.num_fewshot,
            limit=a.task_limit,
            apply_chat_template=apply_chat_template,
            gen_kwargs=a.gen_kwargs,
            include_path=a.include_path,
        )
        check_tasks(scoring)
        rows = load_rows(a.dataset_name, split=a.dataset_test_split) if a.dataset_name else None
        return Scorer(scoring=scoring, rows=rows, max_length=a.max_length, batch_size=batch_size, decoder=decoder)

    def costs(self, model: Any, tokenizer: Any) -> Costs:
        from kdlib.eval import bits_per_byte

        size, asked = self.batch_size, self.rows is not None
        return Costs(
            greedy=self._answered(model, tokenizer, decoder=None) if self.scoring.tasks else None,
            jacobi=self._answered(model, tokenizer, decoder=self.decoder) if self.scoring.tasks else None,
            text=bits_per_byte(model, self.rows, tokenizer=tokenizer, batch_size=size, max_length=self.max_length)
            if asked
            else None,
        )

    def _answered(self, model: Any, tokenizer: Any, *, decoder: Mapping[str, Any] | None) -> dict[str, Any]:
        from kdlib.eval import evaluate

        scoring = asdict(self.scoring)
        return evaluate(model, tokenizer=tokenizer, batch_size=self.batch_size, decoder=decoder, **scoring)


def score_columns(found: Mapping[str, Costs]) -> dict[str, dict[str, Any]]:
    """{model and way of decoding: lm-eval's results}; bits per byte, which do not depend on the way, under the model's name."""
    columns: dict[str, dict[str, Any]] = {}
    for name, costs in found.items():
        if costs.greedy is not None and costs.jacobi is not None:
            columns |= {f"{name}, greedy": costs.greedy, f"{name}, Jacobi": costs.jacobi}
        if costs.text is not None:
            columns[name] = costs.text.as_results()
    return columns


def cost_lines(found: Mapping[str, Costs]) -> list[str]:
    """Tokens per forward of the tasks, and the change in bits per byte."""
    said = []
    for name, costs in found.items():
        if costs.jacobi is not None and (ratio := costs.jacobi["tokens_per_forward"]) is not None:
            said.append(f"{name}: {ratio:.3f} tokens per forward on the tasks, 1 by greedy decoding")
    texts = [costs.text.bits_per_byte for costs in found.values() if costs.text is not None]
    if len(texts) == 2:
        said.append(f"bits per byte: {texts[1] / texts[0] - 1.0:+.2%} ({texts[0]:.4f} before, {texts[1]:.4f} after)")
    return said


def costs_json(costs: Costs) -> dict[str, Any]:
    """``tasks``: {greedy, jacobi}: summary rows of each and their tokens per forward; ``bits_per_byte``."""
    from kdlib.eval import summary_rows

    content: dict[str, Any] = {}
    if costs.greedy is not None and costs.jacobi is not None:
        content["tasks"] = {
            "greedy": {"tokens_per_forward": 1.0, "scores": summary_rows(costs.greedy)},
            "jacobi": {"tokens_per_forward": costs.jacobi["tokens_per_forward"], "scores": summary_rows(costs.jacobi)},
        }
    if costs.text is not None:
        content["bits_per_byte"] = asdict(costs.text)
    return content


def cost_sections(found: Mapping[str, Costs]) -> list[Section]:
    from kdlib.eval import page
    from kdlib.eval.scores import score_blocks

    lines = cost_lines(found)
    notes = [page.Notes(items=lines)] if lines else []
    return [page.Section(title="Accuracy and bits per byte", blocks=[*score_blocks(score_columns(found)), *notes])]
