"""The parallel backbone: draft layers whose keys and values include the target's features (paper eq. 3).

Shapes: N sequences, A blocks, R draft rows of all blocks, S context tokens, D hidden, H query heads, K key heads, E head dim.
Qwen3 layers in DeepSpec's names, whatever the target's family (formats.md, section 5)."""

import torch
import torch.nn.functional as F
from torch import nn

from dspark.config import HeadConfig, Sizes


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In the weight's precision, which under autocast is not that of x: torch has no kernel for two of them.
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Rotary:
    """Rotary angles for any position; computed in float32."""

    def __init__(self, config: Sizes):
        E = config.head_dim
        # Numbers, where parameters are only shapes yet (the meta device): there is nothing to load them from.
        self.inverse = config.rope_theta ** (-torch.arange(0, E, 2, dtype=torch.float32, device="cpu") / E)

    def move(self, device: torch.device) -> None:
        """Once, not in every pass."""
        if self.inverse.device != device:
            self.inverse = self.inverse.to(device)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of shape [..., 1, T, E], ready to meet [..., heads, T, E]."""
        self.move(positions.device)
        angles = positions[..., None].float() * self.inverse
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(-3)
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = angles
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    """`num_inputs` numbers come in for each token (default: a hidden state); `normed` says whether queries and keys pass a norm."""

    def __init__(self, config: Sizes, num_inputs: int | None = None, normed: bool = True):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        inputs = num_inputs or D
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, E
        self.q_proj = nn.Linear(inputs, self.num_heads * E, bias=False)
        self.k_proj = nn.Linear(inputs, self.num_kv_heads * E, bias=False)
        self.v_proj = nn.Linear(inputs, self.num_kv_heads * E, bias=False)
        self.o_proj = nn.Linear(self.num_heads * E, D, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(E, config.rms_norm_eps) if normed else nn.Identity() for _ in range(2))

    def queries(self, x: torch.Tensor, angles) -> torch.Tensor:
        """[N, T, inputs] -> queries [N, H, T, E]."""
        shape = (*x.shape[:-1], self.num_heads, self.head_dim)
        return rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), angles)

    def keys_values(self, x: torch.Tensor, angles) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, T, inputs] -> keys and values [N, K, T, E]; the same projections serve context and block."""
        shape = (*x.shape[:-1], self.num_kv_heads, self.head_dim)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), angles)
        return k, self.v_proj(x).view(shape).transpose(1, 2)

    def forward(self, x, angles, context_kv, visible=None):
        q = self.queries(x, angles)
        parts = [self.for_each_head(part) for part in (*context_kv, *self.keys_values(x, angles))]
        context_k, context_v, k, v = (part.to(parts[-1].dtype) for part in parts)
        q = q.to(v.dtype)
        if visible is None:
            out = F.scaled_dot_product_attention(q, torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2))
        else:
            out = packed_attention(q, context_k, context_v, k, v, visible)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def for_each_head(self, part: torch.Tensor) -> torch.Tensor:
        """Keys or values [N, K, T, E] -> [N, H, T, E]. SDPA's own enable_gqa takes a slow path on CPUs."""
        groups = self.num_heads // self.num_kv_heads
        return part.repeat_interleave(groups, dim=1) if groups > 1 else part


def packed_attention(q, context_k, context_v, k, v, visible_NAS: torch.Tensor) -> torch.Tensor:
    """Many blocks of one sequence at once: a row sees its anchor's visible context, and its own block only.

    One softmax over two products, context and own block. A mask over all rows would spend most of its
    products on other blocks, and SDPA's backward pass with a mask cost three times this on a CPU."""
    N, A, S = visible_NAS.shape
    blocks = (N, q.shape[1], A, -1, q.shape[-1])
    q = q * q.shape[-1] ** -0.5
    own_scores = own_products(q.view(blocks), k.view(blocks))
    scores = (q @ context_k.transpose(-1, -2)).view(*own_scores.shape[:-1], S)
    scores = scores.masked_fill(~visible_NAS[:, None, :, None], float("-inf"))
    G = own_scores.shape[-1]
    if q.device.type == "cuda":  # rows of 16 bytes and multiples of it: its matrix products are slow with others
        own_scores = F.pad(own_scores, (0, -G % 8), value=float("-inf"))
    weights = torch.cat([scores, own_scores], dim=-1).softmax(-1, dtype=torch.float32).to(v.dtype)
    return weights[..., :S].flatten(2, 3) @ context_v + own_sums(weights[..., S : S + G], v.view(blocks)).flatten(2, 3)


def own_products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q @ k.T of each block. On a GPU not as matrix products: tens of thousands of tiny ones are slow there."""
    return (q[..., :, None, :] * k[..., None, :, :]).sum(-1) if q.device.type == "cuda" else q @ k.transpose(-1, -2)


def own_sums(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """weights @ v of each block."""
    return (weights[..., :, :, None] * v[..., None, :, :]).sum(-2) if v.device.type == "cuda" else weights @ v


class MLP(nn.Module):
    def __init__(self, config: Sizes):
        super().__init__()
        D, W = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(D, W, bias=False), nn.Linear(D, W, bias=False)
        self.down_proj = nn.Linear(W, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: HeadConfig):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, angles, context_kv, visible=None):
        x = x + self.self_attn(self.input_layernorm(x), angles, context_kv, visible)
        return x + self.mlp(self.post_attention_layernorm(x))
