"""The native runtime of a whole model: which models it runs, and score and roll-back through it.

Shapes: T rows, M tapped layers, D hidden, V vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from dspark.core.decode import Scored
from dspark.errors import RuntimeUnavailable
from dspark.target.native.build import compiled
from dspark.target.native.cache import Cache, Pool
from dspark.target.native.pages import gather_weights
from dspark.target.native.stack import NativeStack, Rows, passes
from dspark.target.quantize import is_int8
from dspark.target.taps import Tap

# Families whose layers are stack.cpp's: RMS norm, rotary attention with grouped keys (with biases, or norms of
# queries and keys), SiLU-gated MLP, and nothing besides.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
OTHER_PARTS = ("ModuleList", "Linear", "Embedding", "SiLUActivation", "SiLU")
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """What NativeStack wants to know of a config, whatever the family calls it."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float


def reason_against(model: Any) -> str | None:
    """Why this model cannot run natively; None if it can."""
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES:
        return f"{name} is not one of {', '.join(ARCHITECTURES)}"
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if model.dtype not in DTYPES:
        return f"weights are {model.dtype}"
    int8 = is_int8(model.lm_head.weight)
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if name == "MistralForCausalLM" else None
    if kinds != {"full_attention"} or window is not None:
        return "attention with a sliding window"
    shape = shape_of(model)
    sizes = {
        "hidden size": shape.hidden_size, "head size": shape.head_dim, "intermediate size": config.intermediate_size,
        "vocabulary": model.lm_head.weight.shape[0],
    }  # fmt: skip
    odd = [f"{name} of {size}" for name, size in sizes.items() if size % 16]
    if odd:
        return f"its sizes must be multiples of 16, and it has a {' and a '.join(odd)}"
    if model.model.rotary_emb.inv_freq.numel() * 2 != shape.head_dim:
        return "rotary positions on a part of each head"
    for path, module in model.named_modules():
        change = changed(module, name.removesuffix("ForCausalLM"))
        if change:
            return f"{path or 'the model'} {change}"
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for path, module in [*model.model.layers.named_modules(), ("lm_head", model.lm_head)]:
        if path.rsplit(".", 1)[-1] in (*projections, "lm_head") and not runs(module, model.dtype, int8):
            return f"{path} is a {type(module).__name__} with {type(getattr(module, 'weight', None)).__name__}"
    return "the LM head has a bias" if model.lm_head.bias is not None else None


def changed(module: Any, family: str) -> str | None:
    """How this module differs from the family's own, whose arithmetic stack.cpp repeats; None if it does not."""
    kind = type(module)
    own = (*OTHER_PARTS, *(family + part for part in PARTS))
    if kind.__name__ not in own or not kind.__module__.startswith(("torch.nn.", "transformers.")):
        return f"is a {kind.__name__}"
    if "forward" in module.__dict__:
        return "has a `forward` of its own"
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    # transformers' hooks and our taps record what passes, and change nothing.
    if any(not isinstance(hook, Tap) and not (hook.__module__ or "").startswith("transformers.") for hook in hooks):
        return "has a forward hook"
    return None


def runs(module: Any, dtype: torch.dtype, int8: bool) -> bool:
    """Is this a plain linear layer of the one kind that all layers have?"""
    if type(module) is not nn.Linear:
        return False
    return is_int8(module.weight) if int8 else type(module.weight) is nn.Parameter and module.weight.dtype == dtype


def shape_of(model: Any) -> Shape:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, head_dim, config.rms_norm_eps)


class Piece(NamedTuple):
    """Tokens of one request to score after `past` cached ones; logits of the last `num_logits` of them."""

    cache: Cache
    past: int
    tokens: Sequence[int]
    num_logits: int


class NativeRuntime:
    """Scores rows of a model through stack.cpp. Reads the model's own weights where they lie."""

    def __init__(self, model: Any, say: Callable[[str], None] = lambda text: None, gather: bool = False):
        """`gather` moves the weights into one block of memory first (pages.py): for a model nobody else holds.

        Raises `RuntimeUnavailable` for a model it cannot run, or a machine without a compiler."""
        reason = reason_against(model)
        if reason:
            raise RuntimeUnavailable(f"the native runtime cannot run this model: {reason}")
        compiled(say)
        if gather:
            gather_weights(model)
        self.model = model
        self.pool = Pool(0)
        self.start()

    def start(self) -> Cache:
        """A cache for one request, which sees the model as it is now: its weights may have been replaced or written to.

        Raises `RuntimeUnavailable` if it has become a model that cannot run natively."""
        reason = reason_against(self.model)
        if reason:
            raise RuntimeUnavailable(f"the native runtime can no longer run this model: {reason}")
        rotary = self.model.model.rotary_emb
        self.stack = NativeStack(
            shape_of(self.model), self.model.model.layers, self.model.model.norm, self.model.lm_head.weight,
            (rotary.inv_freq, float(rotary.attention_scaling)),
        )  # fmt: skip
        if self.pool.page_bytes != self.stack.page_bytes:  # the first time, or the model has another precision now
            self.pool = Pool(self.stack.page_bytes)
        return Cache(self.pool)

    def score(self, pieces: Sequence[Piece], taps: Sequence[int]) -> list[Scored]:
        """Rows of each request's `tokens` after its `past` cached ones: logits of its last `num_logits` rows, and the
        tapped states in the model's precision. Any number of tokens; a row's bits do not depend on those beside it."""
        inner = [tap for tap in taps if tap >= 0]
        # Rows without logits go first, so that those with logits are the last ones of a pass.
        silent = [Rows(p.cache, p.past, len(p.tokens) - p.num_logits) for p in pieces]
        heard = [Rows(p.cache, p.past + len(p.tokens) - p.num_logits, p.num_logits) for p in pieces]
        num_silent = sum(rows.num_rows for rows in silent)
        tokens = [token for p in pieces for token in p.tokens[: len(p.tokens) - p.num_logits]]
        tokens += [token for p in pieces for token in p.tokens[len(p.tokens) - p.num_logits :]]
        x_TD = self.model.get_input_embeddings()(torch.tensor(tokens))
        parts = []
        for rows, first, last in passes([*silent, *heard]):
            x = x_TD[first:last].to(torch.float32, copy=True)
            parts.append(self.stack.forward(rows, x, last - max(first, min(last, num_silent)), inner))
        tapped_TMD = joined([part.tapped for part in parts]).to(x_TD.dtype)
        if len(inner) < len(taps):
            tapped_TMD = torch.cat([x_TD[:, None], tapped_TMD], dim=1)
        logits_TV, best = joined([part.logits for part in parts]), [token for part in parts for token in part.best]
        scored, quiet, loud = [], 0, 0
        for p in pieces:
            num_quiet = len(p.tokens) - p.num_logits
            features = [tapped_TMD[quiet : quiet + num_quiet], tapped_TMD[num_silent + loud : num_silent + loud + p.num_logits]]
            mine = slice(loud, loud + p.num_logits)
            scored.append(Scored(logits_TV[mine], torch.cat(features) if num_quiet else features[1], best[mine]))
            quiet, loud = quiet + num_quiet, loud + p.num_logits
        return scored


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
