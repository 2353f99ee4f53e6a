"""Which caches can forget rejected tokens exactly, and how.

Every layer of a cache has one of two ways. *Crop*: the layer drops its last tokens itself (keys and values, sliding windows, convolution
windows; gated delta layers recompute their state, `delta.py`). *Snapshot*: what the layer held before the pass is put back,
and the accepted tokens go through the model once more: slow, and right for any cache that lies in the cache object.

Which layer has which way is a list of what the tests compare with plain decoding. `cache.is_croppable` is no guide: it is True for
layers whose crop fails later (transformers 5.23, DeepSeek-V4)."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from dspark.errors import SettingError, TargetError
from dspark.target.delta import GatedDeltaLayer, watch_kernels

ROLLBACKS = ("auto", "snapshot")

# Layers that hold every token, and can therefore be cropped to any length at any time.
HOLD_EVERYTHING = (DynamicLayer, DynamicIndexedLayer, DummyLayer)
CROPPED = (*HOLD_EVERYTHING, DynamicSlidingWindowLayer)
# transformers uses one class for all layers with a convolution window or a recurrent state: the family tells what is in it.
CONVOLUTION_ONLY = {"lfm2", "lfm2_moe"}
GATED_DELTA = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"}
SNAPSHOT_FAMILIES = {"nemotron_h", "mamba2", "granitemoehybrid", "falcon_h1", "kimi_linear"}
# Classes beside their model, by name: to import them would import the model.
SNAPSHOT_LAYERS = {"DeepseekV4HCACache", "DeepseekV4CSACache"}
# Where the layers above write into a tensor; all else they replace, so that a snapshot may share it.
WRITTEN_IN_PLACE = ("conv_states", "recurrent_states")

# These choose the rotation of all rows by the largest position in a pass, so that a drafted row that is
# rejected later would already have changed the ones that are kept.
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}

Snapshot = dict[int, dict[str, Any]]  # by layer: its attributes


@dataclass(frozen=True)
class Rollback:
    """How the caches of one model forget. `snapshot` holds the layers that need one, `trusted` is False for those that only the
    user's wish lets in; `cache_argument` is the name under which the model takes its cache; `clamped` are the modules that `as_decoded`
    is about, with their limits."""

    model: PreTrainedModel
    delta: frozenset[int]
    snapshot: frozenset[int]
    trusted: bool
    cache_argument: str
    clamped: tuple[tuple[Any, tuple[float, float]], ...] = ()

    @property
    def replays(self) -> bool:
        """Does a rejection cost one more pass over the accepted tokens?"""
        return bool(self.snapshot)

    @property
    def recurrent(self) -> bool:
        """Has it layers with a convolution window or a recurrent state?"""
        return any(isinstance(layer, LinearAttentionLayer) for layer in DynamicCache(config=self.model.config).layers)

    @property
    def knows_padding(self) -> bool:
        """Do all its layers leave padded tokens out? DeepSeek-V4 compresses them with the others."""
        return self.trusted and not any(type(layer).__name__ in SNAPSHOT_LAYERS for layer in DynamicCache(config=self.model.config).layers)

    def new_cache(self) -> DynamicCache:
        """An empty cache whose layers keep what a rejection must bring back."""
        cache = DynamicCache(config=self.model.config)
        for index, layer in enumerate(cache.layers):
            if index in self.delta:
                cache.layers[index] = GatedDeltaLayer(cast(Any, layer).number_of_states)
            elif index not in self.snapshot and hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        return cache

    def remember(self, cache: DynamicCache) -> Snapshot:
        """Before a pass that may be rolled back: what its snapshot layers hold."""
        return {index: snapshot_of(cache.layers[index], self.trusted) for index in self.snapshot}

    def crop(self, cache: DynamicCache, num_rejected: int) -> None:
        """Forget the last `num_rejected` tokens in layers that can crop, 0 included: windows trim, and what was kept for a roll-back goes."""
        for index, layer in enumerate(cache.layers):
            if index not in self.snapshot and not never_filled(layer):
                cast(Any, layer).crop(-num_rejected)

    def restore(self, cache: DynamicCache, before: Snapshot, num_rows: int) -> None:
        """Forget a whole pass of `num_rows` rows. `before` cannot be used again: the cache goes on with it."""
        self.crop(cache, num_rows)
        for index, attributes in before.items():
            layer = cache.layers[index]
            vars(layer).clear()
            vars(layer).update(attributes)

    @contextmanager
    def as_decoded(self) -> Iterator[None]:
        """Within it, passes of several rows compute what decoding token by token does. In transformers 5.23 the Mamba layers of
        Nemotron-H bound their time step from below in passes of several rows, and not in passes of one: neither drafted rows nor a prompt
        in pieces would give the state that decoding gives."""
        try:
            for module, (_, most) in self.clamped:
                module.time_step_limit = (0.0, most)
            yield
        finally:
            for module, limit in self.clamped:
                module.time_step_limit = limit

    def can_shorten(self, cache: DynamicCache) -> bool:
        """Can it be cropped to any length?"""
        return all(type(layer) in HOLD_EVERYTHING for layer in cache.layers)


def never_filled(layer: Any) -> bool:
    """A convolution layer that has seen no token has no window to crop."""
    return isinstance(layer, LinearAttentionLayer) and not any(layer.is_conv_states_initialized.values())


def snapshot_of(layer: Any, trusted: bool) -> dict[str, Any]:
    """Its attributes, apart from what later passes write. Of a class that is not `trusted` nothing is known: all is copied."""
    if not trusted:
        return copy.deepcopy(vars(layer))
    return {name: separate(value, copied=name in WRITTEN_IN_PLACE) for name, value in vars(layer).items()}


def separate(value: Any, copied: bool) -> Any:
    """The same value in containers of its own, its tensors copied if asked."""
    if isinstance(value, dict):
        return {key: separate(each, copied) for key, each in value.items()}
    return value.clone() if copied and isinstance(value, torch.Tensor) else value


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors of a cache layer's attributes."""
    if isinstance(value, torch.Tensor):
        return [value]
    each = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for inner in each for tensor in tensors_of(inner)]


def rope_types(config) -> set[str]:
    """The rotary variants of a text config, which has one, or one a layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    settings = [rope, *(r for r in rope.values() if isinstance(r, dict))]
    return {str(r["rope_type"]) for r in settings if "rope_type" in r}


def check_wish(wish: str) -> None:
    if wish not in ROLLBACKS:
        raise SettingError(f"unknown rollback {wish!r}", f"choose one of {', '.join(ROLLBACKS)}")


def find_rollback(model: PreTrainedModel, wish: str = "auto") -> Rollback:
    """How this model's caches forget. `wish` snapshot lets in layers that no test covers; `check_rollback` must follow then.

    Raises `TargetError` by name for a model that cannot be rolled back: a wrong roll-back gives fluent text from another law
    (vllm#39273), which nobody notices."""
    check_wish(wish)
    cache_argument = refuse_unless_causal(model)
    config = model.config.get_text_config()
    delta, snapshot, foreign = set(), set(), set()
    for index, layer in enumerate(DynamicCache(config=model.config).layers):
        recurrent, alone = isinstance(layer, LinearAttentionLayer), type(layer) is LinearAttentionLayer
        if type(layer) in CROPPED or (alone and config.model_type in CONVOLUTION_ONLY):
            continue
        if alone and config.model_type in GATED_DELTA:
            delta.add(index)
            continue
        snapshot.add(index)
        if not (recurrent and config.model_type in SNAPSHOT_FAMILIES) and type(layer).__name__ not in SNAPSHOT_LAYERS:
            foreign.add(f"{type(layer).__name__} of {config.model_type}" if recurrent else type(layer).__name__)
    name = type(model).__name__
    if foreign and wish == "auto":
        raise TargetError(
            f"{name} uses cache layers whose roll-back no test covers: {', '.join(sorted(foreign))}",
            'pass rollback="snapshot" (`--rollback snapshot`) to try the slow way, which is checked while loading',
        )
    if delta and not watch_kernels(model):
        raise TargetError(f"the gated delta kernels of {name} are not where this version expects them", "use transformers 5.23")
    limits = [(module, getattr(module, "time_step_limit", None)) for module in model.modules()]
    clamped = tuple((module, limit) for module, limit in limits if limit is not None and limit[0] > 0)
    return Rollback(model, frozenset(delta), frozenset(snapshot), not foreign, cache_argument, clamped)


def refuse_unless_causal(model: PreTrainedModel) -> str:
    """The name under which the model takes its cache. Raises `TargetError` for a model that no way of rolling back would help."""
    name = type(model).__name__
    hint = "targets are causal language models that keep a cache (docs/models.md)"
    if model.config.is_encoder_decoder:
        raise TargetError(f"{name} is an encoder-decoder model; dspark drafts for causal language models", hint)
    if model.get_output_embeddings() is None:
        raise TargetError(f"{name} has no output rows to predict tokens with", "load it with AutoModelForCausalLM")
    arguments = inspect.signature(model.forward).parameters
    taken = [argument for argument in ("past_key_values", "cache_params") if argument in arguments]
    if not taken:
        raise TargetError(f"{name} keeps no cache of earlier tokens that can be handed to it", hint)
    moving = rope_types(model.config.get_text_config()) & LENGTH_DEPENDENT_ROPE
    if moving:
        raise TargetError(
            f"{name} rotates keys by the length of the text ({', '.join(sorted(moving))} rope): rows cannot be rolled back", hint
        )
    return taken[0]
