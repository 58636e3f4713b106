"""Whose statistics the norms of a network use, and who moves the running ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def in_parts(network: nn.Module, batch: Tensor, parts: int) -> Any:
    """Run a network on equal parts of a batch, as data parallelism does (A6).

    Every part has statistics of its own; the running ones come from the first.

    Args:
        network: gives a tensor, or a tuple of tensors, with one row per row of `batch`.
        batch: [B, ...].
        parts: 1 runs the whole batch.
    """
    if parts == 1 or not network.training:
        return network(batch)
    first, *others = batch.chunk(parts)
    results = [network(first)]
    with _untracked(network):
        results += [network(part) for part in others]
    if isinstance(results[0], Tensor):
        return torch.cat(results)
    return tuple(torch.cat(columns) for columns in zip(*results, strict=True))


@contextmanager
def _untracked(network: nn.Module) -> Iterator[None]:
    """Norms leave their running statistics alone."""
    norms = [m for m in network.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def fixed_batch_norm(*networks: nn.Module) -> Iterator[None]:
    """Batch norms use their running statistics and leave them as they are."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    found = [m for n in networks for m in n.modules() if isinstance(m, kinds) and m.training]
    for norm in found:
        norm.eval()
    try:
        yield
    finally:
        for norm in found:
            norm.train()
