"""Memory in huge pages: a pass over 270 MB of weights in pages of 4 kB looks up 66,000 of them, and each costs time when it is first
written to."""

import ctypes
import mmap
from typing import Any

import torch

HUGE = 2**21
ALIGNMENT = 64


def huge_block(size: int) -> torch.Tensor | None:
    """Zeros [size], as bytes, which the system has back when the last tensor on them is gone; None where it has no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    block = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return None
    memory = torch.frombuffer(block, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE
    return memory[start : start + size]


def gather_weights(model: Any) -> bool:
    """Move the model's parameters into one such block, each after the other; they stay the model's and in its layout.

    Memory grows by one tensor at most, while it is copied. False where the system has no huge pages to ask for."""
    tensors = [(p, getattr(p, "qdata", p.data)) for p in model.parameters()]
    size = sum(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for _, t in tensors)
    memory = huge_block(size)
    if memory is None:
        return False
    start = 0
    for parameter, tensor in tensors:
        place = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        if tensor is getattr(parameter, "qdata", None):
            parameter.qdata = place  # torchao's 8-bit tensor
        else:
            parameter.data = place
        start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    del tensors, tensor
    give_back_freed_memory()
    return True


def give_back_freed_memory() -> None:
    """glibc keeps freed tensors of less than 32 MB for itself: nearly all of a small model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
