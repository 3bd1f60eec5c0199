"""Reports are self-contained, show the numbers, survive what is missing and escape what they show."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdlib.eval import Section, comparison_report, write_report
from kdlib.eval.page import Notes, Table
from kdlib.eval.report import read_metrics, series

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails when an element is not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def scores(value: float, stderr: float, *, n: int = 200) -> dict:
    return {
        "results": {"sums": {"alias": "sums", "exact_match,none": value, "exact_match_stderr,none": stderr}},
        "n-samples": {"sums": {"original": n, "effective": n}},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "my-run"
    (run / "eval").mkdir(parents=True)
    rows = [
        {
            "step": step,
            "loss": 3.0 - step / 100,
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "kl_forward": 0.5,
            "kl_reverse": 0.6,
        }
        | {
            "entropy_teacher": 1.1,
            "entropy_student": 1.2,
            "top1_agreement": 0.7,
            "scored_tokens": 80.0 * step,
        }
        | {"tokens_per_second": 1234.0 + step, "time/teacher": 0.2, "time/update": 0.5, "time/data": 0.1}
        for step in range(10, 60, 10)
    ] + [{"step": 50, "eval_loss": 2.777}, {"step": 50, "eval_sums/exact_match": 0.6}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "eval" / "final.json").write_text(json.dumps(scores(0.625, 0.034)))
    (run / "eval" / "base.json").write_text(json.dumps(scores(0.25, 0.03)))
    (run / "config.yaml").write_text("model: a/b\nobjective: {ForwardKL: {}}\n")
    (run / "environment.json").write_text(json.dumps({"torch": "2.13.0", "devices": ["NVIDIA <H200>"]}))
    (run / "command.txt").write_text("kdlib distill --model a/b & echo '<done>'\n")
    return run


def assert_self_contained(page: Page) -> None:
    """Nothing is loaded: no scripts, links or images, and references only within the page."""
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on") and name != "src"
        assert name not in ("href", "xlink:href") or value.startswith("#")
        assert not re.search(r"https?://|url\((?!#)", value)


def test_a_run_report_shows_everything_and_loads_nothing(run: Path) -> None:
    path = write_report(run, extra_sections=[Section(title="Preview", blocks=[Notes(items=["one < two"])])])
    assert path == run / "report.html"
    page = Page(path)
    assert_self_contained(page)
    assert "@import" not in path.read_text() and not re.search(r"url\((?!#)", path.read_text())
    for shown in (
        "my-run",
        "2.500",
        "2.777",
        "1,264",
        "4,000",
        "Scores while training",
        "0.625 ± 0.067",
        "0.250 ± 0.059",
        "0.558 to 0.692",
        "n = 200",
    ):
        assert shown in page.text, shown
    for shown in ("objective: {ForwardKL: {}}", "& echo '<done>'", "NVIDIA <H200>", "2.13.0", "one < two"):
        assert shown in page.text, shown
    for title in (
        "Loss",
        "Divergence from the teacher",
        "Entropy",
        "Top-1 agreement",
        "Throughput",
        "Where the time goes",
    ):
        assert title in page.text, title
    assert "nats per scored token" in page.text and "tokens per second" in page.text
    assert page.tags.count("svg") == 10  # seven curves, scores while training, the time split, the final scores
    assert [p.name for p in run.iterdir() if p.suffix == ".partial"] == []


def test_plots_follow_the_colour_scheme(run: Path) -> None:
    html = write_report(run).read_text()
    assert "prefers-color-scheme: dark" in html
    inside = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--series-1)" in inside and not re.search(r"(fill|stroke): #", inside)


@pytest.mark.parametrize("kept", [(), ("metrics.jsonl",), ("eval",), ("config.yaml", "command.txt"), ("environment.json",)])
def test_what_is_missing_is_not_shown(run: Path, kept: tuple[str, ...]) -> None:
    for path in [*(run / "eval").iterdir(), *run.iterdir()]:
        top = path.parent.name if path.parent != run else path.name
        if top not in kept and path.is_file():
            path.unlink()
    page = Page(write_report(run))
    headings = {"Training": "metrics.jsonl", "Evaluation": "eval", "Configuration": "config.yaml"}
    headings |= {"Command": "command.txt", "Environment": "environment.json"}
    for heading, source in headings.items():
        assert (heading in page.text) == (source in kept), heading


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_no_run_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run directory"):
        write_report(tmp_path / "none")


def test_metrics_of_killed_and_resumed_runs(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": float("nan")},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 4, "lo')
    assert series(read_metrics(path), "loss") == ([1, 2], [3.0, 2.0])
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_metrics(path)


EVIL = '<script>alert("x")</script> & $100 and $5'


def test_comparison_shows_models_curves_and_answers_escaped(tmp_path: Path) -> None:
    path = comparison_report(
        tmp_path / "deep" / "demo.html",
        title=EVIL,
        lead="Same tokens.",
        models=[
            {"name": "teacher", "results": scores(1.0, 0.0), "details": {"parameters": 921_344}},
            {"name": EVIL, "results": scores(0.4, 0.03), "details": {"bits per byte": 0.41237}},
        ],
        curves={"eval loss (nats per token)": {"teacher": ([1, 2], [3.0, 2.0]), EVIL: ([1, 2], [4.0, 3.0])}},
        samples=[{"prompt": EVIL, "reference": "23", "answers": {"teacher": ("is 23", True), EVIL: (EVIL, False)}}],
        notes=["first", EVIL],
    )
    page = Page(path)
    assert_self_contained(page)
    assert page.text.count(EVIL) >= 8  # title twice, table, bar, legend, sample, its model and answer, notes
    for shown in (
        "1.000 [0.981, 1.000]",
        "0.400 ± 0.059",
        "921,344",
        "0.4124",
        "✓ right",
        "✗ wrong",
        "Eval loss",
    ):
        assert shown in page.text, shown


def test_numbers_are_set_flush_right(tmp_path: Path) -> None:
    models = [{"name": "one", "results": scores(0.5, 0.03), "details": {"parameters": 5}}]
    html = comparison_report(tmp_path / "page.html", title="t", lead="", models=models).read_text()
    assert re.search(r'<td>one</td>\s*<td class="number">5</td>\s*<td class="number">0.500 ± 0.059</td>', html)
    assert Table(header=["a"], rows=[]).numeric == ()
