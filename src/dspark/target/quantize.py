"""8-bit weights by torchao: whole numbers with one scale an output row (weight-only, symmetric).

What the target then says is what these weights say; speculation is lossless against that."""

from typing import Any

import torch

from dspark.errors import SettingError


def quantize_int8(model: Any) -> None:
    """Replace the weights of all linear layers, the LM head's among them. A tied input embedding stays as it is.

    Raises `SettingError` when torchao is not installed."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise SettingError("8-bit weights need torchao", "pip install 'dspark[int8]', in a checkout '.[int8]'") from error
    quantize_(model, Int8WeightOnlyConfig(version=2))


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
