"""Random models and heads small enough to build in memory, with logits that are far from uniform."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from dspark.config import HeadConfig, RecurrentConfig, Sizes
from dspark.core.calibration import Calibration, Fit
from dspark.head.calibration import head_digest
from dspark.head.head import Head
from dspark.head.recurrent import NETWORKS, AnyHead, RecurrentHead
from dspark.target.target import Target

LEFT_OUT = object()  # a setting that a family does not have
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Small enough that a few rounds of a test cross it.
SLIDING = {"sliding_window": 8}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 8}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
MROPE = {
    "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
}  # fmt: skip
SHARED_EXPERT = MOE | {"num_experts": 4, "shared_expert_intermediate_size": 32}
LATENT = MOE | {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
# Eight heads: with fewer, the scores of an indexer tie.
INDEXED = LATENT | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 8}
COMPRESSED = MOE | {
    "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "n_routed_experts": 4, "sliding_window": 8,
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention", "compressed_sparse_attention"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "hc_mult": 2, "hc_sinkhorn_iters": 4, "o_groups": 2, "o_lora_rank": 8,
    "index_n_heads": 8, "index_head_dim": 16, "index_topk": 3, "num_nextn_predict_layers": 0,
}  # fmt: skip
# Chunks of 8, so that a pass crosses their borders.
MAMBA = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8}
NEMOTRON = MOE | {
    "layer_types": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"], "num_hidden_layers": LEFT_OUT,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
# Granite 4's and Falcon-H1's names for the same.
MAMBA_BESIDE = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip
IN_TURN = {"layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": LEFT_OUT}
CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2, "head_dim": LEFT_OUT}
STEP = MOE | {
    "layer_types": ["full_attention", "sliding_attention"] * 2, "n_routed_experts": 4, "share_expert_dim": 32,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "pad_token_id": 0,
}  # fmt: skip
STEP_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}

# family -> (transformers' class prefix, what its config needs besides SHAPE)
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"num_experts": 4}),
    "gemma3": ("Gemma3", SLIDING | ALTERNATING | {"query_pre_attn_scalar": 8}),
    "gemma4": (
        "Gemma4",
        SLIDING
        | ALTERNATING
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 1, "final_logit_softcapping": 30.0},
    ),
    "gpt_oss": ("GptOss", SLIDING | ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN}),
    "glm4_moe": ("Glm4Moe", MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "step3p7": ("Step3p7", SLIDING | STEP),
    "deepseek_v3": ("DeepseekV3", LATENT | {"head_dim": LEFT_OUT}),
    "deepseek_v32": ("DeepseekV32", INDEXED),
    "glm_moe_dsa": ("GlmMoeDsa", INDEXED),
    "lfm2": ("Lfm2", CONVOLUTION),
    "lfm2_moe": ("Lfm2Moe", CONVOLUTION | MOE | {"num_experts": 4, "num_dense_layers": 1}),
    "qwen3_next": ("Qwen3Next", DELTA | SHARED_EXPERT),
    "qwen3_5": ("Qwen3_5", DELTA | {"rope_parameters": MROPE}),
    "qwen3_5_moe": ("Qwen3_5Moe", DELTA | SHARED_EXPERT | {"rope_parameters": MROPE}),
    "olmo_hybrid": (
        "OlmoHybrid",
        IN_TURN | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 16},
    ),
    "deepseek_v4": ("DeepseekV4", COMPRESSED),
    "nemotron_h": ("NemotronH", NEMOTRON),
    "mamba2": ("Mamba2", MAMBA),
    "granitemoehybrid": ("GraniteMoeHybrid", MAMBA_BESIDE | IN_TURN | MOE | {"num_local_experts": 4, "shared_intermediate_size": 32}),
    "falcon_h1": ("FalconH1", MAMBA_BESIDE | {"mamba_d_ssm": 64}),
    "kimi_linear": (
        "KimiLinear",
        LATENT | IN_TURN | {"q_lora_rank": None, "linear_head_dim": 8, "linear_num_heads": 4, "num_local_experts": 4},
    ),
}
# Sizes that the native runtime takes: all multiples of 16.
NATIVE_SHAPE = {"head_dim": 16}
# Standard deviation of every weight matrix: gives logits a spread of about 2.
SPREAD = 0.35
TEXT_CONFIGS = ("gemma3", "gemma4", "qwen3_5", "qwen3_5_moe")
# How slowly a recurrent state forgets (-exp of it is the log of the decay): at its usual random values, a wrong roll-back is soon forgotten.
SLOW_DECAY = -4.0


def tiny_config(family: str, **overrides):
    prefix, extra = FAMILIES[family]
    settings = {name: value for name, value in (SHAPE | extra | overrides).items() if value is not LEFT_OUT}
    if family == "step3p7":
        return transformers.Step3p7Config(text_config=settings, vision_config=STEP_VISION, image_token_id=120)
    return getattr(transformers, f"{prefix}TextConfig" if family in TEXT_CONFIGS else f"{prefix}Config")(**settings)


def tiny_model(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model of this family in float32; `overrides` go to its config."""
    kind = "ForConditionalGeneration" if family == "step3p7" else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, FAMILIES[family][0] + kind)(tiny_config(family, **overrides)).float().eval()
        return randomized(model)


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("A_log"):
            parameter.fill_(SLOW_DECAY)
        elif parameter.dim() > 1:
            parameter.normal_(0.0, SPREAD)
    return model


def tiny_head(
    target: Target,
    kind: str = "vanilla",
    rank: int = 8,
    block_size: int = 4,
    layers: int = 2,
    draft_vocab: int | None = None,
    seed: int = 0,
    head_dim: int = 8,
    with_markov: bool = True,
) -> Head:
    """A random head for this target; rank 0 is DFlash, `draft_vocab` keeps every n-th id only."""
    config = HeadConfig(
        **tiny_sizes(target, block_size, draft_vocab),
        head_dim=head_dim,
        target_layer_ids=(0, target.num_layers - 1),
        num_hidden_layers=layers,
        mask_token_id=target.vocab_size - 1,
        markov_rank=rank,
        markov_head_type=kind,
        confidence_head_with_markov=with_markov,
    )
    mask = target.embed(torch.tensor(config.mask_token_id)).detach()
    return random_head(lambda ids, rows: Head(config, ids, rows, mask), config, target, seed)


def tiny_sizes(target: Target, block_size: int, draft_vocab: int | None) -> dict:
    """What the configs of all kinds of heads have alike."""
    return {
        "hidden_size": target.hidden_size,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": draft_vocab or target.vocab_size,
        "block_size": block_size,
        "num_target_layers": target.num_layers,
    }


def random_head(make: Callable[[torch.Tensor, torch.Tensor], AnyHead], config: Sizes, target: Target, seed: int) -> Any:
    """The head that `make` gives for draft ids, every n-th of the target's, and their output rows, with random matrices."""
    draft_ids = torch.arange(config.draft_vocab_size) * config.vocab_size // config.draft_vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = make(draft_ids, target.output_rows(draft_ids).to(target.model.dtype)).eval()
        for parameter in head.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() > 1:
                parameter.normal_(0.0, SPREAD)
    return head


# for a block of 4
TINY_FIT = Fit(
    0.0, 0, 1.0, (2.0, 3.0, 4.0, 5.0), (0.0, 0.5, 0.0, -1.0), (0.0,) * 4, (0.5,) * 4, (0.1,) * 4, (0.01, 0.02, 0.03, None), 400, 200, 20
)


def tiny_calibration(head: Head, target: Target, *fits: Fit) -> Calibration:
    """A calibration that belongs to this pair."""
    return Calibration(target.name, target.precision, target.digest(), head_digest(head), fits or (TINY_FIT,))


def tiny_recurrent(
    target: Target,
    kind: str,
    block_size: int = 4,
    draft_vocab: int | None = None,
    seed: int = 0,
    trained_steps: int = 1,
    layer_ids: tuple[int, ...] | None = None,
    head_dim: int = 8,
) -> RecurrentHead:
    """A random head of this kind for this target; `draft_vocab` keeps every n-th id only. A `head_dim` of 16 can run natively."""
    last = target.num_layers - 1
    config = RecurrentConfig(
        **tiny_sizes(target, block_size, draft_vocab),
        head_dim=head_dim,
        target_layer_ids=layer_ids or ((last,) if kind == "mtp" else tuple(sorted({0, last // 2, last}))),
        kind=kind,
        trained_steps=trained_steps,
    )
    return random_head(lambda ids, rows: NETWORKS[kind](config, ids, rows, target.embed), config, target, seed)
