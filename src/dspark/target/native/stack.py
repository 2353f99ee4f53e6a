"""Python's side of stack.cpp: layers as the structures it reads, and one pass of some rows through them.

Shapes: T rows, M tapped layers, D hidden, V vocabulary, E head dim."""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dspark.target.native.build import compiled
from dspark.target.native.cache import PAGE_TOKENS, Cache
from dspark.target.quantize import is_int8

KINDS = (torch.float32, torch.bfloat16, torch.int8)  # of weights, in the order of stack.cpp's
# Rows of one pass: enough to read the weights from cache for most of them, few enough for small buffers.
MAX_ROWS = 128


class Linear(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weight", "bias", "scale")],
        *[(name, ctypes.c_int32) for name in ("num_out", "num_in")],
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")],
        *[(name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")],
    ]


class Joint(ctypes.Structure):
    _fields_ = [*[(name, ctypes.c_void_p) for name in ("embedded_norm", "state_norm")], ("fc", Linear)]


class Stack(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "inner", "kind")],
        ("eps", ctypes.c_float),
        ("rope_scale", ctypes.c_float),
        ("inverse_frequencies", ctypes.c_void_p),
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", ctypes.c_void_p),
        ("output", Linear),
        ("joint", Joint),
    ]


class Segment(ctypes.Structure):
    _fields_ = [("pages", ctypes.c_void_p), *[(name, ctypes.c_int32) for name in ("num_rows", "past", "first")]]


class Segments(ctypes.Structure):
    _fields_ = [("all", ctypes.POINTER(Segment)), ("count", ctypes.c_int32)]


class Pass(ctypes.Structure):
    _fields_ = [
        ("segments", Segments),
        *[(name, ctypes.c_int32) for name in ("causal", "num_logits", "num_taps", "threads")],
        *[(name, ctypes.c_void_p) for name in ("tap_layers", "x", "embedded", "taps", "logits", "normed", "best")],
    ]


class Sampling(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_float) for name in ("temperature", "top_p", "min_p")],
        ("top_k", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in ("uniforms", "races")],
    ]


class Chain(ctypes.Structure):
    _fields_ = [
        ("w2", Linear),
        *[(name, ctypes.c_void_p) for name in ("w1", "draft_ids", "confidence", "hidden", "anchors", "sampling", "logits")],
        *[(name, ctypes.c_void_p) for name in ("choices", "confidences", "margins")],
        *[(name, ctypes.c_int32) for name in ("num_requests", "num_tokens", "threads")],
    ]


class Follow(ctypes.Structure):
    _fields_ = [
        ("rest", Segment),
        *[(name, ctypes.c_void_p) for name in ("embeddings", "draft_ids", "sampling", "x", "logits", "choices")],
        ("token", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Passed:
    """What a pass gives, in float32: logits [num_logits, V], tapped states [T, M, D], the normed states behind the logits
    [num_logits, D], and where each row's largest logit is, the first of equals (-1: none is, or one is no number)."""

    logits: torch.Tensor
    tapped: torch.Tensor
    normed: torch.Tensor
    best: list[int]


class Drawn(NamedTuple):
    """What a row's token is drawn by: the softmax at `temperature` of what top-k (0: all), top-p and min-p leave, in this order. Token k is
    the one whose slice of the cumulative law holds `uniforms[k]`, or where there are `races` the one whose probability over its number in
    `races[k]`, float32 [V] by target id, is largest."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniforms: Sequence[float] = ()
    races: Sequence[torch.Tensor] = ()


class Rows(NamedTuple):
    """So many rows of a pass belong to the request of this cache, after `past` cached tokens. The caller counts those. They see
    tokens from `first` on, the first of a page."""

    cache: Cache
    past: int
    num_rows: int
    first: int = 0


def segments(parts: Sequence[Rows]) -> Segments:
    """As stack.cpp reads them. Makes room in the caches, so it comes right before the pass."""
    for part in parts:
        part.cache.reserve(part.past, part.past + part.num_rows)
    described = [Segment(p.cache.addresses.buffer_info()[0], p.num_rows, p.past, p.first) for p in parts]
    return Segments((Segment * len(parts))(*described), len(parts))


class NativeStack:
    """Layers that stack.cpp can run. Holds references to every tensor whose address it handed out."""

    def __init__(
        self, config: Any, layers: Sequence[Any], final_norm: Any, output: torch.Tensor, rope: tuple[torch.Tensor, float],
        joint: tuple[Any, Any, Any] | None = None,
    ):  # fmt: skip
        """`config` names heads and sizes, `layers` are modules in Llama's names, `output` are the rows of the LM head.

        `joint`: the norms of embeddings and of states, and the linear layer that joins the two, or None where the first layer's attention does."""
        self.kept: list[torch.Tensor] = []
        self.num_out, self.dtype = output.shape[0], torch.int8 if is_int8(output) else output.dtype
        self.hidden, self.head_dim = config.hidden_size, config.head_dim
        number = 4 if self.dtype == torch.float32 else 2  # bytes; beside 8-bit weights too
        self.page_bytes = len(layers) * 2 * config.num_key_value_heads * PAGE_TOKENS * config.head_dim * number
        self.layers = (Layer * len(layers))(*[self._layer(layer) for layer in layers])
        inverse_frequencies, rope_scale = rope
        self.stack = Stack(
            len(layers), config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            layers[0].mlp.gate_proj.weight.shape[0], KINDS.index(self.dtype), config.rms_norm_eps, rope_scale,
            self._float(inverse_frequencies), self.layers, self._float(final_norm.weight), self.linear(output), self._joint(*joint or ()),
        )  # fmt: skip

    def _keep(self, tensor: torch.Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _float(self, tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else self._keep(tensor.detach().float().contiguous())

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        weight, scale = weight.detach(), None
        if self.dtype == torch.int8:
            weight, scale = weight.qdata, self._float(weight.scale.flatten())  # type: ignore[attr-defined]
        return Linear(self._keep(weight.to(self.dtype).contiguous()), self._float(bias), scale, *weight.shape)

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        return Layer(
            self._float(layer.input_layernorm.weight), self._float(layer.post_attention_layernorm.weight), *map(self._float, norms),
            *[self.linear(p.weight, p.bias) for p in projections],
        )  # fmt: skip

    def _joint(self, embedded_norm: Any = None, state_norm: Any = None, fc: Any = None) -> Joint:
        norms = [None if norm is None else self._float(norm.weight) for norm in (embedded_norm, state_norm)]
        return Joint(*norms, Linear() if fc is None else self.linear(fc.weight))

    def forward(
        self, parts: Sequence[Rows], x_TD: torch.Tensor, num_logits: int, taps: Sequence[int] = (), causal: bool = True,
        embedded_TD: torch.Tensor | None = None,
    ) -> Passed:  # fmt: skip
        """One pass over rows of requests, those of each after those of the one before it; logits of the last `num_logits`.

        `x_TD` holds embeddings, or states to be joined with `embedded_TD`, in float32; the last layer's states take their place, unless it was
        not contiguous. `causal`: a row sees its request's rows before it and itself; otherwise all of them. A request may come twice, with rows that follow each other."""
        T = len(x_TD)
        logits = torch.empty(num_logits, self.num_out)
        tapped, normed = torch.empty(T, len(taps), self.hidden), torch.empty(num_logits, self.hidden)
        layers, best = (ctypes.c_int32 * len(taps))(*taps), (ctypes.c_int32 * num_logits)()
        x_TD = x_TD.contiguous()
        embedded_TD = None if embedded_TD is None else embedded_TD.contiguous()
        described = Pass(
            segments(parts), causal, num_logits, len(taps), torch.get_num_threads(), ctypes.addressof(layers), x_TD.data_ptr(),
            None if embedded_TD is None else embedded_TD.data_ptr(), tapped.data_ptr(), logits.data_ptr(), normed.data_ptr(), ctypes.addressof(best),
        )  # fmt: skip
        compiled().stack_forward(ctypes.byref(self.stack), ctypes.byref(described))
        return Passed(logits, tapped, normed, list(best))

    def context(self, parts: Sequence[Rows], fc: Linear, norm: torch.Tensor, features: torch.Tensor) -> None:
        """Keys and values of heads' contexts from the target's features [T, M * D], float32."""
        for piece, first, last in passes(parts):
            rows = features[first:last].contiguous()
            described = segments(piece)
            compiled().stack_context(
                ctypes.byref(self.stack), ctypes.byref(described), ctypes.byref(fc), ctypes.c_void_p(norm.data_ptr()),
                ctypes.c_void_p(rows.data_ptr()), torch.get_num_threads(),
            )  # fmt: skip

    def bias(self, w2: Linear, z_Rr: torch.Tensor, logits_R: Sequence[torch.Tensor]) -> list[int]:
        """Add W2 z to rows of float32 logits, in place; where each largest sum is (-1: nowhere, or one is no number)."""
        z_Rr = z_Rr.float().contiguous()
        rows = (ctypes.c_void_p * len(logits_R))(*[row_V.data_ptr() for row_V in logits_R])
        best = (ctypes.c_int32 * len(logits_R))()
        compiled().stack_bias(
            ctypes.byref(self.stack), ctypes.byref(w2), len(logits_R), ctypes.c_void_p(z_Rr.data_ptr()), rows, best,
            torch.get_num_threads(),
        )  # fmt: skip
        return list(best)

    def chain(
        self, w1: torch.Tensor, w2: Linear, draft_ids: torch.Tensor, confidence: torch.Tensor | None,
        anchors: Sequence[int], hidden_R: Sequence[torch.Tensor], logits_R: Sequence[torch.Tensor], drawn_R: Sequence[Drawn | None],
    ) -> list[tuple[list[int], list[float], list[float]]]:  # fmt: skip
        """Drafts after the anchors, through rows of float32 logits [G, Vd] to which the bias W2 W1[previous token] is added in place; each
        token is the best of its row, or drawn, and the row is then its law. Of each request, by token: where it is (-1: no sum
        is finite, or one is no number, then for the rest too), the confidence logit (nothing meant if `confidence`, float32
        [D + r + 1], is None) and how far the second largest sum is below the largest."""
        R, G = len(logits_R), len(logits_R[0])
        choices, confidences, margins = (ctypes.c_int32 * (R * G))(), (ctypes.c_float * (R * G))(), (ctypes.c_float * (R * G))()
        hidden_R = [h_GD.float().contiguous() for h_GD in hidden_R]
        addresses = [(ctypes.c_void_p * R)(*[t.data_ptr() for t in tensors]) for tensors in (hidden_R, logits_R)]
        ids = (ctypes.c_int64 * R)(*anchors)
        sampling, _alive = samplings(drawn_R, G)
        described = Chain(
            w2, w1.data_ptr(), draft_ids.data_ptr(), None if confidence is None else confidence.data_ptr(),
            ctypes.addressof(addresses[0]), ctypes.addressof(ids), ctypes.addressof(sampling), ctypes.addressof(addresses[1]),
            *[ctypes.addressof(array) for array in (choices, confidences, margins)], R, G, torch.get_num_threads(),
        )  # fmt: skip
        compiled().stack_chain(ctypes.byref(self.stack), ctypes.byref(described))
        parts = [slice(r * G, (r + 1) * G) for r in range(R)]
        return [(choices[part], confidences[part], margins[part]) for part in parts]

    def follow(
        self, rest: Rows, embeddings: torch.Tensor, draft_ids: torch.Tensor, x_D: torch.Tensor, token: int, drawn: Drawn | None
    ) -> tuple[list[int], torch.Tensor]:  # fmt: skip
        """What a head that drafts a token a pass says after a slot with the state `x_D`, float32 and overwritten, and `token` behind it, a
        row of `rest` each: where its tokens are (-1 as in `chain`), and logits [G, Vd], which for drawn tokens have become laws.

        `embeddings` [V, D] are of the stack's precision."""
        G = rest.num_rows
        logits, choices = torch.empty(G, self.num_out), (ctypes.c_int32 * G)()
        sampling, _alive = samplings([drawn], G)
        described = Follow(
            segments([rest]).all[0], embeddings.data_ptr(), draft_ids.data_ptr(), ctypes.addressof(sampling), x_D.data_ptr(),
            logits.data_ptr(), ctypes.addressof(choices), token, torch.get_num_threads(),
        )  # fmt: skip
        compiled().stack_follow(ctypes.byref(self.stack), ctypes.byref(described))
        return list(choices), logits


def samplings(drawn_R: Sequence[Drawn | None], num_tokens: int) -> tuple[Any, list]:
    """As stack.cpp reads them, of each request (None: greedy), and what must live as long."""
    uniforms = [(ctypes.c_double * num_tokens)(*(drawn.uniforms if drawn else ())) for drawn in drawn_R]
    races = [(ctypes.c_void_p * num_tokens)(*[race.data_ptr() for race in (drawn.races if drawn else ())]) for drawn in drawn_R]
    described = [
        Sampling(d.temperature, d.top_p, d.min_p, d.top_k, ctypes.addressof(u), ctypes.addressof(r)) if d else Sampling()
        for d, u, r in zip(drawn_R, uniforms, races, strict=True)
    ]
    return (Sampling * len(described))(*described), [uniforms, races]


def passes(parts: Sequence[Rows]) -> Iterator[tuple[list[Rows], int, int]]:
    """The rows in order, `MAX_ROWS` at most at a time: the requests' rows of each pass, and which of all rows they are."""
    piece: list[Rows] = []
    first = size = 0
    for part in parts:
        done = 0
        while done < part.num_rows:
            count = min(part.num_rows - done, MAX_ROWS - size)
            piece.append(Rows(part.cache, part.past + done, count, part.first))
            done, size = done + count, size + count
            if size == MAX_ROWS:
                yield piece, first, first + size
                piece, first, size = [], first + size, 0
    if piece:
        yield piece, first, first + size
