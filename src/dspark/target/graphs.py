"""CUDA graphs: a pass of a few rows as one launch. A small model on a GPU otherwise waits for the processor, which launches hundreds of
kernels for each token. It has never run on a GPU; on a CPU the same passes run without being recorded, which the tests compare.

A graph replays at fixed addresses: rows are padded to a few sizes, keys and values lie in one static cache, and one request at a time
has it. Others decode eagerly.

Shapes: T rows, V vocabulary, M tapped layers, D hidden."""

import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from transformers import StaticCache

from dspark.errors import RuntimeUnavailable
from dspark.target.native.runtime import ARCHITECTURES, shape_of

SIZES = (1, 2, 4, 8, 16, 32)  # rows of recorded passes; longer ones, pieces of a prompt, run eagerly in the same cache
FIRST_LENGTH = 1024  # of the cache, in tokens; it doubles when a text outgrows it, and passes are recorded anew
MOVING_POSITIONS = ("dynamic", "longrope")  # rotary positions that depend on the length of the text, which a graph cannot look at

# (ids [1, T], cache) -> logits [T, V], features [T, M, D]
Forward = Callable[[torch.Tensor, StaticCache], tuple[torch.Tensor, torch.Tensor]]


class Slot:
    """The static cache, for the one request that has it."""

    def __init__(self, graphs: "Graphs"):
        self.graphs = graphs

    @property
    def layers(self) -> list[Any]:
        return [] if self.graphs.cache is None else self.graphs.cache.layers


class Graphs:
    """Passes of one model, recorded when they are first wanted. `record=False` computes the same without recording.

    Raises `RuntimeUnavailable` for a model it cannot run."""

    def __init__(self, model: Any, record: bool = True):
        reason = reason_against(model, record)
        if reason:
            on_cpu = model.device.type == "cpu"
            raise RuntimeUnavailable(f"CUDA graphs cannot run this model: {reason}", "put it on a GPU: --device cuda" if on_cpu else None)
        self.model, self.record = model, record
        self.most = getattr(model.config, "max_position_embeddings", None) or 2**31
        self.cache: Any = None  # a StaticCache, from the first pass on
        self.length = 0
        self.past = torch.zeros((), dtype=torch.long, device=model.device)
        self.ids = {size: torch.zeros(1, size, dtype=torch.long, device=model.device) for size in SIZES}
        self.recorded: dict[Hashable, tuple[Any, tuple[torch.Tensor, torch.Tensor]]] = {}
        self.holder: weakref.ref[Slot] | None = None

    def start(self) -> Slot | None:
        """The cache for one request; None while another has it."""
        if self.holder is not None and self.holder() is not None:
            return None
        slot = Slot(self)
        self.holder = weakref.ref(slot)
        return slot

    def rows(self, tokens: Sequence[int], past: int, taps: Hashable, forward: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `tokens` after `past` cached ones: logits [T, V] in float32 and features [T, M, D]. `taps` tells calls apart whose
        features are of other layers. What lies past the tokens that count is overwritten by later passes."""
        num = len(tokens)
        size = next((size for size in SIZES if size >= num), num)
        self.reserve(past + size)
        self.past.fill_(past)
        if size > SIZES[-1]:
            logits_TV, features_TMD = self.passed(torch.tensor([list(tokens)], device=self.past.device), forward)
        else:
            self.ids[size].copy_(torch.tensor([[*tokens, *[0] * (size - num)]]))
            logits_TV, features_TMD = self.replayed(size, taps, forward)
        # Copies: the next replay writes to the same places.
        return logits_TV[:num].to(torch.float32, copy=True), features_TMD[:num].clone()

    def passed(self, ids_1T: torch.Tensor, forward: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        """The pass itself, which reads nothing but tensors: each layer's length comes from `past`."""
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(self.past)
        return forward(ids_1T, self.cache)

    def replayed(self, size: int, taps: Hashable, forward: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        key = (size, taps)
        if self.record and key not in self.recorded:
            try:
                self.recorded[key] = recording(lambda: self.passed(self.ids[size], forward))
            except RuntimeError as error:  # torch's kind for all that a capture does not allow
                self.record = False
                self.recorded.clear()
                if self.past.is_cuda:
                    torch.cuda.synchronize(self.past.device)
                warnings.warn(f"decoding without CUDA graphs: recording failed: {str(error).splitlines()[0]}", stacklevel=2)
        if not self.record:
            return self.passed(self.ids[size], forward)
        graph, results = self.recorded[key]
        graph.replay()
        return results

    def reserve(self, num_tokens: int) -> None:
        """Have room for so many tokens, padding included; what is cached stays."""
        if num_tokens <= self.length:
            return
        old, self.length = self.cache, max(FIRST_LENGTH, self.length)
        while self.length < num_tokens:
            self.length *= 2
        self.recorded.clear()  # they have the old cache's addresses
        shape, weight = shape_of(self.model), self.model.get_output_embeddings().weight
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.length)
        self.cache.early_initialization(1, shape.num_key_value_heads, shape.head_dim, weight.dtype, weight.device)
        for before, layer in zip([] if old is None else old.layers, self.cache.layers, strict=False):
            layer.keys[:, :, : before.keys.shape[2]] = before.keys
            layer.values[:, :, : before.values.shape[2]] = before.values


def recording(run: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
    """A graph of what `run` launches, and where its results will lie. It is run before on a stream of its own, as libraries set
    themselves up in their first calls; that writes nothing that the replay does not write again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def reason_against(model: Any, record: bool) -> str | None:
    """Why passes of this model cannot be recorded; None if they may be."""
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES:
        return f"{name} is not one of {', '.join(ARCHITECTURES)}"
    if record and model.device.type != "cuda":
        return f"the model is on {model.device}"
    window = getattr(config, "sliding_window", None) if name == "MistralForCausalLM" else None
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"} or window is not None:
        return "attention with a sliding window"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return f"rotary positions of the kind {rope}" if rope in MOVING_POSITIONS else None
