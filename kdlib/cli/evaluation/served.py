"""``kdlib evaluate acceptance --server URL``: acceptance and speed of a served model, whatever its method of speculation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from kdlib.cli.parsing import parse

DESCRIPTION = """Measures a vLLM server from outside: acceptance by its own counters (/metrics), time per output token and
tokens per second by the clock, at several concurrencies; with --baseline_server also where speculation stops paying.

The server should have no other requests meanwhile. A server without speculation, for --baseline_server, is the same vllm serve
line without --speculative-config."""
NAME = "served_acceptance"


@dataclass
class ServedArguments:
    """Which servers are asked what.

    Args:
        server: URL of a vLLM server, such as http://127.0.0.1:8000.
        prompts: rows with a prompt, messages, a question or turns (the first is used).
        baseline_server: URL of the same model without speculation, or with another method.
        concurrency: requests at a time; all prompts are asked at each.
        max_tokens: of an answer.
        temperature: 0 is greedy.
        top_p: of sampling.
        limit: use only the first rows.
        ignore_eos: let every answer have max_tokens tokens.
        apply_chat_template: let the server put prompts that are text into a user turn; null does so where it has a template.
        timeout: seconds that an answer may pause.
        output_path: directory for served_acceptance.json and served_acceptance.html.
    """

    server: str
    prompts: str
    baseline_server: str | None = None
    concurrency: list[int] = field(default_factory=lambda: [1, 8, 32])
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    limit: int | None = None
    ignore_eos: bool = False
    apply_chat_template: bool | None = None
    timeout: float = 600.0
    output_path: str | None = None


def run(words: list[str]) -> int:
    options = parse("evaluate acceptance", DESCRIPTION, [ServedArguments], words)
    if options is None:
        return 0
    from kdlib.eval.served import ServedSettings, measure_served
    from kdlib.eval.served_prompts import served_prompts
    from kdlib.eval.served_report import COUNTED, remarks, served_table, write_served_report
    from kdlib.files import write_whole

    a = options.build(ServedArguments)
    settings = ServedSettings(
        concurrency=a.concurrency,
        max_tokens=a.max_tokens,
        temperature=a.temperature,
        top_p=a.top_p,
        ignore_eos=a.ignore_eos,
        apply_chat_template=a.apply_chat_template,
        timeout=a.timeout,
    )
    prompts = served_prompts(a.prompts, limit=a.limit)
    found = measure_served(a.server, prompts, settings=settings, baseline_server=a.baseline_server)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{found['model']} at {found['server']}: {len(prompts)} prompts", markup=False)
    console.print(served_table(found))
    for line in (*remarks(found), *COUNTED):
        console.print(line, markup=False)
    if a.output_path:
        directory = Path(a.output_path)
        data = write_whole(directory / f"{NAME}.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        page = write_served_report(directory / f"{NAME}.html", found)
        console.print(f"written {data} and {page}", markup=False)
    return 0
