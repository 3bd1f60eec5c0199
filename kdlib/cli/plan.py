"""``kdlib plan``: what can be known before anything is trained."""

from __future__ import annotations

import difflib

from rich.console import Console

PLANS = {"draft": "the acceptance that drafts of several shapes need to make a target faster; none of them is trained"}


def run(words: list[str]) -> int:
    if words and words[0] in PLANS:
        from kdlib.cli import plan_draft

        return plan_draft.run(words[1:])
    if words and words[0] not in ("-h", "--help"):
        near = difflib.get_close_matches(words[0], PLANS, n=1)
        raise ValueError(f"no plan {words[0]!r}: " + (f"did you mean {near[0]}?" if near else f"choose {', '.join(PLANS)}"))
    console = Console(soft_wrap=True, highlight=False)
    console.print("usage: kdlib plan WHAT [options]\n", markup=False)
    for name, what in PLANS.items():
        console.print(f"  {name:<10}{what}", markup=False)
    console.print("\nkdlib plan WHAT --help shows its options. Every kdlib distill writes its own plan.json.", markup=False)
    return 0 if words else 2
