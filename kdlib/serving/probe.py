"""What is asked of a server or engine before a run: which model it is, and whether its answers are what a teacher needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kdlib.head import Head
from kdlib.serving.client import Served
from kdlib.serving.errors import ServerRefusedError
from kdlib.serving.scoring import BadRow, Listed, Row, Scorer

_ROW = Row(tokens=list(range(8)), wanted=list(range(7)))
_NO_SUCH_ROUTE = 404
_SLACK = 1e-3  # nats by which rounding may lift the logarithm of all mass above 0
_SPREAD = 1e-2  # nats by which rounding may bend the relation of log-probs at two temperatures


def chosen(models: Sequence[Served], model: str | None, *, name: str) -> tuple[Served, str]:
    """(the served model, the checkpoint it is): the one that ``model`` names, by id or checkpoint, or the only one.

    A directory, or a Hub id where the server names a directory, is taken for the checkpoint of the only served model. Raises
    ValueError that lists what is served when ``model`` is none of it, and when the checkpoint is not to be had here.
    """
    served, checkpoint = _named(models, model, name=name)
    if Path(checkpoint).is_absolute() and not Path(checkpoint).is_dir():
        raise ValueError(
            f"{name} serves {checkpoint}, which is not on this machine: set model to a copy of it here, or to its Hub id"
        )
    return served, checkpoint


def _named(models: Sequence[Served], model: str | None, *, name: str) -> tuple[Served, str]:
    listed = ", ".join(sorted({one.name for one in models} | {one.root for one in models}))
    named = [one for one in models if model in (one.name, one.root)]
    if named:
        return named[0], named[0].root
    if len(models) > 1:
        raise ValueError(f"{name} serves several models ({listed}): name one of them with model")
    if model is None:
        return models[0], models[0].root
    comparable = not Path(model).is_dir() and not ("/" in model and Path(models[0].root).is_absolute())
    if comparable:
        raise ValueError(f"{name} does not serve {model}: it serves {listed}")
    return models[0], model


def gives_hidden(scorer: Scorer) -> bool:
    """Whether hidden states are to be had at all."""
    try:
        scorer.hidden([_ROW], dtype=torch.float32)
    except ServerRefusedError:
        return False
    return True


def check_hidden(scorer: Scorer, head: Head, *, checkpoint: str, command: str) -> None:
    """ValueError unless the hidden states are plain (not normalised) and as wide as the head."""
    try:
        answer = scorer.hidden([_ROW], dtype=head.weight.dtype)[0]
    except ServerRefusedError as error:
        raise ValueError(f"{scorer.name} gives no hidden states: start it with `{command}`") from error
    if isinstance(answer, BadRow):
        raise ValueError(f"{scorer.name} answers token ids 0 to 7 with nothing usable: {answer.reason}")
    width = head.weight.shape[1]
    if answer.shape[-1] != width:
        raise ValueError(
            f"the hidden states of {scorer.name} are {answer.shape[-1]} wide, the head of {checkpoint} takes {width}: "
            "set model to the checkpoint that is served"
        )
    if (answer.float().norm(dim=-1) - 1.0).abs().median() < _SPREAD:  # a padding token's can be 0 throughout
        raise ValueError(f"{scorer.name} normalises its hidden states to length 1: start it with `{command}`")


def check_logprobs(scorer: Scorer, *, k: int, temperature: float, command: str) -> None:
    """ValueError unless ``k`` log-probs a token (0: the row's own) are given, normalised, at ``temperature``."""
    plain = _listed(scorer, k=k, temperature=1.0, command=command)
    mass = plain.likeliest()[0].logsumexp(-1) if k else plain.own()[0]
    if mass.max() > _SLACK:
        raise ValueError(f"{scorer.name} gives logits, not log-probs: start it with `{command}`")
    if temperature == 1.0:
        return
    if k < 2 or not _follows(plain, _listed(scorer, k=k, temperature=temperature, command=command), temperature):
        raise ValueError(
            f"{scorer.name} gives log-probs at temperature 1, whatever is asked for: set temperature to 1, "
            "or use the signal hidden, which serves every temperature"
        )


def _listed(scorer: Scorer, *, k: int, temperature: float, command: str) -> Listed:
    try:
        answer = scorer.logprobs([_ROW], k=k, temperature=temperature)[0]
    except ServerRefusedError as error:
        if error.status == _NO_SUCH_ROUTE:
            raise ValueError(f"{scorer.name} gives no log-probs: start it with `{command}`") from error
        raise ValueError(f"{error}; lower k, or start the server with `{command}`") from error
    if isinstance(answer, BadRow):
        raise ValueError(f"{scorer.name} answers token ids 0 to 7 with nothing usable: {answer.reason}")
    return answer


def _follows(plain: Listed, tempered: Listed, temperature: float) -> bool:
    """Whether log p_T = log p_1 / T + constant, and is not log p_1."""
    (before, ids), (after, ids_after) = plain.likeliest(), tempered.likeliest()
    shift = after - before / temperature
    spread = shift.amax(-1) - shift.amin(-1)
    return bool((ids == ids_after).all() and spread.max() < _SPREAD and (after - before).abs().max() > _SPREAD)
