"""What a recipe's run came to: each stage with its time, what it made, and what its model gained; as a table and as a page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich.table import Table

from kdlib.cli.recipe.directory import RecipeDirectory
from kdlib.cli.recipe.facts import made, own_page
from kdlib.cli.recipe.gains import Score, scores_of
from kdlib.cli.recipe.stage import Stage
from kdlib.eval import page

NOT_YET = "not yet"
HEADER = ("stage", "command", "seconds", "made", "score", "gain", "")
CAPTION = (
    "Intervals are 95%, over problems; a gain is over the model named behind it, on the same problems. Seconds are those of "
    "the call that finished the stage."
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A stage in the report; ``score`` is the first of its model's, None where nothing has scored it."""

    stage: Stage
    seconds: float | None
    made: str
    score: Score | None

    @property
    def cells(self) -> list[str]:
        seconds = NOT_YET if self.seconds is None else f"{self.seconds:,.0f}"
        found = ["", "", ""] if self.score is None else [self.score.text, self.score.gain_text, self.score.verdict]
        return [self.stage.name, self.stage.command, seconds, self.made, *found]


def lines(directory: RecipeDirectory, stages: Sequence[Stage]) -> list[Line]:
    """A line for each stage."""
    scores = all_scores(directory, stages)
    found = []
    for stage in stages:
        held = directory.done(stage)
        score = next((score for score in scores if score.model == stage.name), None)
        facts = "" if held is None else made(stage, directory.path / stage.name)
        found.append(Line(stage=stage, seconds=None if held is None else held["seconds"], made=facts, score=score))
    return found


def all_scores(directory: RecipeDirectory, stages: Sequence[Stage]) -> list[Score]:
    """The scores of all finished evaluations, the first ones those of the first metric."""
    return [score for stage in stages if directory.done(stage) for score in scores_of(directory.path / stage.name)]


def summary_table(directory: RecipeDirectory, stages: Sequence[Stage]) -> Table:
    """The report on a terminal."""
    found = lines(directory, stages)
    table = Table(title=str(directory.path), title_justify="left", caption=_caption(found), caption_justify="left")
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold", no_wrap=index == 0)
    for line in found:
        table.add_row(*line.cells)
    return table


def write_run_report(directory: RecipeDirectory, stages: Sequence[Stage], *, recipe: str, command: str) -> Path:
    """OUTPUT/report.html."""
    found, scores = lines(directory, stages), all_scores(directory, stages)
    seconds = sum(line.seconds or 0.0 for line in found)
    rows = [[*line.cells, _link(directory, line.stage)] for line in found]
    stage_table = page.Table(header=[*HEADER, "report"], rows=rows, numeric=[2], caption=CAPTION)
    score_table = page.Table(
        header=["model", "task", "metric", "n", "score", "gain", ""],
        rows=[
            [score.model, score.task, score.metric, str(score.n), score.text, score.gain_text, score.verdict]
            for score in scores
        ],
        numeric=[3],
    )
    return page.write_page(
        directory.path / "report.html",
        title=directory.path.resolve().name,
        lead=f"{len(stages)} stages, {sum(line.seconds is not None for line in found)} of them done, {seconds:,.0f} seconds.",
        sections=[
            page.Section(title="Stages", lead=_caption(found) or "", blocks=[stage_table]),
            page.Section(title="Scores", blocks=[score_table] if scores else []),
            page.Section(title="Command", blocks=[page.Code(text=command)]),
            page.Section(title="Recipe", blocks=[page.Code(text=recipe.strip())]),
            page.Section(title="Options of the stages", blocks=list(_options(directory, stages))),
        ],
    )


def _caption(found: Sequence[Line]) -> str | None:
    """What the scores in the table are of."""
    score = next((line.score for line in found if line.score is not None), None)
    return None if score is None else f"Score: {score.metric} of {score.task}, {score.n} problems."


def _link(directory: RecipeDirectory, stage: Stage) -> str:
    target = own_page(directory.path / stage.name)
    if target is None:
        return ""
    return Markup('<a href="{}">{}</a>').format(os.path.relpath(target, directory.path), target.name)


def _options(directory: RecipeDirectory, stages: Sequence[Stage]) -> Iterator[page.Code]:
    for stage in stages:
        if directory.config(stage.name).is_file():
            yield page.Code(text=directory.config(stage.name).read_text(encoding="utf-8"), folded=stage.name)


def next_line(directory: RecipeDirectory, stages: Sequence[Stage], *, recipe: str) -> str:
    """The command that a user types next."""
    if any(directory.done(stage) is None for stage in stages):
        return f"kdlib run {recipe}"
    made_models = {stage.command: stage for stage in stages if (directory.path / stage.name / "final").is_dir()}
    if "draft" in made_models:
        draft = made_models["draft"]
        target = draft.located(directory.path).get("teacher")
        final = directory.path / draft.name / "final"
        return f"kdlib export draft --draft {final} --target {target} --output_path {directory.path / 'vllm'}"
    last = list(made_models.values())[-1:]
    return f"kdlib evaluate --model {directory.path / last[0].name / 'final'} --tasks TASK" if last else "kdlib recipes list"
