"""Caches and traces as data sets of the Hub: what they are, their cards, and which files go."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from kdlib.cli.card import card_table, card_text, license_section, version_line
from kdlib.cli.hub.license import check_license, license_of
from kdlib.cli.hub.target import Target
from kdlib.data.cache.index import INDEX_FILE as CACHE_FILE
from kdlib.data.cache.index import CacheIndex
from kdlib.data.shards import INDEX_FILE
from kdlib.data.traces import TraceIndex
from kdlib.files import write_whole

IGNORED = ("*.partial*", "metrics.jsonl", "report.html", ".*")
TAGS = ("kdlib", "distillation")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What a card says of a directory: ``facts`` as a table, ``use`` as a paragraph, ``files`` by configuration."""

    what: str
    teacher: str
    facts: Mapping[str, str]
    use: str
    files: Mapping[str, str] = field(default_factory=dict)


def data_set(directory: Path) -> DataSet | None:
    """The finished cache or traces in a directory, None where there is neither; ValueError for unfinished ones."""
    if (directory / CACHE_FILE).is_file():
        return _cache(directory)
    if (directory / INDEX_FILE).is_file():
        index = TraceIndex.load(directory)
        index.check(directory)
        return _traces(directory, index)
    return None


def push_data(directory: Path, target: Target, *, license: str | None) -> str:
    """Writes the card and sends the directory; ValueError where the teacher's licence is not known and none is given."""
    found = data_set(directory)
    if found is None:
        raise ValueError(f"{directory} holds no finished run, cache or traces: give the output_dir of a kdlib command")
    licenses = {found.teacher: license_of(found.teacher)}
    name = check_license(license, licenses)
    data = DatasetCardData(
        license=name,
        tags=list(TAGS),
        configs=[{"config_name": key, "data_files": files} for key, files in found.files.items()] or None,
    )
    parts = [
        f"# {directory.resolve().name}",
        found.what,
        card_table(["", ""], list(found.facts.items())),
        found.use,
        license_section(licenses, given=license),
        f"## Versions\n\n{version_line()}",
    ]
    write_whole(directory / "README.md", card_text(data, parts))
    return target.push(directory, message=found.what, ignore=IGNORED)


def _cache(directory: Path) -> DataSet:
    index = CacheIndex.load(directory)
    if not index.complete:
        raise ValueError(f"the cache in {directory} is unfinished: run the same `kdlib cache` command again to continue")
    meta, summary = index.meta, index.summary
    kept = {"topk": f"the {meta.k} likeliest tokens", "sampled": f"{meta.k} drawn tokens", "given": "the row's own token"}
    return DataSet(
        what="Log-probabilities of a teacher at the scored tokens of a data set, written by kdlib cache.",
        teacher=meta.teacher,
        facts={
            "teacher": meta.teacher,
            "kept of each token": f"{kept[meta.kind]}, {meta.logp_bits} bits, temperature {meta.temperature}",
            "rows": f"{summary['dataset_rows']:,}",
            "scored tokens": f"{summary['tokens']:,}",
            "bytes of a token": f"{summary['bytes_per_token']}",
            "tokenizer (fingerprint)": meta.tokenizer,
        },
        use="Download it and give the directory as `--teacher`: `kdlib distill --teacher DIR`, with the rows it was made of.",
    )


def _traces(directory: Path, index: TraceIndex) -> DataSet:
    settings, report = index.settings, _report(directory)
    verdicts = report.get("verdicts", {})
    counted = {f"{name} traces": f"{count:,}" for name, count in verdicts.items() if isinstance(count, int)}
    drawn = {name: str(settings[name]) for name in _named(settings, ("num_generations", "max_completion_length", "verify"))}
    rollout = {key.removeprefix("rollout."): str(value) for key, value in settings.items() if key.startswith("rollout.")}
    files = {"all": "shard-*.jsonl"}
    files |= {name: f"{name}.jsonl" for name in ("correct", "incorrect") if (directory / f"{name}.jsonl").is_file()}
    return DataSet(
        what="Answers of a teacher to prompts, as the token ids it wrote, by kdlib generate.",
        teacher=str(settings["model"]),
        facts={
            "teacher": str(settings["model"]),
            "prompts": f"{index.prompts:,}",
            "traces": f"{sum(shard.traces for shard in index.shards.values()):,}",
            **counted,
            **drawn,
            **rollout,
        },
        use="Every row has `messages` and the token ids; `kdlib distill --dataset_name` reads it as it is.",
        files=files,
    )


def _named(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if settings.get(name) is not None]


def _report(directory: Path) -> dict[str, Any]:
    path = directory / "report.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
