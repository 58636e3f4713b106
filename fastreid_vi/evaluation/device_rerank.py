"""Re-ranking where the features are: CUDA tensors, CuPy and DLPack arrays on a device.

What `rerank_sparse` does on the host, with the same steps and the same order of additions. Given
equal distances the lists and sets are equal; products of other libraries round otherwise.

Of the distances of all items there are blocks only, twice `DISTANCES` numbers at a time. What stays
is the distances of queries to gallery images, lists, and V and V' in rows padded to their longest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastreid_vi.evaluation import device, device_ops, device_rerank_ops
from fastreid_vi.evaluation.arrays import on_device, real_matrix
from fastreid_vi.evaluation.rerank_reference import ROUNDING, Method
from fastreid_vi.evaluation.rerank_sparse import NORM_ROWS, Shape, lengths

DISTANCES: Final = 2**25  # in memory at one time
# Squares of such numbers, and sums of them, are far from the ends of float32.
SAFE_EXPONENT: Final = 40

like = device.like


class Nearest(NamedTuple):
    """What distances leave behind."""

    lists: Tensor  # [R, L] int32, of the items that can be neighbours
    distances: Tensor  # [R, L] float32; NaN where an entry is there by its index
    other_lists: Tensor  # [N - R, l] int32
    maxima: Tensor  # [R] float32 m
    base: Tensor  # [query items, images] float32, added up over the gallery's sets


def feature_sets(named: Sequence[tuple[str, Any]]) -> list[Tensor]:
    """Float32 matrices of one width, finite, on the device of the first one; see `rerank`."""
    first, target, tensors, largest = named[0][0], None, [], 0.0
    for name, value in named:
        if on_device(value):
            tensor = device.tensor_of(name, value, "[n, D]")
        else:
            tensor = torch.from_numpy(np.array(real_matrix(name, value, "[n, D]")))
        if not tensor.numel():
            raise ValueError(
                f"{name}: expected one row and one number at least, got shape {list(tensor.shape)}"
            )
        target = tensor.device if target is None else target
        tensors.append(tensor.to(target))
        width = tensors[0].shape[1]
        if tensor.shape[1] != width:
            raise ValueError(
                f"{first}, {name}: expected equal lengths, got {width} and {tensor.shape[1]}"
            )
        extent = float(tensor.abs().max())
        if not math.isfinite(extent):
            row = int((~tensor.isfinite()).any(1).byte().argmax())
            raise ValueError(f"{name}: row {row} is not finite")
        largest = max(largest, extent)
    exponent = math.frexp(largest)[1]
    if largest and abs(exponent) > SAFE_EXPONENT:
        half = exponent // 2  # 2 to the whole may not be a number
        tensors = [t.double() * 2.0**-half * 2.0 ** (half - exponent) for t in tensors]
    return [tensor.to(torch.float32).contiguous() for tensor in tensors]


def rerank(queries: Sequence[Tensor], galleries: Sequence[Tensor], method: Method) -> Tensor:
    """F, [Q, G] float32, of checked sets of features; one of the two sides has one set."""
    shape = Shape(len(queries[0]), len(queries), len(galleries[0]), len(galleries))
    items = torch.cat([*queries, *galleries])
    squares = _squares(items)
    found = nearest(items, squares, shape, method)
    rows = len(found.lists)
    rounding = ROUNDING * torch.finfo(torch.float32).eps * squares[:rows]
    encoding = device_rerank_ops.rerank_neighbors(
        found.lists, found.distances, items[:rows], found.maxima, rounding,
        min(method.k1, shape.items), min(method.half, shape.items), method.expand,
    )  # fmt: skip
    lists = averaged_lists(found, method)
    room = min(int(encoding[0].max()) * lists.shape[1], rows)
    asking = device_rerank_ops.rerank_average(lists[: shape.query_items], *encoding, room)
    counts, *asked = device_rerank_ops.rerank_average(lists[shape.query_items :], *encoding, room)
    columns, values = (part.t().contiguous() for part in asked)
    del asked, encoding
    result: Tensor = device_rerank_ops.rerank_fuse(
        *asking, counts, columns, values, found.base,
        found.maxima[: shape.query_items], rounding[: shape.query_items],
        shape.query_sets, shape.gallery_sets, rows, method.weight,
    )  # fmt: skip
    return result


def nearest(items: Tensor, squares: Tensor, shape: Shape, method: Method) -> Nearest:
    """Lists by (distance, index), largest distances, and distances of queries to images."""
    sizes = lengths(shape, method)
    near = min(sizes.keep, sizes.candidates)
    keys, places, maxima, base = [], [], [], []
    step = max(1, DISTANCES // shape.items)
    with device.full_precision():
        for begin in range(0, sizes.rows, step):
            end = min(begin + step, sizes.rows)
            negative = _negative_distances(items[begin:end], squares[begin:end], items, squares)
            nearer = _first(negative[:, : sizes.candidates], near)
            keys.append(0 - nearer[0])
            places.append(nearer[1])
            maxima.append(0 - negative.amin(1))
            to_gallery = negative[: max(shape.query_items - begin, 0), shape.query_items :]
            sums = torch.zeros((), device=items.device)
            for first in range(0, to_gallery.shape[1], shape.images):
                sums = sums - to_gallery[:, first : first + shape.images]
            base.append(sums)
        others = [places[0][:0, :0]]
        for begin in range(sizes.rows, shape.items, step):
            end = min(begin + step, shape.items)
            negative = _negative_distances(
                items[begin:end], squares[begin:end], items[: sizes.candidates], squares
            )
            others.append(_first(negative, min(sizes.keep_others, sizes.candidates))[1])
    # Where candidates are fewer than a list is long, it runs on by index.
    lists = _extended(torch.cat(places), sizes.keep)
    other_lists = _extended(torch.cat(others[1:] or others), sizes.keep_others)
    unknown = keys[0].new_full((sizes.rows, sizes.keep - near), torch.nan)
    distances = torch.cat([torch.cat(keys), unknown], 1)
    return Nearest(lists, distances, other_lists, torch.cat(maxima), torch.cat(base))


def averaged_lists(found: Nearest, method: Method) -> Tensor:
    """Rows of V whose mean is an item's row of V', [N, K] int32; -1 for none."""
    rows, others = found.lists, found.other_lists
    if method.k2 > 1:
        nearest_rows = rows[:, : method.k2].contiguous()
        return torch.cat([nearest_rows, others]) if len(others) else nearest_rows
    own = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    return torch.cat([own, own.new_full((len(others),), -1)])[:, None]


def _negative_distances(rows: Tensor, own: Tensor, columns: Tensor, squares: Tensor) -> Tensor:
    """Minus D, [rows, columns]."""
    products = torch.mm(rows, columns.t())
    return products.mul_(2).sub_(own[:, None] + squares[: len(columns)])


def _first(negative: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The nearest, ties by index."""
    none = negative.new_empty((len(negative), 0))
    found: tuple[Tensor, Tensor] = device_ops.merge_top_k(
        none, none.long(), negative, None, None, None, 0, keep
    )
    return found


def _extended(lists: Tensor, length: int) -> Tensor:
    more = torch.arange(lists.shape[1], length, device=lists.device).expand(len(lists), -1)
    return torch.cat([lists, more], 1).int()


def _squares(items: Tensor) -> Tensor:
    """Squared norms, summed in float64."""
    step = 16 * NORM_ROWS
    parts = (items[i : i + step].double().square().sum(1) for i in range(0, len(items), step))
    return torch.cat(list(parts)).float()
