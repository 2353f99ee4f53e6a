"""The network of the DSpark head that DeepSeek-V4's DSpark checkpoints bring, over transformers' modules of that family.

It differs from the head of the paper (head.py) in its layers, which are the target's own kind: several residual streams mixed by
hyper-connections, one key head whose keys are the values too, a mixture of experts. A block sees exactly the last `window` tokens of its
context, and itself both ways. The confidence head reads the states before the final norm.

Shapes: N sequences, S context tokens, M tapped layers, G block size, D hidden, C residual streams, E head dim, V vocabulary, r Markov rank."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperHead,
    DeepseekV4PreTrainedModel,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
    apply_rotary_pos_emb,
)

from dspark.config import HeadConfig
from dspark.head.head import Head
from dspark.head.sequential import Vanilla
from dspark.target.target import Target


class Confidence(nn.Module):
    """As sequential.py's, without a bias and in float32."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size + config.markov_rank, 1, bias=False)

    def forward(self, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.cat([h.float(), w.float()], dim=-1), self.proj.weight.float())[..., 0]


class Modules(DeepseekV4PreTrainedModel):
    """All that has weights, as transformers loads it: `layers.k` in the names that a checkpoint has for decoder layers."""

    base_model_prefix = ""
    # As in the released code; transformers' own list says the same of norms, sinks and hyper-connections.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012  the name and form transformers reads
        *(DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict or []), "main_norm", "markov_head", "confidence_head",
    ]  # fmt: skip

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else none of transformers' renamings would be applied

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the family's experts can; transformers looks for them in this file's source

    def __init__(self, config: Any, head: HeadConfig):
        super().__init__(config)
        D, eps = config.hidden_size, config.rms_norm_eps
        self.main_proj = nn.Linear(len(head.target_layer_ids) * D, D, bias=False)
        self.main_norm = DeepseekV4RMSNorm(D, eps)
        self.layers = nn.ModuleList(DeepseekV4DecoderLayer(config, k) for k in range(head.num_hidden_layers))
        self.hc_head = DeepseekV4HyperHead(config)
        self.norm = DeepseekV4RMSNorm(D, eps)
        self.markov_head = Vanilla(head)
        self.confidence_head = Confidence(head)
        self.rotary_emb = DeepseekV4RotaryEmbedding(config)
        self.post_init()


class Before:
    """Stands for a layer's cache: the keys [N, 1, S, E] of the context come before those of the block, and nothing is kept."""

    def __init__(self, keys: torch.Tensor):
        self.keys = keys

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        all_keys = torch.cat([self.keys.to(keys.dtype), keys], dim=2)
        return all_keys, all_keys


class BundledHead(Head):
    """Drafts as any other head. It has no file of its own, and so is neither trained, saved nor converted.

    Its `hidden` gives the states before the norm, which its confidence head reads; `base_logits` applies it."""

    bundled = True

    def __init__(self, config: HeadConfig, modules: Any, target: Target):
        nn.Module.__init__(self)
        self.config, self.num_streams = config, modules.config.hc_mult
        self.fc, self.hidden_norm, self.layers = modules.main_proj, modules.main_norm, modules.layers
        self.hc_head, self.norm, self.rotary_emb = modules.hc_head, modules.norm, modules.rotary_emb
        self.markov_head, self.confidence_head = modules.markov_head, modules.confidence_head
        self.output = target.model.get_output_embeddings().__call__  # the target's own rows, not a copy
        mask = target.embed(torch.tensor(config.mask_token_id, device=target.device)).detach()
        self.register_buffer("mask_embedding", mask, persistent=False)
        self.register_buffer("draft_ids", torch.arange(config.vocab_size, device=target.device), persistent=False)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In float32, of the base that layers without compression have."""
        return self.rotary_emb(positions.float(), position_ids=positions, layer_type="main")

    def context_kv(self, features: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every layer's context keys [N, 1, S, E]; they are the values too, in whose place is nothing."""
        context, (cos, sin) = self.context(features), self.angles(positions)
        keys = []
        for layer in self.layers:
            attention = cast(DeepseekV4DecoderLayer, layer).self_attn
            keys.append(apply_rotary_pos_emb(attention.kv_norm(attention.kv_proj(context))[:, None], cos, sin))
        return [(k, k[..., :0]) for k in keys]

    def hidden(self, anchors_NAD: torch.Tensor, positions_NA: torch.Tensor, context_kv, visible_NAS=None) -> torch.Tensor:
        """As in head.py for one block (A = 1), and before the norm."""
        assert visible_NAS is None and positions_NA.shape[1] == 1, "several blocks at once are for training"
        N, _, D = anchors_NAD.shape
        G = self.config.block_size
        masks = self.mask_embedding.to(anchors_NAD.dtype).expand(N, G - 1, D)
        x = torch.cat([anchors_NAD, masks], dim=1)[:, :, None].repeat(1, 1, self.num_streams, 1)
        positions = positions_NA + torch.arange(G, device=positions_NA.device)
        angles = {"main": self.angles(positions)}
        for layer, (keys, _) in zip(self.layers, context_kv, strict=True):
            x = layer(x, position_embeddings=angles, position_ids=positions, attention_mask=None, past_key_values=Before(keys))
        return self.hc_head(x)[:, None]

    def base_logits(self, h: torch.Tensor) -> torch.Tensor:
        return self.output(self.norm(h))
