"""The processes of one run: who they are, what they agree on, how gradients are averaged.

Gradients are averaged here, in a few large messages after the last backward of a phase, and not by
DistributedDataParallel: its buckets and hooks are fixed when a model is wrapped, while our phases
move different parameters from step to step, several belong to one player, some steps accumulate
over batches, and the step of a player must see the averaged gradient of exactly its phase. Nothing
overlaps with backward then; a ResNet-50 has 100 MB of gradients, a few milliseconds on one machine.

What the host has to know (signals, failures, which parameters got a gradient) travels over gloo,
so that no exchange waits for a CUDA device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar, overload

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastreid_vi._distributed import world_size
from fastreid_vi.train.errors import StoppedElsewhere, TrainError
from fastreid_vi.train.step import choose_device

T = TypeVar("T")

# While process 0 evaluates or writes a checkpoint the others wait in an exchange.
_PATIENCE = timedelta(hours=2)
_BUCKET = 2**25  # bytes of gradients in one message
_FAILED = 2**20  # above every signal


class Team:
    """All processes of a run; a run of one process is a team of one, for which nothing is sent.

    Args:
        device: where this process trains.
        control: process group for what the host must know, None for the default one.
    """

    def __init__(self, device: torch.device, control: Any = None) -> None:
        self.device, self._control = device, control
        self.world = world_size()
        self.rank = dist.get_rank() if self.world > 1 else 0

    @property
    def leads(self) -> bool:
        """Whether this process writes, evaluates and speaks."""
        return self.rank == 0

    def agreed(self, signum: int | None, *, failed: bool = False) -> int | None:
        """The signal that any process has received, None for none; every process must ask.

        Raises:
            StoppedElsewhere: another process says that it has failed.
        """
        if self.world == 1:
            return signum
        word = torch.tensor([_FAILED if failed else signum or 0])
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self._control)
        if int(word) == _FAILED and not failed:
            raise StoppedElsewhere("another process of this run failed")
        return int(word) or None

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere; every process must ask."""
        if self.world == 1:
            return flag
        word = torch.tensor([int(flag)])
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self._control)
        return bool(word)

    @overload
    def first(self, work: Callable[[], T]) -> T: ...

    @overload
    def first(self, work: Callable[[], T], *, tell: Literal[False]) -> T | None: ...

    def first(self, work: Callable[[], T], *, tell: bool = True) -> T | None:
        """Let process 0 do something; all get its result, or None there with `tell` false.

        Raises:
            StoppedElsewhere: process 0 failed (there, what it raised).
        """
        if self.world == 1:
            return work()
        result: T | None = None
        outcome: list[Any] = [None, False]
        try:
            if self.leads:
                result = work()
                outcome = [result if tell else None, True]
        finally:
            dist.broadcast_object_list(outcome, 0, group=self._control)
        if not outcome[1]:
            raise StoppedElsewhere("process 0 of this run failed")
        return result if self.leads else outcome[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank; on process 0 only, elsewhere the own one."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.leads else None
        dist.gather_object(value, found, 0, group=self._control)
        return [value] if found is None else found

    def mean(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars averaged over processes."""
        if self.world == 1 or not terms:
            return terms
        packed = torch.stack([term.detach().double() for term in terms.values()])
        dist.all_reduce(packed)
        packed /= self.world
        dtypes = [term.dtype for term in terms.values()]
        values = (v.to(d) for v, d in zip(packed.unbind(), dtypes, strict=True))
        return dict(zip(terms, values, strict=True))

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every parameter the mean of its gradients.

        One that has none here but somewhere (a stem without rows of its modality) counts as zero.
        One that has none anywhere keeps none, so that the optimiser leaves it alone.
        """
        if self.world == 1:
            return
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self._control)
        chosen = [p for p, flag in zip(parameters, used.tolist(), strict=True) if flag]
        for parameter in chosen:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in chosen if p.grad is not None]):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(flat)
            flat /= self.world
            parts = torch.split(flat, [grad.numel() for grad in bucket])
            for grad, part in zip(bucket, parts, strict=True):
                grad.copy_(part.view(grad.shape))

    @torch.no_grad()
    def average_buffers(self, module: nn.Module) -> None:
        """Give running statistics their mean over processes.

        Those of batch norms that are joined already agree; those of instance norms are moving
        averages over images, and the mean over equal shares is that of the whole batch.
        """
        if self.world == 1:
            return
        for buffer in module.buffers():
            if buffer.is_floating_point():
                mean = buffer.contiguous()
                dist.all_reduce(mean)
                buffer.copy_(mean / self.world)

    @torch.no_grad()
    def share(self, module: nn.Module) -> None:
        """Give every process the parameters and buffers of process 0."""
        if self.world == 1:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            same = tensor.detach().contiguous()
            dist.broadcast(same, 0)
            tensor.copy_(same)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype, each a message."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.nbytes for t in bucket) >= _BUCKET
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Number of this process among those of its launcher, before any of them has met; else 0."""
    return int(os.environ["RANK"]) if launched() else 0


def leave(code: int) -> NoReturn:
    """End this process of torchrun at once, its output written.

    While an interpreter shuts down, gloo's threads abort now and then ("terminate called without an
    active exception"), and torchrun would take a finished run for a dead one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def restarted() -> bool:
    """Whether torchrun started this process again after one of the run died (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def own_device(device: torch.device | str | None) -> torch.device:
    """`choose_device`; started by torchrun, the CUDA device of this process' LOCAL_RANK.

    Raises:
        TrainError: no such device, or one number for several processes.
    """
    if not launched():
        return choose_device(device)
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type != "cuda":
        return choose_device(wanted)
    if wanted.index is not None:
        raise TrainError(f"device: expected cuda without a number under torchrun, got {wanted}")
    return choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")


def _meet(backend: str) -> None:
    """Join the default process group.

    torchrun keeps one store for all restarts on a machine, and gloo's addresses of dead processes
    in it: every start has names of its own.
    """
    store, number, world = next(rendezvous("env://", timeout=_PATIENCE))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"fastreid_vi/{start}", store)
    dist.init_process_group(backend, store=own, rank=number, world_size=world, timeout=_PATIENCE)


@contextmanager
def team(device: torch.device | str | None) -> Iterator[Team]:
    """Meet the other processes of torchrun, gloo on CPU and NCCL on CUDA; a team of one without.

    A default process group that exists already is used and left alone.

    Raises:
        TrainError: no such device.
    """
    place = own_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    mine = launched() and not dist.is_initialized()
    if mine:
        _meet("nccl" if place.type == "cuda" else "gloo")
    try:
        several = world_size() > 1
        control = None
        if several and dist.get_backend() != "gloo":
            control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield Team(place, control)
    finally:
        if mine:
            dist.destroy_process_group()
