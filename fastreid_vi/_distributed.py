"""Rows of all processes as one batch, for losses that mine pairs."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastreid_vi import _checks


class _Joined(torch.autograd.Function):
    """Concatenates the rows of all processes; the gradient of the own rows comes back.

    Every process computes the whole loss, hence the whole gradient: nothing is sent in backward.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, sizes: tuple[int, ...], scale: float) -> Tensor:
        rank = dist.get_rank(group)
        ctx.first, ctx.count, ctx.scale = sum(sizes[:rank]), sizes[rank], scale
        parts = [rows.new_empty(n, *rows.shape[1:]) for n in sizes]
        if len(set(sizes)) == 1:
            dist.all_gather(parts, rows.contiguous(), group=group)
        else:  # gloo and NCCL gather equal shapes: pad to the longest
            longest = max(sizes)
            padded = rows.new_zeros(longest, *rows.shape[1:])
            padded[: len(rows)] = rows
            wide = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(wide, padded, group=group)
            parts = [part[:n] for part, n in zip(wide, sizes, strict=True)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        own = grad[ctx.first : ctx.first + ctx.count]
        return own if ctx.scale == 1.0 else own * ctx.scale, None, None, None


_alone = contextvars.ContextVar("alone", default=False)
_equal = contextvars.ContextVar("equal", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process acts as if there were no others: nothing is exchanged."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def equal_shares() -> Iterator[None]:
    """Inside, every process promises as many rows as the others: sizes are not exchanged."""
    token = _equal.set(True)
    try:
        yield
    finally:
        _equal.reset(token)


def world_size(group: Any = None) -> int:
    """Processes that take part; 1 without an initialised process group."""
    if _alone.get():
        return 1
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def joined(
    embeddings: Tensor,
    *labels: Tensor,
    group: Any = None,
    equal_sizes: bool = False,
    averaged: bool = False,
) -> tuple[Tensor, ...]:
    """Embeddings and labels of all processes, in the order of their ranks.

    The gradient that reaches `embeddings` is the one that a single process would give its rows in
    the joined batch. Every process must call this, with the same D.

    Args:
        embeddings: [N, D], floating; N may differ between processes.
        labels: each [N], int64.
        group: process group; None is the default one.
        equal_sizes: promise that N is the same everywhere, as inside `equal_shares`: saves the
            exchange of the sizes, which waits for the device.
        averaged: True where gradients are averaged over the processes afterwards, as
            DistributedDataParallel does: they are multiplied by the number of processes here, so
            that the average is the gradient of the joined batch.
    Returns:
        The joined embeddings [sum of N, D] and labels; the arguments themselves without a process
        group.
    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    _checks.embeddings("embeddings", embeddings)
    for index, vector in enumerate(labels):
        _checks.labels_of(f"labels {index}", vector, embeddings.shape[0], embeddings.device)
    world = world_size(group)
    if world == 1:
        return embeddings, *labels
    if equal_sizes or _equal.get():
        sizes = (embeddings.shape[0],) * world
    else:
        counts = [torch.zeros(1, dtype=torch.int64, device=embeddings.device) for _ in range(world)]
        dist.all_gather(counts, torch.full_like(counts[0], embeddings.shape[0]), group=group)
        sizes = tuple(int(n) for n in torch.cat(counts).tolist())
    scale = float(world) if averaged else 1.0
    join: Callable[..., Tensor] = _Joined.apply
    rows = join(embeddings, group, sizes, scale)
    return rows, *(join(vector, group, sizes, 1.0) for vector in labels)
