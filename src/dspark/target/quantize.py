"""8-bit weights by torchao: whole numbers with one scale an output row (weight-only, symmetric).

What the target then says is what these weights say; speculation is lossless against that."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dspark.errors import SettingError

PIECE = 2**16  # numbers at once: quantising has them in float32 several times over, and that fits a processor's cache


def torchao_quantization() -> Any:
    """torchao's module of that name. Raises `SettingError` when it is not installed."""
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise SettingError("8-bit weights need torchao", "pip install 'dspark[int8]', in a checkout '.[int8]'") from error


def quantize_int8(model: Any) -> None:
    """Replace the weights of all linear layers, the LM head's among them. A tied input embedding stays as it is.

    Raises `SettingError` when torchao is not installed."""
    for module in linear_layers(model):
        module.weight = nn.Parameter(quantized(module.weight.detach()), requires_grad=False)


def linear_layers(model: Any) -> list[nn.Linear]:
    """Those that get 8-bit weights; `nn.MultiheadAttention` reads its own past the module, so it keeps them."""
    others = nn.modules.linear.NonDynamicallyQuantizableLinear
    return [module for module in model.modules() if isinstance(module, nn.Linear) and not isinstance(module, others)]


def quantized(
    weight: torch.Tensor,
    dtype: torch.dtype | None = None,
    place: torch.Tensor | None = None,
    done: Callable[[torch.Tensor], None] = lambda rows: None,
) -> Any:
    """torchao's 8-bit tensor of a matrix, made of some rows at a time; each row has a scale of its own, so the numbers are those of the
    whole at once. `dtype`: what the matrix is rounded to before. The 8-bit numbers lie in `place`, if one is given. `done` hears which rows
    have been read so far.

    Raises `SettingError` when torchao is not installed."""
    torchao = torchao_quantization()
    qdata = torch.empty(weight.shape, dtype=torch.int8, device=weight.device) if place is None else place
    dtype, scales = dtype or weight.dtype, []
    for rows in pieces(weight, PIECE):
        piece = torchao.Int8Tensor.from_hp(weight[rows].to(dtype), torchao.PerRow())
        qdata[rows] = piece.qdata
        scales.append(piece.scale)
        done(weight[: rows.stop])
    return torchao.Int8Tensor(qdata, torch.cat(scales), [1, weight.shape[1]], dtype)


def pieces(tensor: torch.Tensor, most: int) -> Iterator[slice]:
    """All its rows, `most` numbers at a time, or one row where that has more."""
    num_rows = max(1, most * len(tensor) // max(1, tensor.numel()))
    for first in range(0, len(tensor), num_rows):
        yield slice(first, min(first + num_rows, len(tensor)))


def is_int8(weight: torch.Tensor) -> bool:
    """Is this torchao's tensor of 8-bit whole numbers with a scale a row?"""
    scale = getattr(weight, "scale", None)
    return getattr(weight, "qdata", weight).dtype == torch.int8 and scale is not None and scale.numel() == weight.shape[0]


def rows_of(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a weight matrix in float32, whatever its precision."""
    weight = weight.detach()
    if is_int8(weight):
        return weight.qdata[ids].float() * weight.scale.view(-1, 1)[ids].float()  # type: ignore[attr-defined]
    return weight[ids].float()


def num_bytes(weight: torch.Tensor) -> int:
    if is_int8(weight):
        return weight.numel() + weight.scale.numel() * weight.scale.element_size()  # type: ignore[attr-defined]
    return weight.numel() * weight.element_size()
