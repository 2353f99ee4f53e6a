"""Random models and heads small enough to build in memory, with logits that are far from uniform."""

import torch
import transformers
from transformers import PreTrainedModel

from dspark.config import HeadConfig
from dspark.core.calibration import Calibration, Fit
from dspark.head.calibration import head_digest
from dspark.head.head import Head
from dspark.target.target import Target

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

# family -> (transformers' class prefix, what its config needs besides SHAPE)
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"num_experts": 4}),
    "gemma3": ("Gemma3", SLIDING | {"query_pre_attn_scalar": 8}),
    "gpt_oss": ("GptOss", SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN}),
    "glm4_moe": ("Glm4Moe", MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}),
}
# Sizes that the native runtime takes: all multiples of 16.
NATIVE_SHAPE = {"head_dim": 16}
# Standard deviation of every weight matrix: gives logits a spread of about 2.
SPREAD = 0.35
CONFIG_NAMES = {"gemma3": "Gemma3TextConfig"}


def tiny_model(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model of this family in float32; `overrides` go to its config."""
    prefix, extra = FAMILIES[family]
    settings = SHAPE | extra | overrides
    if "sliding_window" in extra and "layer_types" not in overrides:
        settings["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(settings["num_hidden_layers"])]
    config = getattr(transformers, CONFIG_NAMES.get(family, f"{prefix}Config"))(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() > 1:
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
    num_draft = draft_vocab or target.vocab_size
    config = HeadConfig(
        hidden_size=target.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        intermediate_size=64,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        vocab_size=target.vocab_size,
        draft_vocab_size=num_draft,
        block_size=block_size,
        mask_token_id=target.vocab_size - 1,
        target_layer_ids=(0, target.num_layers - 1),
        num_target_layers=target.num_layers,
        markov_rank=rank,
        markov_head_type=kind,
        confidence_head_with_markov=with_markov,
    )
    draft_ids = torch.arange(num_draft) * target.vocab_size // num_draft
    rows = target.output_rows(draft_ids).to(target.model.dtype)
    mask = target.embed(torch.tensor(config.mask_token_id)).detach()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = Head(config, draft_ids, rows, mask).eval()
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
