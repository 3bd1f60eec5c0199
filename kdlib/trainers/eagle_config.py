"""The options of training an EAGLE-3 head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kdlib.trainers.config import DistillationConfig


@dataclass
class EagleConfig(DistillationConfig):
    """DistillationConfig with the options of EAGLE-3.

    Args:
        learning_rate: peak learning rate; 1e-4 as SpecForge trains heads.
        ttt_steps: steps of the training-time test: how many tokens in a row the head learns to draft.
        step_decay: the weight of step j is step_decay ** j.
        draft_vocab_size: how many of the target's tokens the head can draft, the most frequent scored ones; null keeps all.
        feature_layers: three rising ids of the target's layers whose inputs are the features; null takes EAGLE's.
        head_overrides: entries of a new head's Eagle3Config to change, for example {norm_output: true}.
        features_dir: hidden states of the target made by kdlib.data.features, instead of running the target.
        export_format: what final/ is written in: speculators (vllm serve DIR works alone) or eagle.
        num_speculative_tokens: what the exported configuration asks to draft a round.
    """

    learning_rate: float = 1e-4
    ttt_steps: int = 7
    step_decay: float = 0.8
    draft_vocab_size: int | None = None
    feature_layers: list[int] | None = None
    head_overrides: dict[str, Any] | None = None
    features_dir: str | None = None
    export_format: Literal["speculators", "eagle"] = "speculators"
    num_speculative_tokens: int = 3

    def _refuse(self) -> None:
        super()._refuse()
        if self.ttt_steps < 1 or not 0 < self.step_decay <= 1 or self.num_speculative_tokens < 1:
            raise ValueError(
                f"ttt_steps {self.ttt_steps} and num_speculative_tokens {self.num_speculative_tokens} are at least 1, "
                f"step_decay {self.step_decay} is above 0 and at most 1"
            )
        if self.on_policy_fraction:
            raise ValueError(
                "an EAGLE-3 head drafts for its target alone: let the target write the rows (kdlib generate) first"
            )
        if self.packing:
            raise ValueError("packing would unroll one sample into the next: leave it out for an EAGLE-3 head")
        if self.from_scratch:
            raise ValueError("without a model an EAGLE-3 head is new; head_overrides change its shape: leave from_scratch out")
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant", False):
            raise ValueError("reentrant checkpointing loses the gradients of the unrolled keys: set use_reentrant false")
