"""The DSpark head: context, backbone, base logits, sequential head, confidence (paper section 3).

Rank 0 leaves the sequential head out and gives DFlash.

Shapes: N sequences, A anchors, G block size, S context tokens, M tapped layers, D hidden,
Vd draft vocabulary, r Markov rank."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from dspark.config import HeadConfig
from dspark.core.calibration import Calibration
from dspark.head.backbone import Layer, RMSNorm, Rotary
from dspark.head.sequential import KINDS, Confidence


@dataclass(frozen=True)
class SelfTest:
    """How a head drafts on its golden text here, and how it did when it was saved."""

    accepted: int  # tokens of the text that greedy rounds take from drafts
    tokens: int
    accepted_then: int

    @property
    def good(self) -> bool:
        """Another precision moves a few tokens; half of them is a head that does not fit."""
        return self.accepted >= self.accepted_then // 2

    def __str__(self) -> str:
        before = "" if self.accepted == self.accepted_then else f" ({self.accepted_then} when the head was saved)"
        return f"draft accepted {self.accepted} of {self.tokens} on the golden text{before}"


class Head(nn.Module):
    """Trained weights plus references to the target's frozen embedding and output rows.

    `draft_ids` [Vd] are the target ids the head can propose, ascending; the identity when Vd = V."""

    draft_ids: torch.Tensor
    output_rows: torch.Tensor
    mask_embedding: torch.Tensor
    calibration: Calibration | None = None  # of its confidences, once fitted
    self_test: SelfTest | None = None  # of the load
    bundled = False  # in its target's own checkpoint (bundle.py), and only read

    def __init__(self, config: HeadConfig, draft_ids: torch.Tensor, output_rows: torch.Tensor, mask_embedding: torch.Tensor):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.markov_head = KINDS[config.markov_head_type](config) if config.markov_rank else None
        self.confidence_head = Confidence(config) if config.enable_confidence_head else None
        self.rotary = Rotary(config)
        # Frozen, the target's: kept out of the state dict so that they are neither trained nor saved.
        self.register_buffer("draft_ids", draft_ids, persistent=False)
        self.register_buffer("output_rows", output_rows, persistent=False)
        self.register_buffer("mask_embedding", mask_embedding, persistent=False)

    @property
    def kind(self) -> str:
        return "dspark" if self.config.markov_rank else "dflash"

    @property
    def block_size(self) -> int:
        return self.config.block_size

    def context(self, features: torch.Tensor) -> torch.Tensor:
        """H_ctx = RMSNorm(W_c [H(l_1); ...; H(l_m)]) (eq. 2): [N, S, M, D] -> [N, S, D]."""
        return self.hidden_norm(self.fc(features.flatten(2)))

    def context_kv(self, features: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every layer's context keys and values [N, K, S, E]; computed once per accepted token."""
        context, angles = self.context(features), self.rotary(positions)
        return [cast(Layer, layer).self_attn.keys_values(context, angles) for layer in self.layers]

    def hidden(self, anchors_NAD: torch.Tensor, positions_NA: torch.Tensor, context_kv, visible_NAS=None) -> torch.Tensor:
        """Post-norm hidden states [N, A, G, D] of the blocks after the anchors (embeddings, positions).

        `visible_NAS` says which context each block may see; None with one block that sees it all."""
        N, A, D = anchors_NAD.shape
        G = self.config.block_size
        x = self.mask_embedding.to(anchors_NAD.dtype).expand(N, A, G - 1, D)
        x = torch.cat([anchors_NAD[:, :, None], x], dim=2).view(N, A * G, D)
        positions = (positions_NA[:, :, None] + torch.arange(G, device=positions_NA.device)).view(N, A * G)
        angles = self.rotary(positions)
        for layer, kv in zip(self.layers, context_kv, strict=True):
            x = layer(x, angles, kv, visible_NAS)
        return self.norm(x).view(N, A, G, D)

    def base_logits(self, h: torch.Tensor) -> torch.Tensor:
        """U: [..., D] -> [..., Vd]."""
        return F.linear(h, self.output_rows.to(h.dtype))

    def sequential(self, h: torch.Tensor, previous_ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Teacher-forced z and W1[x_prev], both [N, A, G, r], for blocks whose previous tokens are known."""
        if self.markov_head is None:
            return None, None
        w, state, z = self.markov_head.markov_w1(previous_ids), None, []
        if self.config.markov_head_type != "rnn":
            return self.markov_head.step(w, h, None)[0], w
        for k in range(w.shape[2]):
            z_k, state = self.markov_head.step(w[:, :, k], h[:, :, k], state)
            z.append(z_k)
        return torch.stack(z, dim=2), w

    def forward(
        self, h: torch.Tensor, previous_ids: torch.Tensor, detached_confidence: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft logits [N, A, G, Vd] and confidence logits [N, A, G] with the real previous tokens given."""
        z, w = self.sequential(h, previous_ids)
        logits = self.base_logits(h)
        if self.markov_head is not None and z is not None:
            logits = logits + self.markov_head.markov_w2(z)
        if detached_confidence:
            h, w = h.detach(), None if w is None else w.detach()
        return logits, None if self.confidence_head is None else self.confidence_head(h, w)
