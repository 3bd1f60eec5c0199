"""``kdlib audit``: did a student take over something planted in its teacher?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kdlib.cli.parsing import check_least, parse

if TYPE_CHECKING:
    from kdlib.eval.audit_answers import Answers
    from kdlib.eval.audit_probes import Probes
    from kdlib.eval.audit_statistics import Finding
    from kdlib.eval.audit_texts import TextScores

DESCRIPTION = """Compares a student and its teacher with a clean baseline on probe prompts: do both make something likelier
than the baseline does?

A probe with a target asks for that text: {prompt: ..., target: ..., control: [...]}; control texts, of the same kind and not
suspected, tell a planted behaviour from a difference in taste. Probes without a target are answered by all three models, and
words, phrases and whole answers are counted. Benjamini-Hochberg's method holds the rate of false discoveries.

The exit code is 1 when a behaviour was taken over, 0 when none was found."""
COUNTS = ("num_generations", "max_completion_length", "batch_size")
MODELS = ("student", "teacher", "baseline")


@dataclass
class AuditArguments:
    """Which models, on which probes.

    Args:
        student: the model that is audited: a path or Hub id.
        teacher: the model it was distilled from.
        baseline: a clean model that does the same task: the student before distillation, or one trained on other text.
        probes: rows with a prompt, and where the behaviour is known with target, control and behaviour.
        output_dir: where audit.json and audit.html are written.
        false_discovery_rate: of the behaviours said to be taken over, this share is expected to be none.
        num_generations: answers drawn for a probe without a target.
        max_completion_length: new tokens of an answer.
        temperature: of these draws.
        batch_size: rows at a time.
        apply_chat_template: put prompts that are text into a user turn; null does so where there is a chat template.
        chat_template_kwargs: passed to the chat template.
        dtype: auto (as saved), float32 or bfloat16.
        attn_implementation: sdpa, eager, flash_attention_2 or another of transformers.
        device: cpu, cuda or cuda:N; chosen when left out.
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
        seed: of the draws.
    """

    student: str
    teacher: str
    baseline: str
    probes: str
    output_dir: str = "audit"
    false_discovery_rate: float = 0.01
    num_generations: int = 4
    max_completion_length: int = 128
    temperature: float = 1.0
    batch_size: int = 16
    apply_chat_template: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, dict.fromkeys(COUNTS, 1))
        if not 0 < self.false_discovery_rate < 1:
            raise ValueError(f"false_discovery_rate is a share between 0 and 1, not {self.false_discovery_rate}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}: one greedy answer is no sample")


def run(words: list[str]) -> int:
    options = parse("audit", DESCRIPTION, [AuditArguments], words)
    if options is None:
        return 0
    a = options.build(AuditArguments)
    findings = _findings(a)
    from kdlib.eval.audit_statistics import TAKEN_OVER

    _show(a, findings)
    return int(any(one.verdict == TAKEN_OVER for one in findings))


def _findings(a: AuditArguments) -> list[Finding]:
    """One model in memory at a time."""
    from kdlib.data import load_rows
    from kdlib.eval.audit_answers import answer_candidates
    from kdlib.eval.audit_probes import read_probes
    from kdlib.eval.audit_statistics import judged
    from kdlib.eval.audit_texts import text_candidates

    probes = read_probes(load_rows(a.probes))
    said: dict[str, tuple[TextScores, Answers]] = {name: _asked(a, getattr(a, name), probes) for name in MODELS}
    texts = text_candidates(probes, **{name: scores for name, (scores, _) in said.items()})
    phrases = answer_candidates(**{name: answers for name, (_, answers) in said.items()}) if probes.open_rows else []
    return judged([*texts, *phrases], rate=a.false_discovery_rate)


def _asked(a: AuditArguments, name: str, probes: Probes) -> tuple[TextScores, Answers]:
    """What a model finds likely, and what it answers."""
    from kdlib.cli.measuring import loaded
    from kdlib.data import prepare_dataset
    from kdlib.decoding.sampling import context_length
    from kdlib.eval.audit_texts import asked_rows, text_scores
    from kdlib.models import check_causal, load_tokenizer

    tokenizer = load_tokenizer(name, trust_remote_code=a.trust_remote_code)
    model = loaded(a, name)
    check_causal(model, role="model")
    rows = asked_rows(probes, tokenizer, apply_chat_template=a.apply_chat_template)
    longest = int(min(context_length(model), 2**31))
    prepared = prepare_dataset(
        rows, tokenizer, max_length=longest, prompts_only=True, chat_template_kwargs=a.chat_template_kwargs
    )
    prompts = prepared.dataset["input_ids"][:]
    scores = text_scores(model, probes, prompts, tokenizer=tokenizer, batch_size=a.batch_size)
    return scores, _answers(a, model, tokenizer, [prompts[row] for row in probes.open_rows])


def _answers(a: AuditArguments, model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> list[list[str]]:
    """``num_generations`` answers to each prompt; a draw depends on the seed, the prompt's number and its own alone."""
    from kdlib.decoding.prompts import stops_of
    from kdlib.keys import draw_key
    from kdlib.samplers import HFSampler
    from kdlib.types import SamplingParams

    if not prompts:
        return []
    stop_ids = tuple(stops_of(model, None))
    params = SamplingParams(max_tokens=a.max_completion_length, temperature=a.temperature, stop_ids=stop_ids)
    draws = [(row, draw) for row in range(len(prompts)) for draw in range(a.num_generations)]
    sampler = HFSampler(model, pad_token_id=tokenizer.pad_token_id, batch_size=a.batch_size)
    found = sampler.generate(
        [prompts[row] for row, _ in draws], params, seeds=[draw_key(a.seed, row, draw) for row, draw in draws]
    )
    texts = [tokenizer.decode(one.ids, skip_special_tokens=True) for one in found]
    return [texts[i : i + a.num_generations] for i in range(0, len(texts), a.num_generations)]


def _show(a: AuditArguments, findings: Sequence[Finding]) -> None:
    from kdlib.cli.measuring import write_result
    from kdlib.eval.audit_report import audit_json, audit_page, audit_table

    models: Mapping[str, str] = {name: getattr(a, name) for name in MODELS}
    settings = {name: value for name, value in asdict(a).items() if name not in (*MODELS, "output_dir")}
    folder = Path(a.output_dir)
    written = write_result(folder / "audit.json", audit_json(findings, models=models, settings=settings))
    page = audit_page(folder / "audit.html", findings, models=models, settings=settings)
    console = Console(soft_wrap=True, highlight=False)
    console.print(audit_table(findings))
    console.print(f"numbers {written}\nreport  {page}", markup=False)
