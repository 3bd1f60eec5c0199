"""A trained draft as a directory that vLLM loads with ``speculative_config``, after its checks and those it leaves out."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kdlib.drafts import formats
from kdlib.drafts.eagle3_config import check_feature_layers, default_feature_layers
from kdlib.models import fit_vocabulary, load_tokenizer
from kdlib.tokenizers import explain_difference, same_tokenizer

DraftSampleMethod = Literal["greedy", "probabilistic"]
RECORD = "kdlib_draft.json"
# vLLM takes a path that contains one of these for a draft of that kind, whatever method it is told (config/speculative.py)
_OTHER_METHODS = ("eagle-", "eagle3", "dflash", "dspark")


@dataclass(frozen=True, kw_only=True)
class DraftExport:
    """What was written, and how it is served: ``speculative_config`` for vllm.LLM(target, ...), or the command ``serve``."""

    directory: Path
    target: str
    speculative_config: dict[str, Any]
    serve: str
    notes: tuple[str, ...] = ()


def export_draft(
    draft: str,
    output_path: str | os.PathLike[str],
    *,
    target: str,
    num_speculative_tokens: int = 4,
    draft_sample_method: DraftSampleMethod = "greedy",
    trust_remote_code: bool = False,
) -> DraftExport:
    """Writes the causal language model ``draft`` (path or Hub id) as a draft for ``target`` under vLLM's method draft_model.

    With the target's tokenizer it gets the target's vocab_size, padding entries included, as vLLM wants (``fit_vocabulary``);
    with another one the configuration says use_heterogeneous_vocab, which drafts greedily. ``kdlib_draft.json`` beside the
    weights holds the configuration; a directory that has it for the same draft and target is replaced, in one step.

    Raises ValueError for a path that vLLM would take for another method's, an output directory with anything else in it,
    num_speculative_tokens below 1, weights that are missing or do not fit, and probabilistic drafts with another tokenizer.
    """
    if num_speculative_tokens < 1:
        raise ValueError(f"num_speculative_tokens must be at least 1, not {num_speculative_tokens}")
    path, record = Path(os.path.abspath(output_path)), _record(draft, target)
    _check_name(path)
    _check_free(path, record)
    tokenizer, words = (load_tokenizer(name, trust_remote_code=trust_remote_code) for name in (draft, target))
    shared = same_tokenizer(tokenizer, words)
    if not shared and draft_sample_method != "greedy":
        raise ValueError(
            f"draft and target have different tokenizers ({explain_difference(tokenizer, words)}): "
            "vLLM drafts greedily between those, so leave draft_sample_method at greedy"
        )
    config = {"method": "draft_model", "model": str(path), "num_speculative_tokens": num_speculative_tokens}
    config |= {"draft_sample_method": draft_sample_method} | ({} if shared else {"use_heterogeneous_vocab": True})
    model = _loaded(draft, trust_remote_code=trust_remote_code)
    wanted = AutoConfig.from_pretrained(target, trust_remote_code=trust_remote_code).get_text_config()
    notes = _notes(model, wanted)
    if shared:
        notes += _fitted(model, wanted.vocab_size, tokens=len(tokenizer))
    with written_whole(path) as directory:
        _write(model, tokenizer, directory)
        _loaded(str(directory), trust_remote_code=trust_remote_code)
        (directory / RECORD).write_text(json.dumps(record | {"speculative_config": config}, indent=2) + "\n")
    serve = f"vllm serve {shlex.quote(record['target'])} --speculative-config {shlex.quote(json.dumps(config))}"
    return DraftExport(directory=path, target=record["target"], speculative_config=config, serve=serve, notes=notes)


def export_head(
    head: str,
    output_path: str | os.PathLike[str],
    *,
    target: str,
    format: formats.Format = "speculators",
    num_speculative_tokens: int = 4,
    trust_remote_code: bool = False,
) -> DraftExport:
    """Writes an EAGLE-3 head (a directory in either format, or a Hub id) in ``format``; all else is as in ``export_draft``.

    Raises ValueError for a head of another vocabulary or width than the target's, or of layers which the target has not.
    """
    path, record = Path(os.path.abspath(output_path)), _record(head, target)
    _check_free(path, record)
    config = AutoConfig.from_pretrained(target, trust_remote_code=trust_remote_code)
    draft, wanted = formats.load(head), config.get_text_config()
    sizes = (draft.config.vocab_size, draft.config.target_hidden_size)
    if sizes != (wanted.vocab_size, wanted.hidden_size):
        raise ValueError(
            f"{head} is for a target of vocab_size {sizes[0]} and hidden_size {sizes[1]}: "
            f"{target} has {wanted.vocab_size} and {wanted.hidden_size}"
        )
    if draft.config.feature_layers is None:
        draft.config.feature_layers = list(default_feature_layers(wanted.num_hidden_layers))
    check_feature_layers(draft.config.feature_layers, num_layers=wanted.num_hidden_layers)
    given = {"method": "eagle3", "model": str(path), "num_speculative_tokens": num_speculative_tokens}
    with written_whole(path) as directory:
        formats.write(
            draft,
            directory,
            format=format,
            target_name=record["target"],
            target_architectures=tuple(config.architectures or ()),
            num_speculative_tokens=num_speculative_tokens,
        )
        formats.load(directory)
        (directory / RECORD).write_text(json.dumps(record | {"speculative_config": given}, indent=2) + "\n")
    serve = formats.serve_command(
        path, format=format, target_name=record["target"], num_speculative_tokens=num_speculative_tokens
    )
    return DraftExport(directory=path, target=record["target"], speculative_config=given, serve=serve)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """An empty directory that takes the place of ``path`` when the block ends, and leaves nothing when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)


def _record(draft: str, target: str) -> dict[str, str]:
    """Both by name; a directory by its whole path, as what is written may be served from elsewhere."""
    return {key: os.path.abspath(name) if os.path.isdir(name) else name for key, name in (("draft", draft), ("target", target))}


def _check_name(path: Path) -> None:
    taken = [word for word in _OTHER_METHODS if word in str(path).lower()]
    if taken:
        raise ValueError(
            f"vLLM takes a path with {taken[0]!r} for a draft of another method, as in {path}: choose another output path"
        )


def _check_free(path: Path, record: dict[str, str]) -> None:
    """ValueError when something would be written over that is not an earlier export of the same draft for the same target."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    found = json.loads((path / RECORD).read_text()) if (path / RECORD).is_file() else {}
    if {key: found.get(key) for key in record} != record:
        raise ValueError(f"{path} is not empty and no export of this draft for this target: choose another output path")


def _loaded(name: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model with its weights as saved; ValueError when tensors are missing, left over or of another shape.

    transformers would fill a missing tensor with random numbers, and vLLM might too.
    """
    if Path(name, "adapter_config.json").is_file():
        raise ValueError(f"{name} is an adapter: vLLM loads whole drafts, so give the merged model (final/ of a run is)")
    model, found = AutoModelForCausalLM.from_pretrained(
        name, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=True
    )
    wrong = {
        what: sorted(map(str, found[what])) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[what]
    }
    if wrong:
        what, names = next(iter(wrong.items()))
        raise ValueError(f"{name}: {len(names)} {what.replace('_', ' ')} in its weights, the first is {names[0]}")
    loaded: PreTrainedModel = model
    return loaded


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _fitted(model: PreTrainedModel, vocab_size: int, *, tokens: int) -> tuple[str, ...]:
    added = fit_vocabulary(model, vocab_size, tokens=tokens)
    if added == 0:
        return ()
    how = "added, which are never the likeliest" if added > 0 else "cut off, which stand for no token of the target"
    return (f"vocab_size is now {vocab_size}, the target's: {abs(added)} padding entries {how}",)


def _notes(model: PreTrainedModel, target: Any) -> tuple[str, ...]:
    context = model.config.get_text_config().max_position_embeddings
    if context >= target.max_position_embeddings:
        return ()
    return (
        f"the draft reads {context} tokens, the target {target.max_position_embeddings}: vLLM does not draft beyond {context}",
    )
