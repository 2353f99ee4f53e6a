"""Training by several processes that torchrun started: who they are, and what they do together.

Every process has the target and draws the same batch; each takes an equal share of its answers, and gradients are those of the whole
batch, so the number of processes changes a head by rounding only. With `ddp` each has the whole head; with `fsdp` each keeps a share of its
weights, gradients and optimiser states (FSDP2), and a checkpoint holds them whole. The first process alone prints and writes; all must
see the same output folder."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dspark.errors import HeadError, SettingError, UserError
from dspark.head.recurrent import AnyHead
from dspark.train.loss import Losses

PARALLEL = ("ddp", "fsdp")
PATIENCE = timedelta(days=7)  # while the first process measures the others wait; torchrun ends them all if one dies


@dataclass(frozen=True)
class Ranks:
    """The processes of one run as one of them sees them. `ALONE`: there is one, and torch.distributed is not used."""

    rank: int = 0
    size: int = 1
    machine: int = 0
    local_rank: int = 0  # within its machine
    parallel: str = ""  # ddp or fsdp
    device_type: str = "cpu"

    @property
    def leads(self) -> bool:
        """Is this the first process, which prints and writes?"""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        return self.parallel == "fsdp" and self.size > 1

    def share(self, count: int) -> slice:
        """This process's part of so many things, which the processes divide."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def once(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """What `run` returns in the first process, for all; the others wait. A `UserError` there is raised in all of them."""
        if self.size == 1:
            return run(*arguments)
        told: list[Any] = [None, None]
        if self.leads:
            try:
                told[0] = run(*arguments)
            except UserError as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def one_first(self, run: Callable[[], Any]) -> Any:
        """What `run` returns here, run by one process of each machine before the others: it makes files that they then find."""
        if self.size == 1:
            return run()
        made = run() if self.local_rank == 0 else None
        dist.barrier()
        return run() if self.local_rank else made

    def gather(self, mine: Any) -> list[Any]:
        """What each process gives, in their order, for all."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over the processes; it carries no gradient."""
        if self.size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.size

    def wrap(self, head: AnyHead, loss: Callable[..., Losses]) -> Callable[..., Losses]:
        """`loss(head, ...)` with gradients that are the mean over the processes. With `fsdp` the head's parameters are shards from here on."""
        if self.size == 1:
            return loss
        step: Any = Step(head, loss)
        if self.shards:
            step = fully_shard(step, mesh=init_device_mesh(self.device_type, (self.size,)))
        else:
            with warnings.catch_warnings():  # the name is new in torch 2.13, the meaning is not
                warnings.simplefilter("ignore", FutureWarning)
                step = DistributedDataParallel(step, broadcast_buffers=False)  # they are the target's rows, which nobody changes
        return lambda head, *arguments: Losses(*step(*arguments))

    def whole(self, head: AnyHead) -> AnyHead:
        """The head with all of its weights, for measuring: itself, or with `fsdp` a copy. All processes call it."""
        if not self.shards:
            return head
        copied: dict[int, Any] = {
            id(parameter): torch.nn.Parameter(unsharded(parameter).detach(), False) for parameter in head.parameters()
        }
        return copy.deepcopy(head, copied | {id(buffer): buffer for buffer in head.buffers()})


ALONE = Ranks()


class Step(torch.nn.Module):
    """The loss of a batch as a module's forward pass, which is what DDP and FSDP2 take; the fields of `Losses`, since they look for tensors."""

    def __init__(self, head: AnyHead, loss: Callable[..., Losses]):
        super().__init__()
        self.head, self.loss = head, loss

    def forward(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        return tuple(vars(self.loss(self.head, *arguments)).values())


def gathered(head: AnyHead) -> AnyHead:
    """The same head, its parameters no shards any more. All processes call it."""
    for name, parameter in list(head.named_parameters()):
        owner, _, own_name = name.rpartition(".")
        whole = torch.nn.Parameter(unsharded(parameter).detach(), parameter.requires_grad)
        setattr(head.get_submodule(owner), own_name, whole)
    return head


def unsharded(tree: Any) -> Any:
    """Dictionaries and lists with whole tensors in place of shards. All processes call it."""
    if isinstance(tree, dict):
        return {name: unsharded(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [unsharded(value) for value in tree]
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def sharded_like(value: Any, parameter: torch.Tensor | None) -> Any:
    """A parameter's value, or a part of its optimiser's state, cut as the parameter is; anything else as it is."""
    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


@contextmanager
def processes(parallel: str | None, device: str) -> Iterator[Ranks]:
    """The processes that torchrun started, joined; `ALONE` without it. What all of them have to say is said by one.

    Raises `SettingError` for `parallel` without torchrun, and for more processes than GPUs."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        if parallel is not None:
            raise SettingError(
                "--parallel cannot take effect in one process", "start several: `torchrun --nproc-per-node N -m dspark train ...`"
            )
        yield ALONE
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun keeps one store for all its starts: addresses of processes that have ended must not be found in it.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        on_gpu = device.startswith("cuda")
        if on_gpu and local_size > torch.cuda.device_count():
            raise SettingError(
                f"{local_size} processes for {torch.cuda.device_count()} GPUs", "use --nproc-per-node with one process a GPU"
            )
        if on_gpu:
            torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
        yield Ranks(rank, size, rank // local_size, local_rank, parallel or "ddp", "cuda" if on_gpu else "cpu")
        dist.destroy_process_group()
    except RuntimeError as error:
        if "gloo/transport" not in str(error) and not isinstance(error, dist.DistError):
            raise
        told = HeadError(
            "another process of this run has ended", "start the same command with --resume: it goes on from the last checkpoint"
        )
        if new_to(store, "anything"):
            raise told from error
        raise SystemExit(2) from error
    except (UserError, KeyboardInterrupt) as error:
        new_to(store, "anything")
        if new_to(store, repr(error)):
            raise
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from error


def new_to(store: Any, told: str) -> bool:
    """Is this process the first to tell this?"""
    try:
        return store.add(told, 1) == 1
    except RuntimeError:  # torchrun itself is gone
        return True


def restarted() -> bool:
    """Has torchrun started this run again after a process of it failed (`--max-restarts`)?"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
