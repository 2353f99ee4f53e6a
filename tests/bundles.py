"""Tiny DeepSeek-V4 targets on disk that bring a DSpark head of random weights, in the names of the released checkpoints."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tiny import SPREAD, tiny_model

BUNDLED = {"dspark_block_size": 4, "dspark_noise_token_id": 127, "dspark_target_layer_ids": [1, 2, 3], "dspark_markov_rank": 6}
# More streams, experts and rotary channels than the smallest numbers, at which mistakes cancel.
SIZES = {"hc_mult": 3, "n_routed_experts": 5, "partial_rotary_factor": 0.5, "sliding_window": 6, "swiglu_limit": 1.0}
LAYERS = 3


def save_with_bundle(folder: Path, seed: int = 0, shards: bool = False, prompt: Sequence[int] = (), **overrides) -> Path:
    """A tiny target with a head of this seed; `shards` puts the head in a file of its own. With a `prompt`, and a rank as large as the
    vocabulary, the head knows much of what the target says after it."""
    model = tiny_model("deepseek_v4", seed, **(SIZES | BUNDLED | overrides))
    model.save_pretrained(folder)
    tensors, head = load_file(folder / "model.safetensors"), bundle_of(model.config, seed)
    if prompt:
        said = model.generate(torch.tensor([list(prompt)]), do_sample=False, max_new_tokens=12)[0].tolist()
        head = knowing(head, said, model.config.vocab_size)
    return write(folder, tensors, head, shards)


def write(folder: Path, tensors: dict[str, torch.Tensor], head: dict[str, torch.Tensor], shards: bool = False) -> Path:
    files = {"model.safetensors": tensors | head}
    if shards:
        (folder / "model.safetensors").unlink()
        files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": head}
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, held in files.items():
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / file, {"format": "pt"})
    return folder


def bundle_of(config, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of a head for a target of this config."""
    random = torch.Generator().manual_seed(seed + 1)

    def matrix(*shape: int) -> torch.Tensor:
        return SPREAD * torch.randn(shape, generator=random)

    D, E, H, C, W = config.hidden_size, config.head_dim, config.num_attention_heads, config.hc_mult, config.moe_intermediate_size
    Q, G, L, V, r = config.q_lora_rank, config.o_groups, config.o_lora_rank, config.vocab_size, config.dspark_markov_rank
    head = {}
    for k in range(LAYERS):
        layer = {
            "attn.wq_a.weight": matrix(Q, D), "attn.wq_b.weight": matrix(H * E, Q), "attn.wkv.weight": matrix(E, D),
            "attn.wo_a.weight": matrix(G * L, H * E // G), "attn.wo_b.weight": matrix(D, G * L), "attn.attn_sink": 2 * matrix(H),
            "attn.q_norm.weight": 1 + matrix(Q), "attn.kv_norm.weight": 1 + matrix(E),
            "attn_norm.weight": 1 + matrix(D), "ffn_norm.weight": 1 + matrix(D),
            "ffn.gate.weight": matrix(config.n_routed_experts, D), "ffn.gate.bias": matrix(config.n_routed_experts),
        }  # fmt: skip
        for place in ("shared_experts", *(f"experts.{x}" for x in range(config.n_routed_experts))):
            layer |= {f"ffn.{place}.w{n}.weight": matrix(*shape) for n, shape in ((1, (W, D)), (2, (D, W)), (3, (W, D)))}
        for part in ("attn", "ffn"):
            mixing = {"fn": matrix((2 + C) * C, C * D), "base": matrix((2 + C) * C), "scale": 1 + matrix(3)}
            layer |= {f"hc_{part}_{name}": tensor for name, tensor in mixing.items()}
        head |= {f"mtp.{k}.{name}": tensor for name, tensor in layer.items()}
    taps = len(config.dspark_target_layer_ids)
    head |= {"mtp.0.main_proj.weight": matrix(D, taps * D), "mtp.0.main_norm.weight": 1 + matrix(D)}
    last = {
        "norm.weight": 1 + matrix(D), "hc_head_fn": matrix(C, C * D), "hc_head_base": matrix(C), "hc_head_scale": 1 + matrix(1),
        "markov_head.markov_w1.weight": 2 * matrix(V, r), "markov_head.markov_w2.weight": 2 * matrix(V, r),
        "confidence_head.proj.weight": 0.1 * matrix(1, D + r),
    }  # fmt: skip
    return head | {f"mtp.{LAYERS - 1}.{name}": tensor for name, tensor in last.items()}


def knowing(head: dict[str, torch.Tensor], text: Sequence[int], vocab_size: int) -> dict[str, torch.Tensor]:
    """The same head, whose sequential part says after each token what followed it last in `text`: it is right now and then."""
    last = f"mtp.{LAYERS - 1}.markov_head.markov_"
    w2 = torch.zeros_like(head[f"{last}w2.weight"])
    for token, following in pairwise(text):
        w2[:, token] = 0.0
        w2[following, token] = 40.0
    return head | {f"{last}w1.weight": torch.eye(vocab_size), f"{last}w2.weight": w2}
