"""Optimisers and the learning-rate curve."""

import math

import torch

from dspark.config import TrainConfig
from dspark.errors import SettingError
from dspark.head.recurrent import AnyHead


def make_optimizers(head: AnyHead, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything that is trained, or Muon for the matrices of layers and context and AdamW for the rest."""
    if config.optimizer not in ("adamw", "muon"):
        raise SettingError(f"unknown optimizer {config.optimizer!r}", "choose adamw or muon")
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in head.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = config.optimizer == "muon" and parameter.dim() == 2 and name.startswith(("layers.", "midlayer.", "fc."))
        (matrices if inner else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay, ns_steps=5))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, config: TrainConfig) -> None:
    """Linear warm-up over the first share of steps, then a cosine to zero."""
    warm = max(1, round(config.warmup * config.steps))
    scale = (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, config.steps - warm))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
