"""The lm-eval model of masked diffusion language models; importing this module registers it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from kdlib.decoding.diffusion_decoder import DiffusionDecoder
from kdlib.decoding.strategies import LowConfidence
from kdlib.diffusion import check_diffusion, spec_of
from kdlib.eval.diffusion_config import decoder_with
from kdlib.eval.diffusion_counts import Counts
from kdlib.eval.diffusion_likelihood import Text, log_likelihoods
from kdlib.eval.models import DistilledLM, single_tokens
from kdlib.models import check_head, inner

Pair = tuple[Any, list[int], list[int]]  # lm-eval's request: (its texts, context tokens, continuation tokens)


@register_model("kdlib-diffusion")
class DiffusionLM(DistilledLM):
    """lm-eval's ``hf`` model for masked diffusion language models; adapters are accepted.

    ``generate_until`` decodes with ``kdlib.decoding.diffusion_decoder.DiffusionDecoder``, whose options (``gen_length`` to
    ``seed``) are arguments here; those left out are the model's own. A task's max_gen_toks takes the place of gen_length, its
    temperature and do_sample that of temperature. A row ends at the model's end tokens and at a stop string that is one token;
    what follows a longer stop string is cut as HFLM does, yet it was decoded and is counted. The results' ``config`` has the
    ``decoder``: its options, answers, ``tokens`` (before the end token), ``forwards`` (passes of each answer, added up),
    ``tokens_per_forward``, the ratio of both sums (None when nothing was generated), and seconds.

    ``loglikelihood`` and ``loglikelihood_rolling`` estimate the bound of ``kdlib.eval.diffusion_likelihood`` with
    ``mc_samples`` masks, one for a continuation of one token, where it is exact; the results' ``config`` says so under
    ``likelihood``. ``check_greedy``: whether is_greedy is found out, by decoding the continuation token by token; else False.

    Raises ValueError for a model that is no masked diffusion model, and for generation options that the decoder does not have.
    """

    def __init__(self, pretrained: Any, *, mc_samples: int = 128, check_greedy: bool = False, **arguments: Any) -> None:
        ours = {field.name for field in fields(DiffusionDecoder)}
        given = {name: value for name, value in arguments.items() if name in ours}
        super().__init__(pretrained, **{name: value for name, value in arguments.items() if name not in ours})
        config = inner(self.model).config
        self.spec, self.mc_samples, self.check_greedy = spec_of(config), mc_samples, check_greedy
        check_diffusion(self.model, self.spec)
        check_head(self.model, role="model")
        self.decoder = decoder_with(config, given)
        self.counted, self._expected = Counts(), 0

    @property
    def max_gen_toks(self) -> int:
        """Of a task that does not say."""
        return self.decoder.gen_length

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._expected = len(self.counted.tokens) + len(requests)
        answers: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return answers

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], *, attention_mask: Tensor, **generation: Any
    ) -> Tensor:
        room = max_length - context.shape[1]
        decoder = replace(self.decoder, gen_length=room, temperature=_temperature(generation, default=self.decoder.temperature))
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(context, attention_mask, strict=True)]
        answers = context.new_full((len(prompts), room), self.tokenizer.pad_token_id)
        start = time.perf_counter()
        with self._precision():
            stops = self._stop_ids(stop)
            for rows, output in decoder.decode(self.model, prompts, spec=self.spec, batch_size=len(prompts), stop_ids=stops):
                new = output.sequences[:, -room:]
                behind = torch.arange(room, device=new.device) >= output.lengths.to(new.device)[:, None]
                answers[rows] = new.masked_fill(behind, self.tokenizer.pad_token_id).to(answers.device)
                self.counted.add(output)
        self.counted.took(time.perf_counter() - start, expected=self._expected)
        return torch.cat([context, answers], dim=1)

    def _precision(self) -> torch.autocast:
        """HFLM's own."""
        return torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )

    def _stop_ids(self, stop: list[str]) -> list[int]:
        """The model's end tokens and the stop strings that are one token."""
        own = () if self.spec.eos_token_id is None else (self.spec.eos_token_id,)
        return list(dict.fromkeys([*own, *single_tokens(self.tokenizer, stop)]))

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        texts = [_text(context, continuation, longest=self.max_length) for _, context, continuation in requests]
        with torch.no_grad(), self._precision():
            found = log_likelihoods(
                self.model,
                texts,
                spec=self.spec,
                vocab_size=len(self.tokenizer),
                samples=self.mc_samples,
                batch_size=override_bs or self._rows(),
                seed=self.decoder.seed,
                desc=None if disable_tqdm else "Running loglikelihood requests",
            )
            greedy = self._greedy(texts) if self.check_greedy else [False] * len(texts)
        answers = list(zip(found.tolist(), greedy, strict=True))
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def _rows(self) -> int:
        if not isinstance(self.batch_size, int):
            raise ValueError("likelihoods of a diffusion model need a batch_size in numbers, not auto")
        return self.batch_size

    def _greedy(self, texts: Sequence[Text]) -> list[bool]:
        """Whether filling the scored tokens one by one, the most confident first, gives the text."""
        found = [False] * len(texts)
        for length in {len(text.scored) for text in texts}:
            rows = [row for row, text in enumerate(texts) if len(text.scored) == length]
            prompts = [texts[row].ids[:-length] for row in rows]
            decoder = DiffusionDecoder(gen_length=length, block_length=length, strategy=LowConfidence(steps=length))
            for some, output in decoder.decode(self.model, prompts, spec=self.spec, batch_size=self._rows(), stop_ids=[]):
                for one, ids in zip(some, output.sequences[:, -length:].tolist(), strict=True):
                    found[rows[one]] = ids == texts[rows[one]].ids[-length:]
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Sums over windows of max_length - 1 tokens behind the prefix token: a bound too."""
        found = []
        for request in requests:
            (string,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), found[-1])
        return found

    def get_model_info(self) -> dict[str, Any]:
        return super().get_model_info() | {
            "decoder": {**self.decoder.to_json(), **self.counted.to_json()},
            "likelihood": {"mc_samples": self.mc_samples, "what": "Monte-Carlo estimate of a lower bound"},
            "diffusion": asdict(self.spec),
        }


def _temperature(generation: Mapping[str, Any], *, default: float) -> float:
    """Of a task's generation options as lm-eval normalises them: its do_sample false comes with temperature 0."""
    if more := sorted(set(generation) - {"do_sample", "temperature"}):
        raise ValueError(f"the diffusion decoder has no {', '.join(more)}: drop it from gen_kwargs")
    if "temperature" in generation:
        return float(generation["temperature"])
    return default or 1.0 if generation.get("do_sample") else default


def _text(context: list[int], continuation: list[int], *, longest: int) -> Text:
    """The end of both that fits into the context window, which a continuation may not fill."""
    if len(continuation) >= longest:
        raise ValueError(f"a continuation of {len(continuation)} tokens does not fit into max_length {longest}: raise it")
    ids = [*context, *continuation][-longest:]
    return Text(ids=ids, scored=list(range(len(ids) - len(continuation), len(ids))))
