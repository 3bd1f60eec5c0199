"""``kdlib plan``: what can be known before anything is trained."""

from __future__ import annotations

import difflib

from rich.console import Console

TRAINING = ("distill", "jacobi", "diffusion")
PLANS = {
    "FILE.yaml": "the same of a recipe: of the command whose options it holds, or of each of its stages that trains",
    **{name: f"memory, disk, steps and time of kdlib {name}, with its own options" for name in TRAINING},
    "draft": "the acceptance that drafts of several shapes need to make a target faster; none of them is trained",
}


def run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        _usage()
        return 0 if words else 2
    if words[0].startswith("-"):
        words = ["distill", *words]
    if words[0] == "draft":
        from kdlib.cli.planning import draft

        return draft.run(words[1:])
    if words[0] in TRAINING:
        from kdlib.cli.planning import command

        return command.run(words[0], words[1:])
    if words[0].endswith((".yaml", ".yml")):
        from kdlib.cli.planning import recipe

        return recipe.run(words[0], words[1:])
    near = difflib.get_close_matches(words[0], PLANS, n=1)
    raise ValueError(f"no plan {words[0]!r}: " + (f"did you mean {near[0]}?" if near else f"choose {', '.join(PLANS)}"))


def _usage() -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print("usage: kdlib plan [WHAT] [options]\n", markup=False)
    for name, what in PLANS.items():
        console.print(f"  {name:<11}{what}", markup=False)
    console.print("\nWithout WHAT: distill. kdlib plan WHAT --help shows its options.", markup=False)
