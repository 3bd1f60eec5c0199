"""A model behind vLLM servers, or in a vLLM engine of this process, as the teacher."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from kdlib.data.positions import teacher_inputs
from kdlib.head import Head
from kdlib.models import load_tokenizer
from kdlib.serving.client import Served, ServerClient, is_url
from kdlib.serving.command import batched_tokens, serve_command
from kdlib.serving.engine import start_engine, stop_engine
from kdlib.serving.errors import BadRowsError
from kdlib.serving.head import checkpoint_head
from kdlib.serving.probe import check_hidden, check_logprobs, chosen, gives_hidden
from kdlib.serving.scoring import BadRow, EngineScorer, Listed, Row, Scorer, ServerScorer
from kdlib.tokenizers import explain_difference, same_tokenizer
from kdlib.types import Positions, Support, TeacherSignal

_logger = logging.getLogger("kdlib.serving")
_PROVIDES = {"hidden": Support.FULL, "topk": Support.TOPK, "sampled": Support.SAMPLED_STUDENT}

Kind = Literal["hidden", "topk", "sampled"]
Parts = tuple[Tensor, ...]  # of one row: (hidden,) or (logp, ids), each [n, ...]


class VLLMTeacher:
    """Scores given token ids; no text is tokenised.

    source: the URL of a server, URLs of several that serve the same model (requests go to each in turn), or a model path or Hub
    id, which is then run in this process.
    signal: ``hidden`` gives whole distributions, as last hidden states for the checkpoint's own head; ``topk`` the k likeliest
    tokens and the mass outside; ``sampled`` the log-prob of the token that follows in the row. ``auto``: hidden, or topk when
    the server was not started for hidden. ``kind`` says which it is.
    model: the checkpoint (directory or Hub id) of tokenizer and head where it is not the path that the server names, or the one
    that is meant of several served models.
    temperature: of topk and sampled log-probs; vLLM gives them at 1, another is accepted if the server proves to apply it.
    dtype: of the head, of hidden states on the wire and of an engine in this process; ``auto`` is the checkpoint's.
    budget_bytes: of the engine's float32 [tokens, V] buffer. vLLM fills one for a chunk of one row at a time, so that
    --max-num-batched-tokens bounds it however long the rows are: an engine here is started so, and messages print the line.
    timeout, patience (seconds), concurrency: see ServerClient.

    ``bad_rows`` collects the sample ids of unusable answers. Raises ValueError of one line when nothing usable is served.
    """

    def __init__(
        self,
        source: str | Sequence[str],
        *,
        signal: Literal["auto", "hidden", "topk", "sampled"] = "auto",
        k: int = 64,
        model: str | None = None,
        temperature: float = 1.0,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        budget_bytes: int = 2**31,
        concurrency: int = 8,
        timeout: float = 120.0,
        patience: float = 300.0,
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        served = not isinstance(source, str) or is_url(source)
        self.k, self.temperature, self.bad_rows = k, temperature, set[int]()
        self.vocab_size: int | None = None
        self._budget, self._max_model_len, self._memory = budget_bytes, max_model_len, gpu_memory_utilization
        self._hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._heads: dict[torch.device, Head] = {}
        self._client = ServerClient(source, timeout=timeout, patience=patience, concurrency=concurrency) if served else None
        self.kind: Kind = "hidden" if signal == "auto" else signal
        self._served, self.checkpoint = self._found(source, model)
        self.tokenizer = load_tokenizer(self.checkpoint, **self._hub)
        self._config = AutoConfig.from_pretrained(self.checkpoint, **self._hub)
        self.dtype: torch.dtype = (self._config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        scorers = self._scorers()
        self.scorer, self.name = scorers[0], scorers[0].name
        if served and signal == "auto" and not gives_hidden(self.scorer):
            self.kind = "topk"
        self._head = (
            checkpoint_head(self.checkpoint, self._config, dtype=self.dtype, **self._hub) if self.kind == "hidden" else None
        )
        for scorer in scorers:
            self._probe(scorer)

    def _found(self, source: str | Sequence[str], model: str | None) -> tuple[Served | None, str]:
        """What is served, and the checkpoint it is."""
        if self._client is None:
            assert isinstance(source, str)
            return None, source
        command = serve_command(model or "MODEL", signal=self.kind, k=self.k)
        return chosen(self._client.models(command=command), model, name=self._client.name)

    def _scorers(self) -> list[Scorer]:
        """What answers, and after it each replica by itself, so that all of them are probed."""
        if self._client is None or self._served is None:
            return [self._engine()]
        served = self._served
        clients = [self._client, *(self._client.each() if len(self._client.urls) > 1 else [])]
        return [ServerScorer(client, model=served.name, max_model_len=served.max_model_len) for client in clients]

    def _engine(self) -> EngineScorer:
        engine = start_engine(
            self.checkpoint,
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=self._max_model_len,
            gpu_memory_utilization=self._memory,
            enforce_eager=True,  # scoring is prefill, which gains nothing from CUDA graphs
            pooling=self.kind == "hidden",
            max_logprobs=self.k,
            max_num_batched_tokens=None if self.kind == "hidden" else self._step,
            **self._hub,
        )
        return EngineScorer(engine, name=self.checkpoint)

    @property
    def _step(self) -> int:
        return batched_tokens(self.model_vocab_size, budget_bytes=self._budget)

    @property
    def model_vocab_size(self) -> int:
        """The model's own V, padding entries included."""
        return int(self._config.get_text_config().vocab_size)

    @property
    def hidden_size(self) -> int:
        """The width of the model's hidden states."""
        return int(self._config.get_text_config().hidden_size)

    @property
    def command(self) -> str:
        """The ``vllm serve`` line that this teacher needs."""
        step = None if self.kind == "hidden" else self._step
        return serve_command(
            self.checkpoint, signal=self.kind, k=self.k, max_model_len=self._max_model_len, max_num_batched_tokens=step
        )

    @property
    def provides(self) -> Support:
        return _PROVIDES[self.kind]

    def _probe(self, scorer: Scorer) -> None:
        if self._head is not None:
            check_hidden(scorer, self._head, checkpoint=self.checkpoint, command=self.command)
        else:
            check_logprobs(scorer, k=self._listed, temperature=self.temperature, command=self.command)

    @property
    def _listed(self) -> int:
        return self.k if self.kind == "topk" else 0

    def check(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, max_length: int | None = None) -> None:
        """Sets what the head is cut to. ValueError when tokenizer, vocabulary or longest row do not fit the served model."""
        if not same_tokenizer(tokenizer, self.tokenizer):
            raise ValueError(
                f"the student's tokenizer and that of the model behind {self.name} differ, so their ids mean different tokens: "
                f"{explain_difference(tokenizer, self.tokenizer)}"
            )
        if vocab_size > self.model_vocab_size:
            raise ValueError(
                f"the tokenizer has {vocab_size} tokens, the model behind {self.name} {self.model_vocab_size}: "
                "it was made for another tokenizer"
            )
        self.vocab_size = vocab_size
        self._heads.clear()
        if max_length is not None:
            self._check_length(max_length)

    @property
    def longest_row(self) -> int | None:
        """The most tokens that a row may have; None when the server does not say."""
        limit = self.scorer.max_model_len
        return None if limit is None else limit - self._spare

    @property
    def _spare(self) -> int:
        return 0 if self.kind == "hidden" else 1  # vLLM generates a token after the ones it scores

    def _check_length(self, tokens: int) -> None:
        if self.longest_row is not None and tokens > self.longest_row:
            longer = shlex.join([*shlex.split(self.command), "--max-model-len", str(tokens + self._spare)])
            raise ValueError(
                f"rows of {tokens} tokens are longer than {self.name} takes ({self.longest_row}): lower max_length, "
                f"or start it with `{longer}`"
            )

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        """The signal at the rows of ``positions``, on their device; of ``teacher_input_ids`` where ``teacher_index`` is given.

        Raises BadRowsError, which holds the signal of the other rows, for answers that are NaN, infinite or missing;
        ServerAwayError when no server answers; ValueError for ``layers`` and for rows longer than the model takes.
        """
        if layers:
            raise ValueError("a served teacher gives no hidden layers: this objective needs the teacher in this process")
        samples = _samples(batch, positions, follow=self.kind != "hidden")
        self._check_length(max((len(sample.row.tokens) for sample in samples), default=0))
        answers = self._answers([sample.row for sample in samples])
        good = [(sample, x) for sample, x in zip(samples, answers, strict=True) if not isinstance(x, BadRow)]
        bad = {sample.sample_id: x for sample, x in zip(samples, answers, strict=True) if isinstance(x, BadRow)}
        places = torch.cat([torch.empty(0, dtype=torch.long), *(sample.places for sample, _ in good)])
        signal = self._signal([x for _, x in good], places.argsort(), device=positions.index.device)
        if bad:
            self._report(bad)
            index = positions.index if positions.teacher_index is None else positions.teacher_index
            keep = torch.zeros(len(index), dtype=torch.bool).index_fill(0, places, True)
            reason = next(iter(bad.values())).reason
            raise BadRowsError(keep=keep, signal=signal if good else None, samples=list(bad), reason=reason)
        return signal

    def _answers(self, rows: list[Row]) -> Sequence[Parts | BadRow]:
        """(hidden,) or (logp, ids) of every row."""
        if not rows:
            return []
        if self.kind == "hidden":
            return [x if isinstance(x, BadRow) else (x,) for x in self.scorer.hidden(rows, dtype=self.dtype)]
        answers = self.scorer.logprobs(rows, k=self._listed, temperature=self.temperature)
        return [x if isinstance(x, BadRow) else self._parts(x) for x in answers]

    def _parts(self, listed: Listed) -> Parts | BadRow:
        logp, ids = listed.likeliest() if self.kind == "topk" else listed.own()
        if self.vocab_size is not None and (ids >= self.vocab_size).any():
            return BadRow(reason="entries that only pad the teacher's vocabulary are among its likeliest tokens")
        if self.kind == "sampled" and logp.isinf().any():
            return BadRow(reason="a token of it has probability 0")
        return logp, ids

    def _signal(self, answers: Sequence[Parts], order: Tensor, *, device: torch.device) -> TeacherSignal:
        """The parts of all rows in the order of their positions."""
        if self._head is not None:
            empty = torch.empty(0, self._head.weight.shape[1], dtype=self.dtype)
            hidden = torch.cat([empty, *(x.to(self.dtype) for (x,) in answers)])[order]
            return TeacherSignal(hidden=hidden.to(device), head=self._head_on(device))
        k = max(1, self._listed)
        logp = torch.cat([torch.empty(0, k, dtype=torch.float64), *(logp for logp, _ in answers)])[order]
        ids = torch.cat([torch.empty(0, k, dtype=torch.long), *(ids for _, ids in answers)])[order]
        rest = _outside(logp, everything=k >= self.model_vocab_size) if self.kind == "topk" else None
        return TeacherSignal(
            logp=logp.float().to(device),
            ids=ids.to(device),
            rest=None if rest is None else rest.float().to(device),
            support=self.provides,
            temperature=self.temperature,
        )

    def _head_on(self, device: torch.device) -> Head:
        assert self._head is not None
        if device not in self._heads:
            head = self._head if self.vocab_size is None else self._head.sliced(self.vocab_size)
            self._heads[device] = head.to(device)
        return self._heads[device]

    def _report(self, bad: Mapping[int, BadRow]) -> None:
        for sample, row in bad.items():
            if sample not in self.bad_rows:
                _logger.warning("sample %d cannot be used: %s", sample, row.reason)
        self.bad_rows |= bad.keys()

    def close(self) -> None:
        """Ends the engine, where there is one in this process."""
        if isinstance(self.scorer, EngineScorer):
            stop_engine(self.scorer.engine)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """One sequence of a batch: what is sent, and ``places`` [n], where its wanted positions stand among all positions."""

    sample_id: int
    row: Row
    places: Tensor


def _samples(batch: Mapping[str, Any], positions: Positions, *, follow: bool) -> list[_Sample]:
    """The sequences of a batch, packed or not, up to their last scored position, and with the token after it if ``follow``."""
    inputs, index = teacher_inputs(batch, positions)
    input_ids, index = inputs["input_ids"].cpu(), index.cpu()
    restarts = inputs.get("position_ids")  # packed rows: 0 at the first token of every sample
    offset = index % input_ids.shape[1] if restarts is None else restarts.flatten().cpu()[index]
    starts, group = (index - offset).unique(return_inverse=True)
    tokens = torch.cat([input_ids.flatten(), torch.zeros(1, dtype=torch.long)])  # so that a token follows the last one
    sample_id, sequence = batch["sample_id"].cpu(), positions.sequence.cpu()
    samples = []
    for number, start in enumerate(starts.tolist()):
        places = (group == number).nonzero()[:, 0]
        wanted = offset[places]
        end = start + int(wanted.max()) + (2 if follow else 1)
        row = Row(tokens=tokens[start:end].tolist(), wanted=wanted.tolist())
        # rows of another tokenisation have positions of their own, which say nothing about the sequence
        which = int(sequence[places[0]]) if len(index) == len(sequence) else start // input_ids.shape[1]
        samples.append(_Sample(sample_id=int(sample_id[which]), row=row, places=places))
    return samples


def _outside(logp: Tensor, *, everything: bool) -> Tensor:
    """log(1 - sum_k exp logp_k) [N], -inf where the k are ``everything``."""
    if everything:
        return logp.new_full((len(logp),), -torch.inf)
    return torch.log(-torch.expm1(logp.logsumexp(-1).clamp(max=0.0)))
