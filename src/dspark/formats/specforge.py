"""SpecForge's folder, which SGLang serves: DeepSpec's names without rows, the head's keys in `dflash_config`."""

from pathlib import Path
from typing import Any

from dspark.errors import HeadError
from dspark.formats.portable import Portable, draft_ids_of_offsets, embedding_scale, kept_in, take_rows, write_folder
from dspark.head.folder import checked_config, config_json, read_weights, refuse_other_networks
from dspark.prompts import read_json
from dspark.target.target import Target

FROM_TOP = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
            "rms_norm_eps", "vocab_size", "block_size", "num_target_layers")  # fmt: skip
# In dflash_config, or in older folders at the top.
DEFAULTS = {"markov_rank": 0, "markov_head_type": "vanilla", "enable_confidence_head": False, "confidence_head_with_markov": True}
OLD_PREFIX, PREFIX = "logit_head.", "markov_head."


def read(path: Path, target: Target) -> Portable:
    """Raises `HeadError` for attention that dspark does not run."""
    where = f"{path}/config.json"
    raw = read_json(path / "config.json", HeadError, "restore the file")
    inner = raw.get("dflash_config")
    if not isinstance(inner, dict):
        raise HeadError(f"{where}: dflash_config is {inner!r}, an object was expected", "restore the file")
    refuse_other_networks(raw, where)
    modes = {str(mode) for mode in inner.get("attention_modes") or [inner.get("attention_mode", "gqa")]} - {"gqa", "mha"}
    if modes:
        raise HeadError(f"{where}: attention of kind {' and '.join(sorted(modes))}; dspark runs gqa and mha")
    if inner.get("causal") or raw.get("is_causal"):
        raise HeadError(f"{where}: its blocks are causal; in dspark's, every slot sees the whole block")
    if raw.get("sample_from_anchor", inner.get("sample_from_anchor", True)) is not True:
        raise HeadError(f"{where}: sample_from_anchor is false: slot k of its block predicts the token at k, and dspark's at k + 1")
    if embedding_scale(target) != 1:
        raise HeadError(f"{target.name} scales its embeddings, and SpecForge's layers take them raw: dspark cannot run {path}")
    rope = raw.get("rope_parameters") or {}
    section = raw.get("dspark") if isinstance(raw.get("dspark"), dict) else {}
    values: dict[str, Any] = {name: raw.get(name) for name in FROM_TOP}
    values |= {name: inner.get(name, raw.get(name, default)) for name, default in DEFAULTS.items()}
    values |= {"rope_theta": raw.get("rope_theta") or rope.get("rope_theta"), "mask_token_id": inner.get("mask_token_id"),
               "target_layer_ids": inner.get("target_layer_ids"), "draft_vocab_size": raw.get("draft_vocab_size") or raw.get("vocab_size"),
               "shortlist": section.get("shortlist", 0), "window": section.get("window", 0)}  # fmt: skip
    values["head_dim"] = values["head_dim"] or 128  # Qwen3Config's default
    config = checked_config(values, where)
    tensors = {PREFIX + name.removeprefix(OLD_PREFIX) if name.startswith(OLD_PREFIX) else name: t for name, t in read_weights(path).items()}
    draft_ids = draft_ids_of_offsets(tensors, config.vocab_size, config.draft_vocab_size, f"{path}/model.safetensors")
    return Portable(config, tensors, draft_ids, str(path), take_rows(tensors), section, kept_in(path))


def write(head: Portable, path: Path, target: Target, card: str) -> None:
    """Raises `HeadError` for a reduced draft vocabulary, and a target that scales its embeddings."""
    config = head.config
    if head.reduced:
        raise HeadError(
            f"SpecForge's released format has no reduced draft vocabulary, and this head drafts {config.draft_vocab_size} of "
            f"{config.vocab_size} tokens",
            "speculators and gguf hold it; `dspark train --draft-vocab` sets it",
        )
    if embedding_scale(target) != 1:
        raise HeadError(
            f"SpecForge's layers take the target's embeddings raw, and {target.name} scales them by {embedding_scale(target)}",
            "deepspec and gguf hold this head",
        )
    own = config_json(config, target)
    inner = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        "projector_type": "dspark",
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov and config.markov_rank > 0,
    }
    own |= {  # the other keys stay at the top as well, where older readers look
        "confidence_head_with_markov": inner["confidence_head_with_markov"],
        "architectures": ["DSparkDraftModel"],
        "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
        "dflash_config": inner,
        "dtype": str(head.dtype).removeprefix("torch."),
    }
    own["dspark"] |= {"exported_as": "specforge"}
    write_folder(head, path, own, head.weights, card)
