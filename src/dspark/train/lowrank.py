"""Low-rank updates (LoRA): a trained model is kept as it is and learns W + B A beside each large matrix W.

torch's parametrizations hold the factors, so that whoever reads a weight sees the sum."""

import torch
from torch import nn
from torch.nn.utils import parametrize


class Update(nn.Module):
    """W -> W + B A of rank R. B starts at 0: the weight starts as it was."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.b = nn.Parameter(weight.new_zeros(rows, rank))
        self.a = nn.Parameter(torch.randn(rank, columns).to(weight) * columns**-0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


def matrices(model: nn.Module, rank: int) -> list[nn.Linear | nn.Embedding]:
    """Linear layers and embeddings that a factorisation of this rank makes smaller."""
    found: list[nn.Linear | nn.Embedding] = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            rows, columns = module.weight.shape
            if rank * (rows + columns) < rows * columns:
                found.append(module)
    return found


def add_low_rank(model: nn.Module, rank: int, seed: int) -> int:
    """Give every large matrix below `model` an update of this rank and freeze the matrix; all else is trained as before.

    Returns the number of matrices that got one."""
    chosen = matrices(model, rank)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in chosen:
            module.weight.requires_grad_(False)
            parametrize.register_parametrization(module, "weight", Update(module.weight, rank))
    return len(chosen)


def merge_low_rank(model: nn.Module) -> None:
    """Put the updates into the matrices, which are plain weights again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
