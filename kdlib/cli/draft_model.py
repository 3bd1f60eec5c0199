"""From what ``--model`` says to the draft and its trainer, and the measurement of what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from kdlib.cli.measuring import print_unmeasured, row_prompts
from kdlib.cli.names import unknown
from kdlib.data.draft import first_scored
from kdlib.decoding.sampling import context_length
from kdlib.drafts.formats import is_head
from kdlib.drafts.prune import pruned
from kdlib.eval import AcceptanceResult, acceptance
from kdlib.models import load_model, load_tokenizer
from kdlib.serving.client import is_url
from kdlib.teachers import HFTeacher
from kdlib.trainers.config import DistillationConfig
from kdlib.trainers.draft import DraftTrainer
from kdlib.trainers.eagle_config import EagleConfig

if TYPE_CHECKING:
    from kdlib.trainers import DistillationTrainer

HEAD = "eagle3"
FORMS = "a path or Hub id, {prune: {layers: [...]}}, eagle3, {eagle3: {...}}, or a published head"


def draft_tokenizer_source(model: Any, target: Any) -> str:
    """The path or Hub id beside which the draft's tokenizer lies: its own, or the target's."""
    if isinstance(model, str) and head_options(model) is None:
        return model
    return target_path(target, what="the draft is made from it")


def target_path(target: Any, *, what: str) -> str:
    """The target as a path or Hub id; ValueError when it is served, cached or none."""
    if not isinstance(target, str) or is_url(target):
        raise ValueError(f"the target must be a path or Hub id here ({what}), not {target!r}: give --teacher PATH")
    return target


def head_options(model: Any) -> dict[str, Any] | None:
    """The options of EagleConfig that ``model`` gives when it is an EAGLE-3 head, new or published; None when it is none."""
    if model == HEAD or (isinstance(model, str) and is_head(model)):
        return {}
    if not isinstance(model, Mapping) or list(model) != [HEAD]:
        return None
    given = dict(model[HEAD] or {})
    own = [field.name for field in fields(EagleConfig) if field.name not in {f.name for f in fields(DistillationConfig)}]
    for key in set(given) - {*own, "path"}:
        raise ValueError(unknown(key, [*own, "path"], of=HEAD))
    return {key: value for key, value in given.items() if key != "path"}


def head_path(model: Any) -> str | None:
    """The published head that training goes on from; None for a new one."""
    if isinstance(model, str):
        return None if model == HEAD else model
    return (model[HEAD] or {}).get("path")


def make_trainer(model: Any, target: Any, *, reference: str | None, given: Mapping[str, Any]) -> DistillationTrainer:
    """The trainer for the form of ``model``; ValueError for a form that is none."""
    if head_options(model) is not None:
        return _eagle_trainer(head_path(model), target, given=given)
    if isinstance(model, str | nn.Module):
        return DraftTrainer(model, target, reference=reference, **given)
    source = draft_tokenizer_source(model, target)
    tokenizer = load_tokenizer(source, trust_remote_code=given["args"].trust_remote_code)
    return DraftTrainer(_pruned(model, target, given["args"]), target, reference=reference, processing_class=tokenizer, **given)


def _eagle_trainer(head: str | None, target: Any, *, given: Mapping[str, Any]) -> DistillationTrainer:
    from kdlib.trainers.eagle import EagleTrainer

    if given["peft_config"] is not None or given["quantization_config"] is not None:
        raise ValueError("an EAGLE-3 head is small and trained whole: leave out use_peft and load_in_4bit or 8bit")
    return EagleTrainer(head, target, **given)


def _pruned(model: Any, target: Any, args: DistillationConfig) -> Any:
    """The target's model with the layers of {prune: {layers: [...], of: PATH}}; ``of`` is the target when left out."""
    options = model.get("prune") if isinstance(model, Mapping) and list(model) == ["prune"] else None
    if not isinstance(options, Mapping) or "layers" not in options or set(options) - {"layers", "of"}:
        raise ValueError(f"model {model!r}: the draft is {FORMS}")
    source = options.get("of") or target_path(target, what="its layers are taken")
    whole = load_model(source, dtype=args.dtype or "float32", trust_remote_code=args.trust_remote_code)
    return pruned(whole, list(options["layers"]))


def measure(trainer: Any, draft: Path, options: Mapping[str, Any], *, log: Console) -> AcceptanceResult | None:
    """Acceptance of the draft in a directory by the trainer's target; None, with the reason, where it cannot be measured."""
    if not isinstance(trainer.teacher, HFTeacher):
        reason = "the target is not in this process (kdlib evaluate acceptance does it)"
    else:
        try:
            return _measured(trainer, draft, options)
        except ValueError as error:  # prompts without room: no reason to lose what was trained
            reason = str(error)
    print_unmeasured(log, "acceptance is", reason)
    return None


def _measured(trainer: Any, draft: Path, options: Mapping[str, Any]) -> AcceptanceResult:
    models = [trainer.teacher.model] if is_head(str(draft)) else [trainer.teacher.model, trainer.model]
    room = {name: options[name] for name in ("limit", "max_new_tokens")}
    return acceptance(
        trainer.teacher.model,
        str(draft),
        row_prompts(trainer, _first_prompt, **room, context=min(context_length(model) for model in models)),
        tokenizer=trainer.processing_class,
        gamma=options["num_speculative_tokens"],
        temperature=options["temperature"],
        top_k=options["top_k"] or None,
        top_p=options["top_p"],
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
        seed=trainer.args.seed,
    )


def _first_prompt(row: Mapping[str, Any]) -> list[int]:
    return list(row["input_ids"][: first_scored(row["labels"])])
