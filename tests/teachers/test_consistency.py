"""Models of different tokenizers as one teacher: against a plain loop over rows, and where it is the main model alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import normalizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kdlib.objectives import ForwardKL
from kdlib.teachers import HFTeacher, leaves, resolve_teacher
from kdlib.teachers.consistency import ConsistencyEnsemble
from kdlib.teachers.voters import Spelled, Text, Voter
from kdlib.tokenizers import token_bytes
from kdlib.types import Positions, Support, TeacherSignal
from tests.teachers.fakes import collated, graded
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tokenizers.test_pieces import llama, wordpiece

MAIN, FINER, FINEST = tiny_tokenizer(), tiny_tokenizer(vocab_size=290), tiny_tokenizer(vocab_size=264)
BYTES = {id(tokenizer): token_bytes(tokenizer) for tokenizer in (MAIN, FINER, FINEST)}
TEXTS = ["Two and two make four.", "The sky is blue — isn't it?", "She had seven apples.", "and"]
K = 5


def teacher(tokenizer: PreTrainedTokenizerFast, *, seed: int, dtype: torch.dtype = torch.float64) -> HFTeacher:
    """A model with more entries than its tokenizer has tokens."""
    return HFTeacher(tiny_llama(len(tokenizer) + 8, seed=seed).to(dtype), tokenizer=tokenizer)


def ensemble(*tokenizers: PreTrainedTokenizerFast, **options: Any) -> ConsistencyEnsemble:
    main, *others = (teacher(tokenizer, seed=seed) for seed, tokenizer in enumerate(tokenizers))
    return ConsistencyEnsemble(main, others, **({"top_k": K} | options))


def row(
    text: str, *, tokenizer: PreTrainedTokenizerFast = MAIN, prompt: int = 2, sample: int = 0, bos: bool = True
) -> dict[str, Any]:
    """<bos> text <eos>, of which all is scored but the first ``prompt`` tokens."""
    ids = [*([tokenizer.bos_token_id] if bos else []), *tokenizer.encode(text), tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "sample_id": sample}


ROWS = [row(text, prompt=1 + i, sample=i) for i, text in enumerate(TEXTS)]


def asked(made: ConsistencyEnsemble | HFTeacher, rows: Sequence[dict[str, Any]], **options: Any) -> Tensor:
    batch, where = collated(list(rows), **options)
    return made.signal(batch, where).at(slice(None), 1.0).logp


def next_token(model: HFTeacher, ids: list[int]) -> Tensor:
    assert model.tokenizer is not None
    return model.model(input_ids=torch.tensor([ids])).logits[0, -1, : len(model.tokenizer)].softmax(-1)


def becomes(token: int, of: PreTrainedTokenizerFast) -> int | None:
    """The main's token with which a token of another byte-level tokenizer begins."""
    piece, known = BYTES[id(of)][token], BYTES[id(MAIN)]
    if piece in known:
        return known.index(piece)
    try:
        return MAIN.encode(piece.decode())[0]
    except UnicodeDecodeError:
        return None


def said(model: HFTeacher, prefix: bytes, text: str) -> tuple[dict[int, float], float] | None:
    """{main's token: p} of the model's K likeliest after ``prefix``, and the mass of the others; None without a boundary."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    read, spelled = [], b""
    for token in tokenizer.encode(text):
        if len(spelled) >= len(prefix):
            break
        read.append(token)
        spelled += BYTES[id(tokenizer)][token]
    if not read or spelled != prefix:
        return None
    p = next_token(model, read)
    found: dict[int, float] = {}
    for token in p.topk(K).indices.tolist():
        main = becomes(token, tokenizer)  # type: ignore[arg-type]
        if main is not None:
            found[main] = found.get(main, 0.0) + float(p[token])
    return (found, 1.0 - float(p.topk(K).values.sum())) if found else None


def score(d: float, kind: str, beta: float) -> float:
    return {
        "rbf": (math.exp(-beta * d) - math.exp(-beta)) / (1 - math.exp(-beta)),
        "linear": 1 - d,
        "power": (1 - d) ** 5,
        "none": 1.0,
    }[kind]


def entropy(values: list[float]) -> float:
    return -sum(v / sum(values) * math.log(v / sum(values)) for v in values if v > 0)


def mixture(p0: Tensor, others: list[tuple[dict[int, float], float]], *, kind: str, beta: float) -> Tensor:
    """The docstring's equations, one token after another."""
    support = list(dict.fromkeys([*p0.topk(K).indices.tolist(), *(token for found, _ in others for token in found)]))
    models = [[float(p0[v]) for v in support], *([found.get(v, 0.0) for v in support] for found, _ in others)]
    mean = [sum(column) / len(models) for column in zip(*models, strict=True)]
    scores = [[score(abs(p - m), kind, beta) for p, m in zip(model, mean, strict=True)] for model in models]
    weights = [sum(s) / (entropy(model) + 1e-12) for s, model in zip(scores, models, strict=True)]
    weights[0] = max(weights[0], sum(weights[1:]))
    weights = [w / sum(weights) for w in weights]
    tails = [1.0 - sum(models[0]), *(tail for _, tail in others)]
    mass = sum(w * tail for w, tail in zip(weights, tails, strict=True))
    p = p0 * mass / tails[0]
    for place, v in enumerate(support):
        factors = [1.0, *(s[place] * len(support) / sum(s) for s in scores[1:])]
        p[v] = sum(w * s * model[place] for w, s, model in zip(weights, factors, models, strict=True))
    return p / p.sum()


@pytest.mark.parametrize(("kind", "beta"), [("rbf", 2.0), ("rbf", 0.5), ("linear", 2.0), ("power", 2.0), ("none", 2.0)])
def test_it_is_the_mixture_that_its_equations_say(kind: str, beta: float) -> None:
    made = ensemble(MAIN, FINER, FINEST, consistency=kind, beta=beta)
    found, wanted, voices = asked(made, ROWS).exp(), [], []
    for text, given in zip(TEXTS, ROWS, strict=True):
        for end in (t for t, label in enumerate(given["labels"]) if label != -100):
            prefix = b"".join(BYTES[id(MAIN)][i] for i in given["input_ids"][1:end])
            others = [x for x in (said(model, prefix, text) for model in made.teachers[1:]) if x is not None]
            wanted.append(mixture(next_token(made.teachers[0], given["input_ids"][:end]), others, kind=kind, beta=beta))
            voices.append(len(others))
    assert {0, 2} <= set(voices)  # none stands after <bos>, as these tokenizers put none before a text
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-7)  # votes are float32


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_main_itself_as_assistant_it_is_the_main(temperature: float) -> None:
    main = teacher(MAIN, seed=3)
    batch, where = collated([row(text, sample=i, bos=False) for i, text in enumerate(TEXTS)])
    found, wanted = (x.signal(batch, where).sliced(len(MAIN)) for x in (ConsistencyEnsemble(main, [main, main]), main))
    assert found.support is Support.FULL and found.vocab_size == len(MAIN) and len(found) == len(wanted)
    of_both = [x.at(slice(None), temperature).logp for x in (found, wanted)]
    torch.testing.assert_close(of_both[0], of_both[1], rtol=1e-5, atol=1e-5)


def test_batch_padding_and_packing_change_nothing() -> None:
    made = ensemble(MAIN, FINER, FINEST)
    alone = torch.cat([asked(made, [given]) for given in ROWS])
    for options in ({}, {"pad_to_multiple_of": 64}, {"flatten": True}):
        torch.testing.assert_close(asked(made, ROWS, **options), alone, rtol=1e-5, atol=1e-6)


def test_rows_at_which_no_assistant_stands_are_the_mains_own() -> None:
    """The assistant has longer tokens, so that rows within them are not among its boundaries."""
    main, other = teacher(FINEST, seed=1), teacher(MAIN, seed=2)
    rows = [row(TEXTS[0], tokenizer=FINEST)]
    found, own = asked(ConsistencyEnsemble(main, [other]), rows), asked(main, rows)
    shared = {len("".join(MAIN.decode(MAIN.encode(TEXTS[0])[:n]))) for n in range(1, 30)}
    ends = [len(FINEST.decode(FINEST.encode(TEXTS[0])[:n])) for n in range(1, len(rows[0]["input_ids"]) - 1)]
    same = (found - own).abs().max(-1).values < 1e-9
    assert same.tolist() == [end not in shared for end in ends] and 2 < same.sum() < len(ends) - 2


class Certain(HFTeacher):
    """Says after each token that one token follows."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, says: int) -> None:
        super().__init__(tiny_llama(len(tokenizer)), tokenizer=tokenizer, vocab_size=len(tokenizer))
        self.says, self.read = says, Tensor()

    def signal(self, batch: Any, positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        self.read = batch["input_ids"]
        logits = torch.zeros(len(positions), len(self.tokenizer))  # type: ignore[arg-type]
        logits[:, self.says] = 20.0
        return TeacherSignal(logits=logits)


def test_an_assistant_that_puts_a_space_before_the_text_and_one_that_reads_parts_of_characters() -> None:
    tokenizer = llama()  # <s> ▁cat ▁cat s
    begin = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[begin])
    other = Certain(tokenizer, says=tokenizer.convert_tokens_to_ids("▁cat"))
    main = teacher(MAIN, seed=1)
    main.vocab_size = len(MAIN)
    text, ends = "cat cats", [0, 1, 3, 4, 7, 8]
    votes = Voter(other, main).votes(
        [Text(text=text, rows=torch.arange(6).numpy(), ends=torch.tensor(ends).numpy())], n=6, k=2, device=torch.device("cpu")
    )
    assert other.read.tolist() == [tokenizer.encode(text)]
    # at byte 0 it would be asked for a token with the space of its own, which is not in the text
    assert (votes.p.sum(-1) > 0.5).tolist() == [False, False, True, False, True, True]
    assert votes.ids[2, 0] == MAIN.encode(" cat")[0] and votes.ids[0].tolist() == [-1, -1]
    assert (votes.p.sum(-1) + votes.tail)[2] == pytest.approx(1.0, abs=0.05) and votes.tail[0] == 0.0
    batch, where = collated([row("aé", sample=1), row("né", sample=2)])
    where = where.kept(where.labels != MAIN.eos_token_id)
    spelled = [(x.text, x.ends.tolist()) for x in Spelled(MAIN).texts(batch, where)]
    assert spelled == [("aé", [1, 2]), ("né", [1, 2])]
    (cut,) = Spelled(MAIN).texts(*collated([{**row("né"), "input_ids": row("né")["input_ids"][:3], "labels": [-100, 5, 5]}]))
    assert cut.text == "n" and cut.ends.tolist() == [0, 1]


def test_an_assistant_reads_what_its_tokenizer_puts_before_a_text_and_not_what_it_puts_behind() -> None:
    tokenizer = tiny_tokenizer(vocab_size=290)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", "<|eos|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|bos|> $A <|eos|>", special_tokens=ends)
    other, main = Certain(tokenizer, says=2), teacher(MAIN, seed=1)
    batch, where = collated([row("and", prompt=1)])
    main.vocab_size = len(MAIN)
    votes = Voter(other, main).votes(list(Spelled(MAIN).texts(batch, where)), n=len(where), k=1, device=torch.device("cpu"))
    assert other.read.tolist() == [[1, *tokenizer.encode("and", add_special_tokens=False)]]
    assert votes.ids[[0, -1], 0].tolist() == [2, 2]  # after <bos>, and after the text


def test_special_tokens_within_a_text_are_read_as_they_are_written() -> None:
    text = "<|user|>Is it?<|assistant|>Yes"
    ids = MAIN.encode(text)
    batch, where = collated([{"input_ids": ids, "labels": [-100] * 5 + ids[5:], "sample_id": 0}])
    (found,) = Spelled(MAIN).texts(batch, where)
    assert found.text == "Is it?<|assistant|>Yes"
    assert found.ends.tolist() == [len(MAIN.decode(ids[1:n]).encode()) for n in range(5, len(ids))]


def test_an_assistant_is_left_out_where_its_tokenizer_changes_the_text(caplog: pytest.LogCaptureFixture) -> None:
    lower = tiny_tokenizer(vocab_size=290)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    main, other = teacher(MAIN, seed=1), teacher(lower, seed=2)
    made, rows = ConsistencyEnsemble(main, [other]), [row("The sky"), row("the sky")]
    with caplog.at_level(logging.WARNING, logger="kdlib"):
        found = asked(made, rows)
    assert len(caplog.records) == 1 and "left out of the ensemble" in caplog.text
    own = asked(main, rows)
    half = len(asked(main, rows[:1]))
    torch.testing.assert_close(found[:half], own[:half], rtol=0, atol=1e-9)
    assert (found[half:] - own[half:]).abs().max() > 1e-2


def test_rows_of_a_signal_and_its_loss() -> None:
    batch, where = collated(ROWS)
    signal = ensemble(MAIN, FINER).signal(batch, where)
    whole, n = signal.at(slice(None), 1.0).logp, len(where)
    torch.testing.assert_close(signal.view(slice(2, 9))[slice(1, 4)].at(1.0).logp, whole[3:6])
    keep = torch.arange(n) % 3 == 0
    torch.testing.assert_close(signal.kept(keep).at(slice(1, 5), 1.0).logp, whole[keep][1:5])
    assert len(signal.kept(keep)) == int(keep.sum())
    torch.testing.assert_close(signal.at(slice(0, 4), 3.0).logp, (whole[:4] / 3.0).log_softmax(-1))
    assert signal.sliced(40).at(slice(0, 4), 1.0).logp.shape == (4, 40)
    of = {"impl": "chunked", "n": n, "vocab": len(MAIN)}
    losses = [graded(ForwardKL(), x, **of)[0].sum.item() for x in (signal, TeacherSignal(logits=whole))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_batch_without_scored_rows() -> None:
    rows = [{**ROWS[0], "labels": [-100] * len(ROWS[0]["labels"])}]
    assert asked(ensemble(MAIN, FINER), rows).shape == (0, len(MAIN))


def test_from_a_mapping() -> None:
    main, other = teacher(MAIN, seed=1), teacher(FINER, seed=2)
    made = resolve_teacher({"ConsistencyEnsemble": {"teachers": [main, other], "top_k": 4, "consistency": "linear"}}, {})
    assert isinstance(made, ConsistencyEnsemble) and made.teachers == (main, other)
    assert (made.agreement.top_k, made.agreement.consistency, made.agreement.beta) == (4, "linear", 2.0)
    assert leaves(made) == (made,) and made.tokenizer is MAIN
    made.vocab_size = 50
    assert main.vocab_size == 50 and other.vocab_size == len(FINER)


PLAIN = teacher(MAIN, seed=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teachers": []}, "teachers is empty"),
        ({"teachers": [PLAIN]}, "at least two teachers"),
        ({"teachers": [PLAIN, "SelfTeacher"]}, "models in this process, SelfTeacher is none"),
        ({"teachers": [PLAIN, tiny_llama(30)]}, "needs the tokenizer of LlamaForCausalLM"),
        ({"teachers": [PLAIN, teacher(wordpiece(), seed=1)]}, "leave out the spaces between words"),
        ({"teachers": [PLAIN, PLAIN], "top_k": 0}, "between 1 and the smallest vocabulary's"),
        ({"teachers": [PLAIN, PLAIN], "top_k": len(MAIN) + 1}, "between 1 and the smallest vocabulary's"),
        ({"teachers": [PLAIN, PLAIN], "consistency": "cosine"}, "rbf, linear, power or none, not 'cosine'"),
        ({"teachers": [PLAIN, PLAIN], "beta": 0}, "beta must be above 0, not 0"),
        ({"teachers": [PLAIN, PLAIN], "weights": [1, 1]}, "takes teachers, top_k, consistency and beta, not teachers, weights"),
    ],
)
def test_what_makes_no_ensemble_is_told_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        resolve_teacher({"ConsistencyEnsemble": given}, {})
    assert "\n" not in str(error.value)


def test_layers_are_refused() -> None:
    batch, where = collated(ROWS)
    with pytest.raises(ValueError, match="single teacher"):
        ensemble(MAIN, FINER).signal(batch, where, (1,))
