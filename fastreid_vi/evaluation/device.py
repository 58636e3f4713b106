"""Ranking and search where the arrays are: CUDA tensors, CuPy and DLPack arrays on a device.

No distances and no features come to the host. `evaluation` imports this module when such an array
comes, for it imports torch. Results are those of the host's rooms to the last bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from fastreid_vi.evaluation import device_ops
from fastreid_vi.evaluation.arrays import Dense, Int, on_device
from fastreid_vi.evaluation.exact_search import Rows
from fastreid_vi.evaluation.nearest import Metric
from fastreid_vi.evaluation.positions import Labels, Ranks

ROWS: Final = 2**17  # of the gallery, searched together
QUERIES: Final = 4096  # multiplied at once
PRODUCTS: Final = 2**25  # in memory at one time
PAIRS: Final = 2**22  # scored at one time where nothing can be discarded
MARGIN: Final = 32  # candidates beyond k, at least
_DTYPES: Final = {4: torch.float32, 8: torch.float64}


def tensor_of(name: str, value: Any, shape: str) -> Tensor:
    """A matrix on a device, without a copy: half precisions as float32, integers as float64."""
    tensor = _tensor(value)
    described = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{name}: expected real numbers {shape}, got {described}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected shape {shape}, got {described}")
    single = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.float32 if single else torch.float64)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    shared: Tensor = torch.utils.dlpack.from_dlpack(value)
    return shared


def like(reference: Any, tensor: Tensor) -> Any:
    """A result as the kind of array that came, on its device."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(reference, cupy.ndarray):
        return cupy.from_dlpack(tensor)
    return tensor


# Ranking.


def rank_rows(distance: Tensor, labels: Labels, galleries: Sequence[Int]) -> tuple[Ranks, Dense]:
    """Place the matches of every row in every gallery, as `positions.rank_rows`.

    Args:
        distance: [R, N], float32 or float64, any strides: queries x pool.
        labels: of these R queries and N pool images.
        galleries: T lists of pool columns in gallery order.
    Returns:
        Ranks, and the first column with a NaN in each row, -1 for none, [R], on the host.
    """

    def there(values: Any, dtype: Any) -> Tensor:
        return torch.from_numpy(np.array(values, dtype)).to(distance.device)

    identities = [np.bincount(labels.pool_ids[columns]) for columns in galleries]
    found = device_ops.rank_rows(
        distance,
        there(labels.query_ids, np.int32),
        there(labels.query_places, np.int32),
        there(labels.pool_ids, np.int32),
        there(labels.pool_places, np.int32),
        there(np.concatenate([np.zeros(0, np.int64), *galleries]), np.int32),
        there(np.cumsum([0, *map(len, galleries)]), np.int64),
        int(labels.pool_ids.max(initial=-1)) + 1,
        max((int(counts.max(initial=0)) for counts in identities), default=0),
        labels.rule,
    )
    *counts, nan_column = (part.cpu().numpy() for part in found)
    return Ranks(*counts), nan_column


# Search.


class _Best(NamedTuple):
    """The best so far, [Q, n] each, best first; keys fall: similarities or negated distances."""

    keys: Tensor
    indices: Tensor

    @classmethod
    def none(cls, queries: Tensor) -> _Best:
        empty = queries.new_empty((len(queries), 0))
        return cls(empty, empty.long())

    def merged(
        self,
        scores: Tensor,
        k: int,
        first: int = 0,
        *,
        indices: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> _Best:
        """With a block of scores that begins at an index, or has `indices`."""
        return _Best(*device_ops.merge_top_k(*self, scores, indices, scale, shift, first, k))


class _Part(NamedTuple):
    """Gallery rows on the device, from index `first` on."""

    rows: Tensor  # [n, D]
    norms: Tensor  # [n] float64
    first: int


def search(query: Any, gallery: Any, k: int, metric: Metric, block: int | None) -> tuple[Any, Any]:
    """`search` of a query on a device; the gallery may be there or anywhere else."""
    queries = tensor_of("query", query, "[Q, D]")
    if 0 in queries.shape:
        raise ValueError(f"query: expected at least one row and column, got {list(queries.shape)}")
    there = on_device(gallery)
    rows = Rows(_tensor(gallery) if there else gallery)
    rows.check(queries.shape[1], k)
    queries = queries.to(torch.promote_types(queries.dtype, _DTYPES[rows.dtype.itemsize]))
    norms = _finite_norms("query", queries, 0)
    chunks = [slice(i, i + QUERIES) for i in range(0, len(queries), QUERIES)]
    best = [_Best.none(queries[some]) for some in chunks]
    with full_precision():
        for part in _parts(_tensor(gallery) if there else rows, queries, block or ROWS):
            for i, some in enumerate(chunks):
                best[i] = _nearer(best[i], queries[some], norms[some], part, k, metric)
    keys, indices = (torch.cat(parts) for parts in zip(*best, strict=True))
    scores = 0 - keys if metric == "euclidean" else keys
    return like(query, scores), like(query, indices)


def _parts(gallery: Tensor | Rows, queries: Tensor, step: int) -> Iterator[_Part]:
    for first in range(0, len(gallery), step):
        if isinstance(gallery, Tensor):
            part = tensor_of("gallery", gallery[first : first + step], "[G, D]")
        else:
            rows = gallery.read(first, first + step, gallery.dtype)
            part = torch.from_numpy(np.require(rows, requirements=["C", "W"]))
        part = part.to(queries)
        yield _Part(part, _finite_norms("gallery", part, first), first)


def _finite_norms(name: str, rows: Tensor, first: int) -> Tensor:
    """Norms of rows that are finite, or an error that names the first that is not."""
    norms: Tensor = device_ops.row_norms(rows)
    bad = ~norms.isfinite()
    if bool(bad.any()):
        row = int(bad.byte().argmax())
        if bool(rows[row].isfinite().all()):
            raise ValueError(f"{name}: the squared length of row {first + row} overflows")
        what = "NaN" if bool(rows[row].isnan().any()) else "an infinity"
        raise ValueError(f"{name}: expected finite numbers, got {what} in row {first + row}")
    return norms


def _nearer(
    best: _Best, queries: Tensor, norms: Tensor, part: _Part, k: int, metric: Metric
) -> _Best:
    """The k best of a list and a part of the gallery.

    Products choose candidates, more than k. Their rounding errors have a bound: where the worst of
    the candidates is farther than that behind the k-th best score, no other row can be among the
    best. For the queries where it is not (near duplicates, overflow) every row is scored.
    """
    wanted = min(k + max(k // 4, MARGIN), len(part.rows))
    scale, shift = _terms(metric, part.norms, queries.dtype)
    close = _Best.none(queries)
    step = max(PRODUCTS // len(queries), 1024)
    for begin in range(0, len(part.rows), step):
        some = slice(begin, begin + step)
        close = close.merged(
            torch.mm(queries, part.rows[some].t()),
            wanted,
            begin,
            scale=None if scale is None else scale[some],
            shift=None if shift is None else shift[some],
        )
    scores = device_ops.pair_scores(queries, part.rows, norms, part.norms, close.indices, metric)
    nearer = best.merged(scores, k, indices=close.indices + part.first)
    if wanted == len(part.rows):
        return nearer
    floor = nearer.keys[:, k - 1].double()
    slack = _slack(metric, norms, part.norms, queries.shape[1], queries.dtype)
    limit = {
        "cosine": floor * norms,
        "inner": floor,
        "euclidean": (norms * norms - floor * floor) / 2,
    }[metric]
    sure = (close.keys[:, -1].double() < limit - slack) & slack.isfinite()
    unsure = (~sure).nonzero()[:, 0]
    if len(unsure):
        exact = _Best(best.keys[unsure], best.indices[unsure])
        exact = _score_all(exact, queries[unsure], norms[unsure], part, k, metric)
        nearer.keys[unsure], nearer.indices[unsure] = exact
    return nearer


def _score_all(
    best: _Best, queries: Tensor, norms: Tensor, part: _Part, k: int, metric: Metric
) -> _Best:
    step = max(PAIRS // len(queries), 1)
    for begin in range(0, len(part.rows), step):
        columns = torch.arange(
            begin, min(begin + step, len(part.rows)), device=queries.device
        ).repeat(len(queries), 1)
        scores = device_ops.pair_scores(queries, part.rows, norms, part.norms, columns, metric)
        best = best.merged(scores, k, part.first + begin)
    return best


def _terms(
    metric: Metric, norms: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of a product that make it fall with the distance."""
    if metric == "cosine":
        return torch.where(norms > 0, 1 / norms, 0.0).to(dtype), None
    if metric == "euclidean":
        return None, (norms * norms / 2).to(dtype)
    return None, None


def _slack(metric: Metric, norm: Tensor, norms: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Bound on the error of a candidate's closeness, [q]; see `nearest._slack`."""
    limits = torch.finfo(dtype)
    unit, tiny = limits.eps / 2, limits.tiny
    if dim * unit > 0.25:
        return torch.full_like(norm, torch.inf)
    most, least = norms.max(), torch.where(norms > 0, norms, torch.inf).min()
    gamma = (2 if limits.bits == 64 else 1) * dim * unit / (1 - dim * unit)
    underflow = dim * tiny * (1 + norm + most)
    reach = (norm + most) ** 2
    if metric == "cosine":
        slack = (gamma + 16 * unit) * norm + underflow / least
    elif metric == "inner":
        slack = (gamma + 16 * unit) * norm * most + underflow
    else:
        slack = gamma * norm * most + 16 * unit * reach + underflow
    safe = (reach < limits.max / 8) & (least > 4 * tiny)
    return torch.where(safe, slack, torch.inf)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32, not TF32, which has 10 bits."""
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
