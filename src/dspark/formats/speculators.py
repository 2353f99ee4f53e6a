"""The folder of the `speculators` library, which vLLM serves.

It differs from DeepSpec's in where the layer numbers start (inputs of layers: one higher), in its draft vocabulary
(t2d, d2t) and in `transformer_layer_config`, from which keys equal to a library default may be absent."""

from pathlib import Path
from typing import Any

from dspark.errors import HeadError
from dspark.formats.portable import Portable, draft_ids_of_offsets, embedding_scale, kept_in, offsets, take_rows, write_folder
from dspark.head.folder import checked_config, config_json, read_weights, refuse_other_networks
from dspark.prompts import read_json
from dspark.target import demo
from dspark.target.target import Target

CHECKED_WITH = "0.9.0"  # of speculators
DEFAULTS = {"draft_vocab_size": 32000, "block_size": 8, "markov_rank": 256, "markov_head_type": "vanilla",
            "enable_confidence_head": True, "confidence_head_with_markov": True}  # fmt: skip
FROM_LAYERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
               "rms_norm_eps", "vocab_size")  # fmt: skip


def read(path: Path, target: Target) -> Portable:
    """Raises `HeadError` for heads that are not anchor-first, or with layers that dspark does not run."""
    where = f"{path}/config.json"
    raw = read_json(path / "config.json", HeadError, "restore the file")
    kind = raw.get("speculators_model_type")
    if kind not in ("dspark", "dflash"):
        raise HeadError(f"{where}: a speculator of type {kind!r}; dspark runs dspark and dflash")
    if raw.get("sample_from_anchor", False) is not True:  # absent means false here, whatever the library's class says today
        said = "is false" if "sample_from_anchor" in raw else "is absent, which means false"
        raise HeadError(
            f"{where}: sample_from_anchor {said}: slot k of its block predicts the token at k, and dspark's at k + 1",
            "if the head was trained in DeepSpec's way (the anchor's slot predicts), write `sample_from_anchor: true`",
        )
    layers = fill_defaults(raw.get("transformer_layer_config"), where)
    refuse_other_networks(layers, where)
    rope = layers.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", layers.get("partial_rotary_factor") or 1) != 1:
        raise HeadError(f"{where}: partial_rotary_factor in its layers; dspark's rotate whole heads")
    if raw.get("target_hidden_size") not in (None, layers["hidden_size"]):
        raise HeadError(f"{where}: target_hidden_size {raw['target_hidden_size']} is not the head's own {layers['hidden_size']}")
    if embedding_scale(target) != 1:
        raise HeadError(f"{target.name} scales its embeddings, and the layers of speculators take them raw: dspark cannot run {path}")
    taps = raw.get("aux_hidden_state_layer_ids")
    if taps is None:
        taps = [2, target.num_layers // 2, target.num_layers - 3]
    if not isinstance(taps, list) or not all(type(i) is int for i in taps):
        raise HeadError(f"{where}: aux_hidden_state_layer_ids is {taps!r}, a list of layer numbers was expected")
    section = raw.get("dspark") if isinstance(raw.get("dspark"), dict) else {}
    values: dict[str, Any] = {name: raw.get(name, default) for name, default in DEFAULTS.items()}
    if kind == "dflash":
        values |= {"markov_rank": 0, "enable_confidence_head": False}
    values |= {name: layers.get(name) for name in FROM_LAYERS}
    values |= {"rope_theta": rope.get("rope_theta"), "mask_token_id": raw.get("mask_token_id"), "num_target_layers": target.num_layers,
               "target_layer_ids": [i - 1 for i in taps], "shortlist": section.get("shortlist", 0), "window": section.get("window", 0)}  # fmt: skip
    config = checked_config(values, where)
    tensors = read_weights(path)
    draft_ids = draft_ids_of_offsets(tensors, config.vocab_size, config.draft_vocab_size, f"{path}/model.safetensors")
    for name in ("verifier_lm_head.weight", "verifier_norm.weight"):  # never part of the draft
        tensors.pop(name, None)
    return Portable(config, tensors, draft_ids, str(path), take_rows(tensors), section, kept_in(path))


def fill_defaults(layers: Any, where: str) -> dict:
    """transformer_layer_config with the keys that it leaves to transformers' defaults."""
    from transformers import CONFIG_MAPPING, Qwen3Config

    if not isinstance(layers, dict):
        raise HeadError(f"{where}: transformer_layer_config is {layers!r}, an object was expected", "restore the file")
    kind = layers.get("model_type", "qwen3")
    try:
        made = CONFIG_MAPPING.get(kind, Qwen3Config)(**layers)
    except Exception as error:  # its validators raise kinds of their own
        raise HeadError(f"{where}: transformer_layer_config is no configuration of {kind!r}: {error}", "restore the file") from error
    filled = made.to_dict()
    if filled.get("head_dim") is None:
        filled["head_dim"] = filled["hidden_size"] // filled["num_attention_heads"]
    return filled


def write(head: Portable, path: Path, target: Target, card: str) -> None:
    """Raises `HeadError` for a target that scales its embeddings."""
    import transformers

    config = head.config
    if embedding_scale(target) != 1:
        raise HeadError(
            f"speculators' layers take the target's embeddings raw, and {target.name} scales them by {embedding_scale(target)}",
            "deepspec and gguf hold this head",
        )
    own = config_json(config, target)
    layers = {name: getattr(config, name) for name in FROM_LAYERS} | {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": own["rope_parameters"],
        "rope_theta": config.rope_theta,
        "max_position_embeddings": min(target.max_context, 2**31 - 1),
        "layer_types": own["layer_types"],
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "dtype": str(head.dtype).removeprefix("torch."),
    }
    written = {
        "speculators_model_type": "dspark",
        "speculators_version": CHECKED_WITH,
        "transformers_version": transformers.__version__,
        "dtype": layers["dtype"],
        "architectures": ["DSparkSpeculator"],
        "transformer_layer_config": layers,
        "draft_vocab_size": config.draft_vocab_size,
        "block_size": config.block_size,
        "target_hidden_size": config.hidden_size,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": True,
        "sliding_window_non_causal": False,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov and config.markov_rank > 0,
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "dspark",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.block_size, "verifier_accept_k": 1,
                                  "accept_tolerance": 0.0}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": demo.HUB_ID if target.name == demo.NAME else target.name,
                         "architectures": target.model.config.architectures or []},
        },
        "dspark": own["dspark"] | {"exported_as": "speculators", "shared_with_target": ["embed_tokens.weight"]},
    }  # fmt: skip
    lm_head = {"lm_head.weight": target.output_rows(head.draft_ids).cpu().to(head.dtype)}
    write_folder(head, path, written, head.weights | lm_head | offsets(head), card)
