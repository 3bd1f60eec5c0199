"""DraftTrainer: AdaSPEC's choice of rows, and the tokens each model has read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdlib.objectives import ForwardKL, ReverseKL, SelectiveKL, Sum
from kdlib.serving import ServerAwayError
from kdlib.teachers import HFTeacher
from kdlib.trainers import DraftTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.small import ROWS, TEXTS, V, logged, settings, trainer_of

REFERENCE = 2  # seed of its weights


def draft_trainer(directory: Path, *, objective: Any, config: dict[str, Any] | None = None, **given: Any) -> DraftTrainer:
    arguments = {
        "reference": tiny_llama(V, seed=REFERENCE) if isinstance(objective, SelectiveKL) else None,
        "train_dataset": ROWS,
        "processing_class": tiny_tokenizer(),
        **given,
    }
    target = arguments.pop("target", tiny_llama(V, seed=1))
    return DraftTrainer(tiny_llama(V), target, objective=objective, args=settings(directory, **(config or {})), **arguments)


def row_losses(seed: int, texts: list[str]) -> torch.Tensor:
    """KL(p || q) of every scored position, one text at a time, in float64; ``seed`` makes q, 1 makes p."""
    tokenizer, found = tiny_tokenizer(), []
    q, p = tiny_llama(V, seed=seed).double().eval(), tiny_llama(V, seed=1).double().eval()
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logp, logq = (m(input_ids=ids).logits[0, :-1, : len(tokenizer)].log_softmax(-1) for m in (p, q))
        found.append((logp.exp() * (logp - logq)).sum(-1))
    return torch.cat(found)


@pytest.mark.parametrize(("fraction", "normalize"), [(0.4, "kept"), (0.25, "all"), (1.0, "kept")])
def test_the_rows_with_most_to_gain_are_chosen_over_the_whole_step(tmp_path: Path, fraction: float, normalize: Any) -> None:
    """The whole data set is one step of 6 micro-batches of 4 rows."""
    draft, reference = row_losses(0, TEXTS), row_losses(REFERENCE, TEXTS)
    delta = draft - reference
    kept = delta >= delta.quantile(1 - fraction, interpolation="higher")
    assert fraction == 1.0 or 0 < int(kept.sum()) < len(kept)
    expected = float(draft[kept].sum()) / (int(kept.sum()) if normalize == "kept" else len(kept))
    objective = SelectiveKL(fraction=fraction, normalize=normalize)
    trainer = draft_trainer(tmp_path, objective=objective, config={"gradient_accumulation_steps": 6})
    trainer.train()
    assert logged(trainer, "scored_tokens") == [int(kept.sum())]
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-4)


def test_everything_kept_is_plain_distillation(tmp_path: Path) -> None:
    config = {"max_steps": 3}
    whole = draft_trainer(tmp_path / "all", objective=SelectiveKL(fraction=1.0), config=config)
    plain = trainer_of(tmp_path / "plain", objective=ForwardKL(), config=config)
    whole.train()
    plain.train()
    assert logged(whole) == pytest.approx(logged(plain), rel=1e-6)


def test_the_choice_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    losses = []
    for size, accumulation in ((8, 1), (2, 4)):
        config = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        trainer = draft_trainer(tmp_path / str(size), objective=SelectiveKL(), config=config)
        trainer.train()
        losses.append((logged(trainer), logged(trainer, "grad_norm")))
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_evaluation_scores_all_rows(tmp_path: Path) -> None:
    trainer = draft_trainer(tmp_path, objective=SelectiveKL(fraction=0.1), eval_dataset=ROWS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(row_losses(0, TEXTS).mean()), rel=1e-4)


def test_tokens_of_every_model_are_counted(tmp_path: Path) -> None:
    """A step of 4 rows: AdaSPEC reads them twice with the draft, once with target and reference."""
    selective = draft_trainer(tmp_path / "selective", objective=SelectiveKL())
    plain = draft_trainer(tmp_path / "plain", objective=ForwardKL())
    for trainer in (selective, plain):
        trainer.train()
    (seen,) = logged(plain, "seen_tokens")
    assert logged(plain, "draft_tokens") == logged(plain, "target_tokens") == [seen] and seen > 0
    assert logged(selective, "draft_tokens") == [2 * seen] and logged(selective, "reference_tokens") == [seen]
    assert "reference_tokens" not in plain.state.log_history[0]


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_rollouts_count_for_who_writes_them(tmp_path: Path, source: str) -> None:
    rows = [{"prompt": text[:20], "completion": "."} for text in TEXTS]
    config = {"on_policy_fraction": 1.0, "max_completion_length": 5, "rollout_source": source}
    trainer = draft_trainer(tmp_path, objective=ReverseKL(), config=config, train_dataset=rows)
    trainer.train()
    (seen,), (written,) = logged(trainer, "seen_tokens"), logged(trainer, "generated_tokens")
    assert 4 <= written <= 20
    assert logged(trainer, "draft_tokens") == [seen + written * (source == "student")]
    assert logged(trainer, "target_tokens") == [seen + written * (source == "teacher")]


def test_a_target_that_went_away_stops_the_run_before_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(HFTeacher):
        """A teacher that is served until its second answer."""

        answers = 0

        def signal(self, *arguments: Any, **keywords: Any) -> Any:
            self.answers += 1
            if self.answers > 1:
                raise ServerAwayError("gone")
            return super().signal(*arguments, **keywords)

    monkeypatch.setattr("kdlib.trainers.scoring.VLLMTeacher", Away)
    trainer = draft_trainer(tmp_path, objective=SelectiveKL(), config={"max_steps": 3}, target=Away(tiny_llama(V, seed=1)))
    with pytest.raises(ServerAwayError, match="gone"):
        trainer.train()
    assert len(logged(trainer)) == 1 and (tmp_path / "checkpoint-1").is_dir()


class TestRefusals:
    def test_selection_without_reference(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="--reference"):
            draft_trainer(tmp_path, objective=SelectiveKL(), reference=None)

    def test_reference_without_selection(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="SelectiveKL alone"):
            draft_trainer(tmp_path, objective=ForwardKL(), reference=tiny_llama(V))

    def test_the_plain_trainer_selects_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="kdlib draft"):
            trainer_of(tmp_path, objective=SelectiveKL())
        with pytest.raises(ValueError, match="part of another objective"):
            trainer_of(tmp_path, objective=Sum(parts=((1.0, SelectiveKL()),)))
