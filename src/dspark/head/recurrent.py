"""Heads that draft a token a pass: one decoder layer, which reads its own last state and the token just drawn.

    mtp     a module for multi-token prediction as in DeepSeek-V3 (section 2.2, https://arxiv.org/abs/2412.19437): the layer reads
            eh_proj [norm(embedding); norm(state)], the first state is the target's last layer, the output rows are the target's
    eagle3  EAGLE-3 (https://arxiv.org/abs/2503.01840) in SpecForge's names: attention reads [norm(embedding); norm(state)], the first
            state joins three of the target's layers (fc), output rows of its own over the draft vocabulary

Slot t joins the state of token t with the embedding of token t+1 and says the law of token t+2; its position is t+1. A chain goes on in
the next slot with what the layer said, and sees the slots before it as the target's states left them. Training walks the same chain
with the real tokens (EAGLE-3's training-time test).

Shapes: N sequences, S slots of one, T slots of one pass, A chains (anchors), G steps of a chain (J after its first), M tapped layers, D hidden, H heads,
K key heads, E head dim, Vd draft vocabulary."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache

from dspark.config import RecurrentConfig
from dspark.head.backbone import MLP, Attention, RMSNorm, Rotary, packed_attention
from dspark.head.head import Head, SelfTest

PASS_ROWS = 1024  # slots of one pass at most: bounds the memory of a long text's first draft; any value says the same

# (queries [N, H, T, E], keys [N, K, T, E], values) of these slots -> what they attend to [N, H, T, E]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RecurrentLayer(nn.Module):
    """The decoder layer; its kinds differ in what it reads."""

    def __init__(self, config: RecurrentConfig, attention: Attention):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn, self.mlp = attention, MLP(config)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, eps), RMSNorm(D, eps)

    def read(self, embedded: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual [N, T, D] and input of the attention."""
        raise NotImplementedError

    @property
    def joint(self) -> tuple[RMSNorm, RMSNorm, nn.Linear | None]:
        """What `read` does, by its parts: the norms of embeddings and states, and what makes a residual of the two."""
        raise NotImplementedError

    def forward(self, embedded: torch.Tensor, state: torch.Tensor, angles: Any, attend: Attend) -> torch.Tensor:
        """Embeddings and states [N, T, D] -> states [N, T, D], before the norm."""
        x, normed = self.read(embedded, state)
        attended = attend(self.self_attn.queries(normed, angles), *self.self_attn.keys_values(normed, angles))
        x = x + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class MtpLayer(RecurrentLayer):
    def __init__(self, config: RecurrentConfig):
        super().__init__(config, Attention(config))
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)

    def read(self, embedded, state):
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(state.to(embedded.dtype))], dim=-1))
        return x, self.input_layernorm(x)

    @property
    def joint(self):
        return self.enorm, self.hnorm, self.eh_proj


class Eagle3Layer(RecurrentLayer):
    def __init__(self, config: RecurrentConfig):
        super().__init__(config, Attention(config, 2 * config.hidden_size, normed=False))
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def read(self, embedded, state):
        return state, torch.cat([self.input_layernorm(embedded), self.hidden_norm(state.to(embedded.dtype))], dim=-1)

    @property
    def joint(self):
        return self.input_layernorm, self.hidden_norm, None


class RecurrentHead(nn.Module):
    """A head of one layer. It drafts as the modules of a target's own checkpoint do, by the methods of `head/mtp.py: MtpHead`.

    `draft_ids` [Vd] are the target ids it can propose, ascending; `embed` is the target's input embedding."""

    num_modules = 1
    calibration = confidence_head = None  # it has no confidences
    self_test: SelfTest | None = None  # of the load
    draft_ids: torch.Tensor

    def __init__(self, config: RecurrentConfig, draft_ids: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor] | None):
        super().__init__()
        self.config = config
        self.embed: Any = embed
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.register_buffer("draft_ids", draft_ids, persistent=False)

    @property
    def kind(self) -> str:
        return self.config.kind

    @property
    def block_size(self) -> int:
        return self.config.block_size

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The target's layers that it reads."""
        return self.config.target_layer_ids

    @property
    def layer(self) -> RecurrentLayer:
        raise NotImplementedError

    def first_state(self, features: torch.Tensor) -> torch.Tensor:
        """What a chain begins with: [..., M, D] -> [..., D]."""
        raise NotImplementedError

    def context(self, features: torch.Tensor) -> torch.Tensor:
        """The first state as the layer reads it, behind a norm: what golden vectors compare first."""
        raise NotImplementedError

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """States behind the norm [..., D] -> [..., Vd]."""
        return F.linear(normed, self.rows.to(normed.dtype))

    @property
    def rows(self) -> torch.Tensor:
        """The output rows [Vd, D]."""
        raise NotImplementedError

    # Drafting, in the manner of MtpHead

    def start(self) -> DynamicCache:
        """An empty cache, which holds the keys and values of the slots that were read."""
        return DynamicCache()

    def hidden(self, features_TMD: torch.Tensor) -> torch.Tensor:
        return self.first_state(features_TMD.to(self.norm.weight.dtype))

    def run(
        self, k: int, hidden_TD: torch.Tensor, tokens: Sequence[int], slot: int, cache: DynamicCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append slots from `slot` on to the cache: their states [T, D], and logits [Vd] after the last of them."""
        assert k == 0 and slot == cache.get_seq_length(), f"slot {slot} after {cache.get_seq_length()}"
        device, parts = hidden_TD.device, []
        for begin in range(0, len(tokens), PASS_ROWS):
            end = min(begin + PASS_ROWS, len(tokens))
            embedded = self.embed(torch.tensor([list(tokens[begin:end])])).to(hidden_TD)
            angles = self.rotary(torch.arange(slot + begin + 1, slot + end + 1, device=device)[None])
            parts.append(self.layer(embedded, hidden_TD[None, begin:end], angles, self.cached(cache))[0])
        state_TD = torch.cat(parts)
        return state_TD, self.logits(self.norm(state_TD[-1])).float()

    def cached(self, cache: DynamicCache) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = (self.layer.self_attn.for_each_head(part) for part in cache.update(k, v, 0))
            T, S = q.shape[2], keys.shape[2]
            mask = None if T == 1 else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

        return attend

    def forget(self, k: int, num_slots: int, cache: DynamicCache) -> None:
        """Take the last slots out of the cache."""
        cast(Any, cache.layers[0]).crop(-num_slots)

    # Training

    def unroll(
        self,
        features_NSMD: torch.Tensor,
        embedded_NSD: torch.Tensor,
        next_NAJD: torch.Tensor,
        anchors_NA: torch.Tensor,
        visible_NAS: torch.Tensor,
    ) -> torch.Tensor:
        """States behind the norm [N, A, G, D] of the chains after the anchors (positions of tokens), the real tokens given.

        `embedded_NSD` are the embeddings of the token after each of S, `next_NAJD` of those after each anchor, one fewer than G;
        `visible_NAS` the slots before the anchor. A chain at anchor 0, which has no slot before it, says nothing."""
        S, device = features_NSMD.shape[1], features_NSMD.device
        context: list[torch.Tensor] = []

        def causal(q, k, v):
            context[:] = [self.layer.self_attn.for_each_head(part) for part in (k, v)]
            return F.scaled_dot_product_attention(q.to(v.dtype), context[0].to(v.dtype), context[1], is_causal=True)

        angles = self.rotary(torch.arange(1, S + 1, device=device)[None])
        all_NSD = self.layer(embedded_NSD, self.first_state(features_NSMD), angles, causal)
        slots_NA = (anchors_NA - 1).clamp_min(0)
        state_NAD = all_NSD.gather(1, slots_NA[..., None].expand(-1, -1, all_NSD.shape[-1]))
        states, own = [state_NAD], []  # type: tuple[list[torch.Tensor], list[list[torch.Tensor]]]

        def chained(q, k, v):
            own.append([self.layer.self_attn.for_each_head(part) for part in (k, v)])
            own_k, own_v = (torch.stack(parts, dim=3).flatten(2, 3) for parts in zip(*own, strict=True))
            context_k, context_v, own_k = (part.to(v.dtype) for part in (*context, own_k))
            return packed_attention(q.to(v.dtype), context_k, context_v, own_k, own_v, visible_NAS)

        for step in range(next_NAJD.shape[2]):
            angles = self.rotary(anchors_NA + step + 1)
            state_NAD = self.layer(next_NAJD[:, :, step], state_NAD, angles, chained)
            states.append(state_NAD)
        return self.norm(torch.stack(states, dim=2))


class Mtp(RecurrentHead):
    """`output_rows` are the target's for `draft_ids`: neither trained nor saved."""

    output_rows: torch.Tensor

    def __init__(self, config: RecurrentConfig, draft_ids: torch.Tensor, output_rows: torch.Tensor, embed: Any):
        super().__init__(config, draft_ids, embed)
        self.layers = nn.ModuleList([MtpLayer(config)])
        self.register_buffer("output_rows", output_rows, persistent=False)

    @property
    def layer(self) -> Any:
        return self.layers[0]

    def first_state(self, features: torch.Tensor) -> torch.Tensor:
        return features[..., -1, :]

    def context(self, features: torch.Tensor) -> torch.Tensor:
        return self.layer.hnorm(self.first_state(features))

    @property
    def rows(self) -> torch.Tensor:
        return self.output_rows


class Eagle3(RecurrentHead):
    """`output_rows` are where its own begin."""

    def __init__(self, config: RecurrentConfig, draft_ids: torch.Tensor, output_rows: torch.Tensor, embed: Any):
        super().__init__(config, draft_ids, embed)
        D = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * D, D, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.lm_head = nn.Linear(D, config.draft_vocab_size, bias=False)
        if output_rows.shape == self.lm_head.weight.shape:
            self.lm_head.weight.data.copy_(output_rows)

    @property
    def layer(self) -> Any:
        return self.midlayer

    def first_state(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc(features.flatten(-2))

    def context(self, features: torch.Tensor) -> torch.Tensor:
        return self.midlayer.hidden_norm(self.first_state(features))

    @property
    def rows(self) -> torch.Tensor:
        return self.lm_head.weight


NETWORKS: dict[str, type[Mtp] | type[Eagle3]] = {"mtp": Mtp, "eagle3": Eagle3}
AnyHead = Head | RecurrentHead
