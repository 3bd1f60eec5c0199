"""EAGLE-3 draft heads: one decoder layer that reads the target's hidden states and drafts token by token.

Shapes: B batch, S sequence, n new positions, D draft width, Dt target width, V target vocabulary, DV draft vocabulary. The
computation is vLLM's (model_executor/models/llama_eagle3.py), so that what is trained here is what is served there.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from kdlib.drafts.eagle3_config import FEATURES, Eagle3Config
from kdlib.drafts.vocabulary import DraftVocabulary
from kdlib.head import Head, accumulation_dtype


class _Attention(LlamaAttention):
    """Llama's attention over inputs of width 2D; ``unrolled`` attends as a chain of drafts would."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(2 * config.hidden_size, getattr(self, name).out_features, bias=False))

    def unrolled(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], earlier: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Step j for all positions at once: [B, S, 2D] -> [B, S, D], and the keys and values of steps 0..j.

        Position t sees step 0 up to t and of steps 1..j its own, which are the keys that a chain from t would have cached.
        """
        B, S, _ = hidden.shape
        split = (B, S, -1, self.head_dim)
        q, k, v = (projection(hidden).view(split).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        q = q.unflatten(1, (k.shape[1], -1))  # [B, heads of k, group, S, d]
        cache = [*earlier, (k.unsqueeze(2), v.unsqueeze(2))]
        (first_k, first_v), own = cache[0], cache[1:]
        unseen = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
        scores = [(q @ first_k.transpose(-1, -2)).masked_fill(unseen, -torch.inf)]
        scores += [(q * own_k).sum(-1, keepdim=True) for own_k, _ in own]
        weights = (torch.cat(scores, -1) * self.scaling).softmax(-1, dtype=accumulation_dtype(q)).to(v.dtype)
        mixed = weights[..., :S] @ first_v
        for i, (_, own_v) in enumerate(own):
            mixed = mixed + weights[..., S + i, None] * own_v
        return self.o_proj(mixed.flatten(1, 2).transpose(1, 2).reshape(B, S, -1)), cache


class _Layer(nn.Module):
    """Attention over cat[norm(embedding), norm(h)], then the MLP; the residual stream is that of h."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = _Attention(config)
        self.mlp = LlamaMLP(config)
        norm = partial(LlamaRMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = norm(), norm(), norm()

    def inputs(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads [B, n, 2D], and the residual [B, n, D]."""
        normed = self.hidden_norm(hidden)
        return torch.cat([self.input_layernorm(embedded), normed], -1), normed if self.norm_before_residual else hidden

    def outputs(self, attended: Tensor, residual: Tensor) -> Tensor:
        residual = residual + attended
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Eagle3Draft(PreTrainedModel):
    """An EAGLE-3 head: features [B, S, 3 Dt] -> fc -> one layer -> norm -> lm_head over the draft's vocabulary.

    At position t it reads the target's features of t and the embedding of x_{t+1}, and predicts x_{t+2}; each further step
    reads its own hidden state instead of features. Embeddings are the target's, frozen, and saved only with ``own_embeddings``.
    """

    config_class = Eagle3Config
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        D, Dt = config.hidden_size, config.target_hidden_size
        assert Dt is not None and config.draft_vocab_size is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.input_norm = LlamaRMSNorm(FEATURES * Dt, eps=config.rms_norm_eps) if config.norm_before_fc else None
        norms = [LlamaRMSNorm(Dt, eps=config.rms_norm_eps) for _ in range(FEATURES)]
        self.fc_norm = nn.ModuleList(norms) if config.fc_norm else None
        self.fc = nn.Linear(FEATURES * Dt, D, bias=False)
        self.layers = nn.ModuleList([_Layer(config)])  # a list for the names of its tensors
        self.norm = LlamaRMSNorm(D, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(D, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)
        self.gradient_checkpointing = False
        self.post_init()
        self.embed_tokens.requires_grad_(False)
        if not config.own_embeddings:
            self._keys_to_ignore_on_save = {"embed_tokens.weight"}

    @staticmethod
    def for_target(
        config: Eagle3Config, *, embeddings: Tensor, head: Head, vocabulary: DraftVocabulary | None = None
    ) -> Eagle3Draft:
        """A new float32 head for a target with these ``embeddings`` [V, Dt] and this ``head``.

        Where the widths are equal its lm_head starts as the target's rows for the draft's vocabulary.
        """
        draft = Eagle3Draft(config).to(torch.float32)
        if vocabulary is not None:
            draft.set_vocabulary(vocabulary)
        if not config.own_embeddings:
            draft.share_embeddings(embeddings)
        if head.weight.shape[1] == config.hidden_size:
            with torch.no_grad():
                draft.lm_head.weight.copy_(head.weight[draft.vocabulary.ids.to(head.weight.device)])
        return draft

    @property
    def layer(self) -> _Layer:
        found = self.layers[0]
        assert isinstance(found, _Layer)
        return found

    @property
    def vocabulary(self) -> DraftVocabulary:
        """Which of the target's tokens the head can draft."""
        return DraftVocabulary.of_maps(self.d2t, self.t2d, vocab_size=self.config.vocab_size)

    def set_vocabulary(self, vocabulary: DraftVocabulary) -> None:
        """Takes d2t and t2d over; ValueError when the sizes are not the configuration's."""
        given, own = (len(vocabulary.ids), vocabulary.vocab_size), (self.config.draft_vocab_size, self.config.vocab_size)
        if given != own:
            raise ValueError(f"the vocabulary has {given[0]} of {given[1]} tokens, the head {own[0]} of {own[1]}")
        self.d2t.copy_(vocabulary.d2t)
        self.t2d.copy_(vocabulary.t2d)

    @torch.no_grad()
    def share_embeddings(self, embeddings: Tensor) -> None:
        """A copy of the target's embeddings [V, D]; ValueError when the width differs, which takes ``own_embeddings``."""
        if embeddings.shape != self.embed_tokens.weight.shape:
            raise ValueError(
                f"the target's embeddings are {tuple(embeddings.shape)}, the head reads "
                f"{tuple(self.embed_tokens.weight.shape)}: give the head the target's hidden_size and vocabulary"
            )
        self.embed_tokens.weight.copy_(embeddings)

    def fuse(self, features: Tensor) -> Tensor:
        """[B, S, 3 Dt] the target's hidden states side by side, in the order of ``feature_layers`` -> [B, S, D]."""
        features = features.to(self.fc.weight.dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = zip(self.fc_norm, features.chunk(FEATURES, -1), strict=True)
            features = torch.cat([norm(part) for norm, part in parts], -1)
        return self.fc(features)

    def step(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        *,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One forward over n new positions: (hidden for the head, hidden to feed back), both [B, n, D].

        hidden [B, n, D]: ``fuse(features)`` of positions t, or what the step before fed back. input_ids [B, n]: the tokens
        x_{t+1}. position_ids [B, n]: t. attention_mask [B, cached + n]: 0 for what is not to be seen. cache: holds the layer's
        keys and values, and grows by n.
        """
        layer, embedded = self.layer, self.embed_tokens(input_ids)
        mask = create_causal_mask(self.config, embedded, attention_mask, cache, position_ids)
        read, residual = layer.inputs(embedded, hidden)
        rotary = self.rotary_emb(read, position_ids)
        attended, _ = layer.self_attn(read, rotary, mask, cache, position_ids=position_ids)
        return self._finish(layer.outputs(attended, residual))

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """Logits [B, S, DV] of the first step at every position: from features of t and x_{t+1}, for x_{t+2}.

        The last position reads no token of its own and means nothing.
        """
        return self.lm_head(self.unroll(features, input_ids, steps=1)[0])

    def unroll(self, features: Tensor, input_ids: Tensor, *, steps: int) -> list[Tensor]:
        """Training-time test: ``steps`` hidden states [B, S, D] for the head; step j at t is that of a chain drafted from t.

        features [B, S, 3 Dt], input_ids [B, S], right-padded: causality alone hides the padding. Step j at t reads
        x_{t+1+j} and the hidden state of step j - 1 at t (step 0: the features), and predicts x_{t+2+j}: positions with
        t + 1 + j >= S mean nothing.
        """
        fed, cache, found = self.fuse(features), [], []  # type: ignore[var-annotated]
        for j in range(steps):
            embedded = self.embed_tokens(input_ids.roll(-1 - j, 1))
            positions = torch.arange(j, j + input_ids.shape[1], device=input_ids.device)[None]
            if self.gradient_checkpointing and self.training:
                last, fed, cache = self._gradient_checkpointing_func(self._unrolled_step, fed, embedded, positions, cache)
            else:
                last, fed, cache = self._unrolled_step(fed, embedded, positions, cache)
            found.append(last)
        return found

    def _unrolled_step(
        self, fed: Tensor, embedded: Tensor, positions: Tensor, cache: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        read, residual = self.layer.inputs(embedded, fed)
        attended, cache = self.layer.self_attn.unrolled(read, self.rotary_emb(read, positions), cache)
        return *self._finish(self.layer.outputs(attended, residual)), cache

    def _finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(hidden)
        return normed, normed if self.config.norm_output else hidden
