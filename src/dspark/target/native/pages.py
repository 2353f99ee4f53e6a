"""Memory in huge pages: a pass over 270 MB of weights in pages of 4 kB looks up 66,000 of them, and each costs time when it is first
written to. And what glibc does with memory that is freed."""

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dspark.target.quantize import linear_layers, pieces, quantized

HUGE = 2**21
ALIGNMENT = 64
COPIED = 2**20  # numbers at a time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@functools.cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


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


def gather_weights(model: Any, dtype: torch.dtype | None = None, int8: bool = False) -> bool:
    """Move the model's parameters and buffers into one such block, each after the other; they stay the model's and in its layout.
    Parameters are rounded to `dtype`, if one is named; `int8`: the weights of linear layers then become 8-bit ones (quantize.py).

    What was mapped from a checkpoint is let go piece by piece while it is read; of other tensors there are two of one at most. False
    where the system has no huge pages to ask for; then each parameter has memory of its own, and that precision."""
    linear = {}
    for module in linear_layers(model) if int8 else ():
        module.weight = nn.Parameter(module.weight.data, requires_grad=False)  # one of its own: a tied embedding is not quantised
        linear[module.weight] = module
    owners = [*model.parameters(), *model.buffers()]
    kinds: list[torch.dtype] = [
        torch.int8
        if owner in linear
        else dtype
        if dtype is not None and isinstance(owner, nn.Parameter) and owner.is_floating_point()
        else getattr(owner, "qdata", owner).dtype
        for owner in owners
    ]
    sizes = [-(-owner.numel() * kind.itemsize // ALIGNMENT) * ALIGNMENT for owner, kind in zip(owners, kinds, strict=True)]
    give_back_freed_memory()
    memory = huge_block(sum(sizes))
    release, start = functools.partial(let_go, mapped=mapped_checkpoints()), 0
    for owner, kind, size in zip(owners, kinds, sizes, strict=True):
        tensor, place = getattr(owner, "qdata", owner.data), None
        if memory is not None:
            place = memory[start : start + tensor.numel() * kind.itemsize].view(kind).view(tensor.shape)
            start += size
        if owner in linear:
            weight = quantized(tensor, dtype, place, release)
            linear[owner].weight, place = nn.Parameter(weight, requires_grad=False), weight.qdata
        elif place is None:
            place = tensor.to(kind)
        else:
            copy(tensor, place, release)
        if hasattr(owner, "qdata"):
            owner.qdata = place  # torchao's 8-bit tensor
        else:
            owner.data = place
        release(tensor)
        del tensor
    give_back_freed_memory()
    return memory is not None


def copy(source: torch.Tensor, place: torch.Tensor, done: Callable[[torch.Tensor], None]) -> None:
    """`done` hears which rows have been read so far."""
    if not source.dim():
        place.copy_(source)
        return
    for rows in pieces(source, COPIED):
        place[rows] = source[rows]
        done(source[: rows.stop])


def mapped_checkpoints() -> list[tuple[int, int]]:
    """Addresses, from and to, of the safetensors files that are mapped into this process; none where the system does not tell."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            ranges = [line.split(maxsplit=1)[0].split("-") for line in file if line.rstrip().endswith(".safetensors")]
    except OSError:
        return []
    return [(int(first, 16), int(last, 16)) for first, last in ranges]


def let_go(tensor: torch.Tensor, mapped: list[tuple[int, int]]) -> None:
    """Of a tensor that lies in a mapped file, and that nobody writes to: its pages need no memory of this process any longer. Who reads
    them again gets them from the file."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if any(low <= first and last <= high for low, high in mapped):
        first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        if last > first:
            libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def let_go_of_all(tensors: Iterable[torch.Tensor]) -> None:
    mapped = mapped_checkpoints()
    for tensor in tensors:
        let_go(tensor, mapped)


def give_back_freed_memory() -> None:
    """glibc keeps freed tensors of less than 32 MB for itself: nearly all of a small model."""
    trim = getattr(libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Tensors of any size come from glibc's heap, which keeps what is freed; by default those of 32 MB and more are given back to the
    system and asked for again, each page of theirs a fault when it is first written to: a third of a training step on a virtual
    machine. Afterwards all goes back, and the bounds are those that glibc comes to by itself. Nothing changes where malloc is another."""
    mallopt = getattr(libc(), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**26)
        give_back_freed_memory()
