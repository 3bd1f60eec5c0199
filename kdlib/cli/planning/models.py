"""Students and teachers for a plan: made of their configurations, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdlib.cli.planning.known import blank_tokenizer, known_config
from kdlib.head import Head
from kdlib.models import inner, load_config, load_tokenizer, not_loadable
from kdlib.serving.client import is_url
from kdlib.teachers import HFTeacher
from kdlib.trainers.config import DistillationConfig
from kdlib.types import Positions, Support, TeacherSignal, feeds

COMPOSED = ("EnsembleTeacher", "ConsistencyEnsemble")


def on_meta(config: PreTrainedConfig, *, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """The model of a configuration on torch's meta device, which holds shapes alone.

    Flash attention is planned as sdpa: both keep the same tensors for the backward pass, and one needs no package.
    """
    attention = "sdpa" if attn_implementation is not None and "flash" in attn_implementation else attn_implementation
    asked = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **asked)
    model.hf_device_map = {"": "meta"}  # which keeps the Trainer from moving it to a device
    made: PreTrainedModel = model
    return made


def student_on_meta(name: str, args: DistillationConfig, *, frozen: bool) -> PreTrainedModel:
    """The student as training would load it; ``frozen``: below an adapter, where weights stay as they were saved."""
    config = found_config(name, revision=args.model_revision, trust_remote_code=args.trust_remote_code)
    if args.from_scratch:
        config.update(args.config_overrides or {})
    asked = args.dtype or ("auto" if frozen and not args.from_scratch else "float32")
    return on_meta(config, dtype=_dtype(asked, config), attn_implementation=args.attn_implementation)


def found_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a path or Hub id, or of a model that recipes name; ValueError with one line without one."""
    try:
        return load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if (known := known_config(name)) is not None:
            return known
        raise ValueError(not_loadable("configuration", name, error)) from error


def found_tokenizer(
    name: str, args: DistillationConfig, *, instead: PreTrainedTokenizerBase | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; ``instead`` of one that is not here, or a blank one, for a model that recipes name."""
    try:
        return load_tokenizer(name, revision=args.model_revision, trust_remote_code=args.trust_remote_code)
    except ValueError:
        if (known := known_config(name)) is None:
            raise
        return instead or blank_tokenizer(known.vocab_size)


def _dtype(asked: str, config: PreTrainedConfig) -> torch.dtype:
    return (config.dtype or torch.float32) if asked == "auto" else getattr(torch, asked)


def teacher_on_meta(spec: Any, args: DistillationConfig, *, tokenizer: PreTrainedTokenizerBase, full: bool) -> Any:
    """What ``teacher`` says, with models without weights in the place of paths and a stand-in for servers.

    ``full``: the objective needs whole distributions, so that a server has to give hidden states.
    """
    options = {"args": args, "tokenizer": tokenizer, "full": full}
    if isinstance(spec, str):
        return _named(spec, **options)
    if isinstance(spec, Mapping):
        composed = next((name for name in COMPOSED if list(spec) == [name]), None)
        if composed is not None:
            given = dict(spec[composed] or {})
            members = [teacher_on_meta(one, **options) for one in given.pop("teachers", [])]
            return {composed: {**given, "teachers": members}}
        return spec if list(spec) == ["SelfTeacher"] else {k: teacher_on_meta(v, **options) for k, v in spec.items()}
    return AbsentServer(args, tokenizer=tokenizer, full=full) if isinstance(spec, list) else spec


def _named(name: str, *, args: DistillationConfig, tokenizer: PreTrainedTokenizerBase, full: bool) -> Any:
    if name == "SelfTeacher" or (Path(name) / "cache.json").is_file():
        return name
    if is_url(name) or args.teacher_backend == "vllm":
        return AbsentServer(args, tokenizer=tokenizer, full=full)
    config = found_config(name, revision=args.teacher_revision, trust_remote_code=args.trust_remote_code)
    model = on_meta(config, dtype=_dtype(args.teacher_dtype, config), attn_implementation=args.teacher_attn_implementation)
    return HFTeacher(model, tokenizer=found_tokenizer(name, args, instead=tokenizer), device_map="meta")


class AbsentServer:
    """In the place of a served teacher, which need not run to be planned with: what of its answers lies in this process.

    With ``signal: hidden``, or where the objective needs whole distributions, hidden states and the teacher's head, as wide as
    those of ``teacher_checkpoint`` (the student's own where it is not given); else ``signal_top_k`` log-probs a row.
    """

    def __init__(self, args: DistillationConfig, *, tokenizer: PreTrainedTokenizerBase, full: bool) -> None:
        self.args, self.vocab_size = args, len(tokenizer)
        self.hidden = args.signal == "hidden" or (args.signal == "auto" and full)
        self.provides = Support.FULL if self.hidden else Support.SAMPLED_STUDENT if args.signal == "sampled" else Support.TOPK
        self.config = found_config(args.teacher_checkpoint).get_text_config() if args.teacher_checkpoint else None
        self._weight: Tensor | None = None

    def width(self, student: PreTrainedModel) -> None:
        """Makes the head, as wide as the teacher's hidden states."""
        if self.hidden:
            config = self.config or student.config.get_text_config()
            self._weight = torch.empty(self.vocab_size, config.hidden_size, dtype=config.dtype or torch.float32, device="meta")

    @property
    def assumption(self) -> str:
        """What is taken for granted of the server."""
        if not self.hidden:
            return (
                f"the served teacher gives {self.args.signal_top_k if self.provides is Support.TOPK else 1} log-probs a token"
            )
        wide = "" if self.config is not None else ", as wide as the student's (teacher_checkpoint says otherwise)"
        return f"the served teacher gives hidden states{wide}, and its head lies here"

    @property
    def weights(self) -> list[Tensor]:
        """What of the teacher lies in this process."""
        return [] if self._weight is None else [self._weight]

    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        """Rows of the right shapes, with nothing in them."""
        N = len(positions)
        if self._weight is not None:
            weight = torch.empty_like(self._weight, device="cpu")
            return TeacherSignal(hidden=torch.empty(N, weight.shape[1], dtype=weight.dtype), head=Head(weight=weight))
        k = self.args.signal_top_k if self.provides is Support.TOPK else 1
        ids = torch.empty(N, k, dtype=torch.long)
        rest = torch.empty(N) if self.provides is Support.TOPK else None
        return TeacherSignal(logp=torch.empty(N, k), ids=ids, rest=rest, support=self.provides)


def stand_in(trainer: Any) -> AbsentServer:
    """For the server that a trainer has, without asking it: its answers have the shapes that the options say."""
    full = not feeds(Support.TOPK, trainer.objective.accepts)
    server = AbsentServer(trainer.args, tokenizer=trainer.processing_class, full=full)
    server.width(inner(trainer.model))
    return server


def ready_to_make(args: DistillationConfig) -> DistillationConfig:
    """The options for a trainer whose student is there already, and that starts no engine."""
    if args.rollout.engine == "server" and args.rollout_source == "teacher":
        args.rollout_source = "student"  # whoever writes them, rollouts of a server take no memory here
    args.from_scratch, args.config_overrides = False, None
    args.rollout = replace(args.rollout, engine="hf", url=None, dtype=None, sleep=False)
    return args
