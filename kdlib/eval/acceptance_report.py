"""Acceptance as a table in the terminal and as one HTML page; several drafts of one target side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table as RichTable

from kdlib.eval import page
from kdlib.eval.acceptance_change import changes
from kdlib.eval.acceptance_empirical import Decoded
from kdlib.eval.acceptance_figures import Results, decoded_figures, expected_figures
from kdlib.eval.acceptance_measurement import AcceptanceResult
from kdlib.eval.acceptance_statistics import Estimate
from kdlib.eval.acceptance_timing import Speed, pays_line
from kdlib.eval.report_parts import closing_sections, interval_text, notes, terminal_table

EXPECTED = ("draft", "draft_sample_method", "acceptance_rate", "mean over prompts", "tokens")
HEADER = (
    "draft",
    "draft_sample_method",
    "num_speculative_tokens",
    "acceptance_length",
    "i.i.d.",
    "acceptance_rate",
    "per position",
    "speed-up",
    "predicted",
)
COUNTED = (
    "acceptance_length: tokens a verify round gives, 1 + accepted / rounds: the bonus token is counted, the prefill's is not. "
    "Rounds are counted whole, also the last one of a response that a stop token or max_new_tokens cuts.",
    "acceptance_rate of decoding: accepted / drafted, so a token after a rejected one counts as not accepted. Per position: "
    "share of all rounds that accept this position and all before it (unconditional).",
    "Expected acceptance_rate: probability that a draft of the next token is kept, mean over all tokens of responses sampled "
    "from the target: sum of min(p, q) for probabilistic drafts, p(argmax q) for greedy ones, under the request's temperature, "
    "top_k and top_p. It is the rate at the first draft position, with every prefix weighted alike.",
    "vLLM drafts greedily unless speculative_config has draft_sample_method: probabilistic.",
    "i.i.d.: (1 - a^(gamma+1)) / (1 - a) of the expected acceptance_rate a. Positions are not independent: a reference.",
    "Speed-up: tokens per second with and without the draft, all tokens over all time, one prompt at a time, prefill included. "
    "Predicted: acceptance_length / (gamma c + v) with c and v measured, which leaves prefill and bookkeeping out.",
    "Intervals: 95%, percentile bootstrap over prompts.",
)


def expected_rows(results: Results) -> list[list[str]]:
    """The cells of EXPECTED for every way of drafting."""
    return [
        [name, way, interval_text(e.acceptance_rate), interval_text(e.mean_over_prompts), f"{e.tokens:,}"]
        for name, result in results.items()
        for way, e in result.expected.items()
    ]


def decoded_rows(results: Results) -> list[list[str]]:
    """The cells of HEADER for every run of speculative decoding."""
    return [
        _cells(name, found, speed)
        for name, result in results.items()
        for found, speed in zip(result.empirical, _speeds(result), strict=True)
    ]


def _speeds(result: AcceptanceResult) -> Sequence[Speed | None]:
    return [None] * len(result.empirical) if result.timing is None else result.timing.speeds


def _cells(name: str, found: Decoded, speed: Speed | None) -> list[str]:
    measured = "" if speed is None else f"{speed.measured_speedup:.2f}x"
    predicted = "" if speed is None or speed.predicted_speedup is None else f"{speed.predicted_speedup:.2f}x"
    return [
        name,
        found.draft_sample_method,
        str(found.num_speculative_tokens),
        interval_text(found.acceptance_length),
        f"{found.iid_acceptance_length:.3f}",
        interval_text(found.acceptance_rate),
        " ".join(f"{rate:.2f}" for rate in found.acceptance_rate_per_position),
        measured,
        predicted,
    ]


def tables(results: Results) -> list[RichTable]:
    """Expected acceptance, then speculative decoding, for the terminal."""
    expected = terminal_table(EXPECTED, expected_rows(results), title="expected acceptance", left=2)
    decoded = terminal_table(
        HEADER,
        decoded_rows(results),
        title="speculative decoding",
        left=2,
        caption="acceptance_length with the bonus token; per position unconditional; 95% intervals over prompts",
    )
    return [expected, decoded]


def lines(results: Results) -> list[str]:
    """What the numbers mean: change between drafts, which gamma pays, losslessness, dropped positions."""
    said: list[str] = []
    for name, result in results.items():
        prefix = f"{name}: " if len(results) > 1 else ""
        if result.timing is not None:
            said += [prefix + pays_line(result.timing, method=way) for way in result.timing.best]
            rate = result.timing.target_tokens_per_second
            said.append(
                f"{prefix}target alone: {rate:,.1f} tokens per second over {result.timing.prompts} prompts, one at a time"
            )
        said += [prefix + line for line in check_lines(result)]
        dropped = max(found.dropped for found in result.expected.values())
        if dropped:
            said.append(f"{prefix}{dropped:,} positions without finite logits are not counted")
    return said + [change.line for change in changes(results)]


def check_lines(result: AcceptanceResult) -> list[str]:
    return [
        f"num_speculative_tokens {found.num_speculative_tokens}, {found.draft_sample_method}: {check.line}"
        for found, check in zip(result.empirical, result.checks, strict=False)
    ]


def acceptance_sections(results: Results) -> list[page.Section]:
    """Plots and tables of what was expected and counted, what they mean, and what they count."""
    expected = page.Table(
        header=EXPECTED,
        rows=expected_rows(results),
        numeric=range(2, 5),
        caption="Of the next token, on responses sampled from the target.",
    )
    decoded = page.Table(header=HEADER, rows=decoded_rows(results), numeric=range(2, len(HEADER)))
    return [
        page.Section(title="Expected acceptance", blocks=[*expected_figures(results), expected]),
        page.Section(title="Speculative decoding", blocks=[*decoded_figures(results), decoded]),
        notes("Findings", lines(results)),
        notes("What is counted", COUNTED),
    ]


def write_acceptance_page(path: str | os.PathLike[str], results: Results) -> Path:
    """The page with all drafts, the last one as the subject; returns its path."""
    name, result = list(results.items())[-1]
    settings = {**result.settings, "draft": ", ".join(results), "prompts": len(result.prompts)}
    return page.write_page(
        path,
        title=f"Acceptance of {name}",
        lead=f"What {result.settings['target']} keeps of its drafts on {len(result.prompts):,} prompts.",
        headline=page.Numbers(items=_headline(result)),
        sections=[*acceptance_sections(results), *closing_sections(settings, result.prompts)],
    )


def _headline(result: AcceptanceResult) -> list[tuple[str, str, str]]:
    items = [
        ("Expected acceptance_rate", f"{found.acceptance_rate.value:.3f}", f"{way}{_bounds(found.acceptance_rate)}")
        for way, found in result.expected.items()
    ]
    best = max(result.empirical, key=lambda found: found.acceptance_length.value, default=None)
    if best is not None:
        remark = f"{best.num_speculative_tokens} {best.draft_sample_method} drafts{_bounds(best.acceptance_length)}"
        items.append(("acceptance_length", f"{best.acceptance_length.value:.2f}", remark))
    if result.timing is not None and result.timing.speeds:
        fastest = max(result.timing.speeds, key=lambda speed: speed.measured_speedup)
        remark = f"{fastest.num_speculative_tokens} {fastest.draft_sample_method} drafts, one prompt at a time"
        items.append(("Measured speed-up", f"{fastest.measured_speedup:.2f}x", remark))
    if result.checks:
        items.append(("Output is the target's", "yes" if result.passed else "NO", f"{len(result.checks)} checks"))
    return items


def _bounds(estimate: Estimate) -> str:
    return "" if estimate.low is None else f", 95%: {estimate.low:.3f} to {estimate.high:.3f}"
