"""The EAGLE trainer's steps against a plain computation by chains, and its invariances."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kdlib.data.features import write_features
from kdlib.drafts import formats
from kdlib.drafts.eagle3 import Eagle3Draft
from kdlib.drafts.eagle3_config import Eagle3Config
from kdlib.drafts.vocabulary import draft_vocabulary
from kdlib.head import Head
from kdlib.objectives import CrossEntropy, ForwardKL, ReverseKL, Sum
from kdlib.trainers.eagle import EagleConfig, EagleTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.small import ROWS, Gradients, V, logged, saved, settings_of

DV, STEPS, DECAY = 60, 3, 0.5


def target(dtype: torch.dtype = torch.float64) -> Any:
    return tiny_llama(V, layers=4, seed=1).to(dtype)


def draft_of(model: Any, counts: Tensor | None = None, size: int = DV) -> Eagle3Draft:
    config = Eagle3Config.of_target(model.config, draft_vocab_size=size)
    found = draft_vocabulary(torch.arange(V).flip(0) if counts is None else counts, size, vocab_size=V)
    torch.manual_seed(5)
    embeddings = model.get_input_embeddings().weight
    draft = Eagle3Draft.for_target(config, embeddings=embeddings, head=Head.of(model), vocabulary=found)
    return draft.to(embeddings.dtype)


def trainer_of(directory: Path, *, config: dict[str, Any] | None = None, rows: Any = ROWS, **given: Any) -> EagleTrainer:
    args = settings_of(EagleConfig, directory, **{"ttt_steps": STEPS, "step_decay": DECAY, **(config or {})})
    given = {"teacher": target(), "processing_class": tiny_tokenizer(), **given}
    return EagleTrainer(train_dataset=rows, args=args, **given)


def step_of_eight(directory: Path, **given: Any) -> tuple[EagleTrainer, dict[str, Tensor]]:
    gradients = Gradients()
    config = {"per_device_train_batch_size": 8, "max_grad_norm": 1e9} | given.pop("config", {})
    given = {"model": draft_of(target()), "rows": ROWS[:8], **given}
    trainer = trainer_of(directory, config=config, callbacks=[gradients], **given)
    trainer.train()
    return trainer, gradients.steps[0]


def plain(draft: Eagle3Draft, model: Any, rows: Any, kind: str = "forward") -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics by drafting chains from every prefix with a cache, whole logits and no chunks."""
    ids = draft.vocabulary.ids
    sums = {j: [torch.zeros((), dtype=torch.float64), 0, 0.0, 0] for j in range(STEPS)}  # loss, rows, acceptance, right
    for row in rows:
        x, labels = torch.tensor([row["input_ids"]]), row["labels"]
        with torch.no_grad():
            out = model(input_ids=x, output_hidden_states=True)
        features = torch.cat([out.hidden_states[i] for i in draft.config.feature_layers], -1)
        for t in range(x.shape[1] - 2):
            cache, position = DynamicCache(), torch.arange(t + 1)[None]
            last, fed = draft.step(draft.fuse(features[:, : t + 1]), x[:, 1 : t + 2], position_ids=position, cache=cache)
            for j in range(STEPS):
                if j and t + 1 + j < x.shape[1]:
                    token = x[:, t + 1 + j : t + 2 + j]
                    last, fed = draft.step(fed[:, -1:], token, position_ids=torch.tensor([[t + j]]), cache=cache)
                if t + 2 + j >= x.shape[1] or labels[t + 2 + j] == -100:
                    continue
                q = draft.lm_head(last[0, -1]).log_softmax(-1)
                z = out.logits[0, t + 1 + j]
                p, inside = z[ids].log_softmax(-1), bool((ids == z.argmax()).any())
                loss = (p.exp() * (p - q)).sum() if kind == "forward" else (q.exp() * (q - p)).sum()
                if kind == "labels":
                    place = (ids == labels[t + 2 + j]).nonzero()
                    loss = -q[place[0, 0]] if len(place) else q.sum() * 0
                sums[j][0] = sums[j][0] + (loss if inside else 0 * loss)
                sums[j][1] += 1
                sums[j][2] += float(torch.minimum(z.softmax(-1)[ids], q.detach().exp()).sum())
                sums[j][3] += int(ids[q.argmax()] == z.argmax())
    total = sum(DECAY**j * s[0] / s[1] for j, s in sums.items())
    metrics = {f"acceptance/step_{j}": s[2] / s[1] for j, s in sums.items()}
    return total, metrics | {f"accuracy/step_{j}": s[3] / s[1] for j, s in sums.items()}  # type: ignore[return-value]


def trained(draft: Eagle3Draft) -> dict[str, Tensor]:
    return {name: p for name, p in draft.named_parameters() if p.requires_grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("objective", "kind"), [(ForwardKL(), "forward"), (ReverseKL(), "reverse"), (CrossEntropy(), "labels")]
)
def test_a_step_is_that_of_chains_from_every_prefix(tmp_path: Path, objective: Any, kind: str) -> None:
    rows = [{"text": row["text"][:18]} for row in ROWS[:3]]
    trainer, found = step_of_eight(tmp_path, objective=objective, rows=rows)
    draft = draft_of(target())
    loss, metrics = plain(draft, target(), trainer.train_dataset, kind)
    assert logged(trainer) == [pytest.approx(loss.item(), rel=1e-6)]
    named = trained(draft)
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    assert_same(found, expected, tolerance=1e-5)
    for name, value in metrics.items():
        assert logged(trainer, name) == [pytest.approx(value, rel=1e-6)], name
    assert logged(trainer, "outside_draft_vocabulary")[0] > 0


@pytest.mark.parametrize(
    "shape",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"gradient_checkpointing": True},
    ],
)
def test_batches_padding_and_checkpointing_change_nothing(tmp_path: Path, shape: dict[str, Any]) -> None:
    whole, expected = step_of_eight(tmp_path / "a")
    parts, found = step_of_eight(tmp_path / "b", config=shape)
    for key in ("loss", "acceptance/step_0", "accuracy/step_2", "outside_draft_vocabulary", "scored_tokens"):
        assert logged(parts, key) == pytest.approx(logged(whole, key), rel=1e-6), key
    assert_same(found, expected, tolerance=1e-6)


def test_bfloat16_computes_about_the_same(tmp_path: Path) -> None:
    models = [draft_of(target(torch.float32)), draft_of(target(torch.float32))]
    full, half = (
        trainer_of(tmp_path, model=model, teacher=target(torch.float32), config={"bf16": bf16})
        for model, bf16 in zip(models, (False, True), strict=True)
    )
    full.train(), half.train()
    assert logged(half) == pytest.approx(logged(full), rel=0.02) and logged(half) != logged(full)


def test_prompts_are_not_scored_and_later_steps_score_fewer(tmp_path: Path) -> None:
    rows = [{"prompt": "two plus two", "completion": " is four, because"}]
    trainer = trainer_of(tmp_path, rows=rows)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    first = int((batch["labels"][0] != -100).nonzero()[0, 0])
    for j, (name, where) in enumerate(trainer.positions(batch).items()):
        assert name == f"step_{j}" and trainer.term_weight(name) == DECAY**j
        assert where.index.tolist() == [s - 2 - j for s in range(first, batch["labels"].shape[1])]
        assert where.labels.tolist() == batch["labels"][0, first:].tolist()
        assert where.teacher_index.tolist() == [s - 1 for s in range(first, batch["labels"].shape[1])]  # type: ignore[union-attr]
    short = trainer_of(tmp_path, rows=[{"text": "two plus two is four"}])
    batch = short.data_collator([short.train_dataset[0]])
    counts = [len(where) for where in short.positions(batch).values()]
    assert counts == [counts[0], counts[0] - 1, counts[0] - 2]


def test_a_whole_vocabulary_has_no_outside(tmp_path: Path) -> None:
    trainer, _ = step_of_eight(tmp_path, model=None, objective=Sum(parts=((0.5, ForwardKL()), (0.5, CrossEntropy()))))
    assert trainer.vocabulary.ids.tolist() == list(range(V))
    assert logged(trainer, "outside_draft_vocabulary") == []
    assert 0 < logged(trainer, "acceptance/step_0")[0] <= 1


def test_a_new_head_has_the_vocabulary_of_the_rows(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, config={"draft_vocab_size": 50, "feature_layers": [0, 2, 3]})
    scored = {token for row in trainer.train_dataset for token in row["labels"]} - {-100}
    ids = trainer.vocabulary.ids.tolist()
    assert len(ids) == 50 and scored <= set(ids)
    assert trainer.model.config.feature_layers == [0, 2, 3]
    assert torch.equal(trainer.model.lm_head.weight, target(torch.float32).lm_head.weight[ids])


def test_training_raises_the_acceptance_of_every_step(tmp_path: Path) -> None:
    config = {"max_steps": 40, "learning_rate": 1e-2, "logging_steps": 39}
    trainer = trainer_of(tmp_path, teacher=target(torch.float32), config=config)
    trainer.train()
    for j in range(STEPS):
        accepted = logged(trainer, f"acceptance/step_{j}")
        assert accepted[-1] > accepted[0] + 0.2
    assert logged(trainer, "acceptance/step_0")[-1] > logged(trainer, "acceptance/step_2")[-1]


def test_resuming_gives_the_same_weights(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trainer_of(tmp_path / "a", model=draft_of(target(torch.float32)), teacher=target(torch.float32), config=options)
    straight.train()
    again = trainer_of(tmp_path / "a", model=draft_of(target(torch.float32)), teacher=target(torch.float32), config=options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert logged(again) == logged(straight)
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_final_is_a_published_head_to_go_on_from(tmp_path: Path) -> None:
    name = saved(tmp_path / "target", target(torch.float32))
    config = {"draft_vocab_size": 50, "num_speculative_tokens": 2, "export_format": "eagle"}
    first = trainer_of(tmp_path / "a", teacher=name, processing_class=None, config=config)
    first.train()
    final = first.save_final(tmp_path / "final")
    loaded = formats.load(final, target(torch.float32))
    assert torch.equal(loaded.fc.weight, first.model.fc.weight)
    second = trainer_of(tmp_path / "b", model=str(final), teacher=name, processing_class=None, config={"max_steps": 2})
    assert torch.equal(second.model.vocabulary.ids, first.model.vocabulary.ids)
    assert torch.equal(second.model.embed_tokens.weight, first.model.embed_tokens.weight)
    second.train()
    second.args.export_format = "speculators"
    content = json.loads((second.save_final(tmp_path / "second") / "config.json").read_text())
    assert content["speculators_config"]["verifier"] == {"name_or_path": name, "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(ValueError, match="draft_vocab_size of the given head is 50"):
        trainer_of(tmp_path / "c", model=str(final), config={"draft_vocab_size": 60})


@pytest.mark.parametrize("kept", [50, None])
def test_features_from_disk_give_the_same_steps(tmp_path: Path, kept: int | None) -> None:
    config = {"max_steps": 3, "draft_vocab_size": kept}
    model = target(torch.float32)
    live = trainer_of(tmp_path / "a", teacher=model, config=config, eval_dataset=ROWS[:3])
    directory = write_features(
        tmp_path / "features", live.train_dataset, model, name="org/target", max_gib=1, tokenizer=tiny_tokenizer()
    )
    config |= {"features_dir": str(directory)}
    stored = trainer_of(tmp_path / "b", teacher=None, processing_class=None, config=config, eval_dataset=ROWS[:3])
    assert live.evaluate()["eval_loss"] == pytest.approx(stored.evaluate()["eval_loss"], rel=1e-5)
    live.train()
    stored.train()
    assert logged(stored) == pytest.approx(logged(live), rel=1e-4)
    assert stored.target.name == "org/target"


WORKER = """
import sys
from pathlib import Path
from tests.trainers.test_eagle import draft_of, target, trainer_of
model = target()
config = {"max_steps": 2, "per_device_train_batch_size": int(sys.argv[2])}
trainer = trainer_of(Path(sys.argv[1]), model=draft_of(model), teacher=model, config=config)
trainer.train()
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """The rows of a step split over two ranks: metrics.jsonl and thus loss, counts and gradient norm are those of one."""
    (tmp_path / "worker.py").write_text(WORKER)
    root = str(Path(__file__).parents[2])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    parallel = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = {}
    for name, launcher, size in (("one", [], "4"), ("two", parallel, "2")):
        command = [sys.executable, *launcher, str(tmp_path / "worker.py"), str(tmp_path / name), size]
        done = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert len(found["one"]) == len(found["two"]) == 2
    for one, two in zip(found["one"], found["two"], strict=True):
        for key in ("loss", "grad_norm", "scored_tokens", "acceptance/step_1", "outside_draft_vocabulary"):
            assert two[key] == pytest.approx(one[key], rel=1e-6), key


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"packing": True}, "packing"),
        ({"on_policy_fraction": 0.5}, "target alone"),
        ({"from_scratch": True}, "from_scratch"),
        ({"ttt_steps": 0}, "at least 1"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
        ({"feature_layers": [1, 2, 4]}, "distinct rising"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, config=config)


def test_targets_and_heads_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden states"):
        trainer_of(tmp_path, teacher=None)
    with pytest.raises(ValueError, match="target_hidden_size 32, the target 64"):
        wide = Eagle3Config.of_target(target().config, own_embeddings=True)
        trainer_of(tmp_path, model=Eagle3Draft(wide), teacher=tiny_llama(V, layers=4, hidden=64))
    with pytest.raises(ValueError, match="shares its target's embeddings"):
        trainer_of(tmp_path, config={"head_overrides": {"hidden_size": 16, "head_dim": 4, "own_embeddings": True}})
    with pytest.raises(ValueError, match="features_dir holds"):
        trainer_of(tmp_path, config={"features_dir": str(tmp_path)})
