"""Which caches can forget rejected tokens exactly, and how."""

import inspect
from typing import cast

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dspark.errors import TargetError

# `cache.is_croppable` is True for layers whose crop fails later (transformers 5.23, DeepSeek-V4),
# so the exact classes whose crop our tests prove equal to plain decoding are listed instead.
EXACT_CROP = (DynamicLayer, DynamicSlidingWindowLayer)


# These choose the rotation of all rows by the largest position in a pass, so that a drafted row that is
# rejected later would already have changed the ones that are kept.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def rope_types(config) -> set[str]:
    """The rotary variants of a text config, which has one, or one a layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    settings = [rope, *(r for r in rope.values() if isinstance(r, dict))]
    return {str(r["rope_type"]) for r in settings if "rope_type" in r}


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache whose sliding layers keep what a rejection must bring back."""
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()
    return cache


def rollback(cache: DynamicCache, num_rejected: int) -> None:
    """Forget the last `num_rejected` tokens. Call it with 0 too: sliding layers trim only here."""
    for layer in cache.layers:
        cast(DynamicLayer, layer).crop(-num_rejected)


def refuse_unless_exact(model: PreTrainedModel) -> None:
    """Raise `TargetError` by name for a model whose state cannot be rolled back by crop.

    Recurrent and compressed caches are refused here: a wrong roll-back gives fluent text
    from another law (vllm#39273), which nobody notices."""
    name = type(model).__name__
    hint = "targets with attention caches only are supported (Llama, Qwen2/3, Gemma 3, GPT-OSS, GLM-4, ...)"
    if model.config.is_encoder_decoder:
        raise TargetError(f"{name} is an encoder-decoder model; dspark drafts for causal language models", hint)
    if model.get_output_embeddings() is None:
        raise TargetError(f"{name} has no output rows to predict tokens with", "load it with AutoModelForCausalLM")
    if getattr(model, "_is_stateful", False):
        raise TargetError(f"{name} keeps a recurrent state that cannot be rolled back exactly", hint)
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise TargetError(f"{name} keeps no cache of earlier tokens", hint)
    moving = rope_types(model.config.get_text_config()) & LENGTH_DEPENDENT_ROPE
    if moving:
        raise TargetError(
            f"{name} rotates keys by the length of the text ({', '.join(sorted(moving))} rope): rows cannot be rolled back", hint
        )
    foreign = sorted({type(layer).__name__ for layer in new_cache(model).layers if type(layer) not in EXACT_CROP})
    if foreign:
        raise TargetError(f"{name} uses cache layers that cannot be rolled back exactly: {', '.join(foreign)}", hint)
