"""The whole augmentation in one launch: bytes are taken, changed, looked up and written.

A program owns ROWS x COLUMNS elements of one slot. In channels_last a row of the result is a run of
3 W elements and channel i % 3 comes out of i, so that stores are whole 128-bit vectors; in NCHW a
row is W pixels of one plane. What depends on the row or on the column alone (flip, crop, boxes) is
worked out once per row and column; what the plan says about the slot decides branches that are
the same for the whole program. Levels are picked from shared memory: neighbours look up entries
that lie anywhere in the table.

An H200 moves 3 H W bytes in and 3 H W sizeof(result) out per slot: at 4 TB/s, 1e6 B H W (3 + 3
sizeof) / 4e12 microseconds. A mix needs the sums of the whole image and so a launch before this.

Bytes are those of the reference: no fused multiply-add, divisions rounded as IEEE 754 does. Values
out of range, which nobody looks at on CUDA, are clamped and read nothing outside.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreid_vi.kernels._common import INTERPRETED
from fastreid_vi.kernels._spectra import _box, _changed, _nearest, _one_of_three, _within

ELEMENTS = 4096  # of one program: 32 loads under way per thread hide what memory takes to answer
PART = 512  # of them at a time where there is arithmetic to hold; half of it with sums of a mix
WASTE = 1 / 8  # share of a program's columns that may lie outside the image

# Not those of `_common`: the reference rounds after every operation.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def _rounded(x, kind: tl.constexpr, INTERPRETED: tl.constexpr):
    """In the dtype of the result; the interpreter would cut bfloat16 off."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 32767 + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def _source(images_ptr, source_ptr, b, images, stride_n):
    n = tl.minimum(tl.maximum(tl.load(source_ptr + b), 0), images - 1)
    return images_ptr + n * stride_n


@triton.jit
def _moments_kernel(
    images_ptr, source_ptr, kind_ptr, hue_ptr, weights_ptr, boxes_ptr, planes_ptr, channel_ptr,
    factor_ptr, nearest_ptr, mix_ptr, sums_ptr,
    images, height, width, stride_n, stride_h, stride_w, stride_c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of the changed channels, and of their products 00, 11, 22, 01, 02, 12.

    A program adds ROWS x COLUMNS pixels of a slot to its nine whole numbers.
    """
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    b = (tl.program_id(0) // (across * down)).to(tl.int64)
    mixed = tl.load(mix_ptr + b * 5 + 4) != 0.0
    if mixed:
        x = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        y = tl.program_id(0) // across % down * ROWS + tl.arange(0, ROWS)
        inside = (y < height)[:, None] & (x < width)[None, :]
        start = _source(images_ptr, source_ptr, b, images, stride_n)
        place = start + y.to(tl.int64) * stride_h
        pixel = place[:, None] + (x.to(tl.int64) * stride_w)[None, :]
        packed = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
        for k in range(0, tl.where(mixed, 3, 0)):  # not unrolled
            v = _changed(
                pixel, stride_c, inside, k, y, x, height, width, b, kind_ptr, hue_ptr, weights_ptr,
                boxes_ptr, planes_ptr, channel_ptr, factor_ptr, nearest_ptr,
            )  # fmt: skip
            packed += v << (8 * k)
        packed = tl.where(inside, packed, 0)
        red, green, blue = packed & 255, (packed >> 8) & 255, packed >> 16
        sums = sums_ptr + b * 9
        tl.atomic_add(sums, tl.sum(red).to(tl.int64))
        tl.atomic_add(sums + 1, tl.sum(green).to(tl.int64))
        tl.atomic_add(sums + 2, tl.sum(blue).to(tl.int64))
        tl.atomic_add(sums + 3, tl.sum(red * red).to(tl.int64))
        tl.atomic_add(sums + 4, tl.sum(green * green).to(tl.int64))
        tl.atomic_add(sums + 5, tl.sum(blue * blue).to(tl.int64))
        tl.atomic_add(sums + 6, tl.sum(red * green).to(tl.int64))
        tl.atomic_add(sums + 7, tl.sum(red * blue).to(tl.int64))
        tl.atomic_add(sums + 8, tl.sum(green * blue).to(tl.int64))


@triton.jit
def _number(pointer):
    return tl.load(pointer).to(tl.float64)


@triton.jit
def _tone(sums_ptr, mix_ptr, count):
    """Scale of the weights and offset that give the asked mean and spread, in this order."""
    s0, s1, s2 = _number(sums_ptr), _number(sums_ptr + 1), _number(sums_ptr + 2)
    w0, w1, w2 = _number(mix_ptr), _number(mix_ptr + 1), _number(mix_ptr + 2)
    own = (w0 * w0) * (_number(sums_ptr + 3) - s0 * s0 / count)
    own += (w1 * w1) * (_number(sums_ptr + 4) - s1 * s1 / count)
    own += (w2 * w2) * (_number(sums_ptr + 5) - s2 * s2 / count)
    cross = (w0 * w1) * (_number(sums_ptr + 6) - s0 * s1 / count)
    cross += (w0 * w2) * (_number(sums_ptr + 7) - s0 * s2 / count)
    cross += (w1 * w2) * (_number(sums_ptr + 8) - s1 * s2 / count)
    deviation = tl.sqrt(tl.maximum((own + 2.0 * cross) / count, 0.0))
    scale = _number(mix_ptr + 4) / (deviation + tl.full([], 1e-3, tl.float64))
    mean = ((w0 * s0 + w1 * s1) + w2 * s2) / count
    return scale, _number(mix_ptr + 3) - mean * scale


@triton.jit
def _shown(
    pixel, stride_c, inside, c, row, column, height, width, b,
    kind_ptr, hue_ptr, weights_ptr, boxes_ptr, planes_ptr, channel_ptr, factor_ptr, nearest_ptr,
    mix_ptr, mixed, scale, offset, MIX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Channel c after the change, or the three of them mixed."""
    if MIX:
        v = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
        grey = tl.zeros([ROWS, COLUMNS], dtype=tl.float64)
        for k in range(0, tl.where(mixed, 3, 1)):
            v = _changed(
                pixel, stride_c, inside, tl.where(mixed, k, c)[None, :], row, column, height,
                width, b, kind_ptr, hue_ptr, weights_ptr, boxes_ptr, planes_ptr, channel_ptr,
                factor_ptr, nearest_ptr,
            )  # fmt: skip
            grey += _number(mix_ptr + b * 5 + k) * scale * v.to(tl.float64)
        grey = _nearest(tl.minimum(tl.maximum(grey + offset, 0.0), 255.0))
        v = tl.where(mixed, grey.to(tl.int32) & 255, v)
    else:
        v = _changed(
            pixel, stride_c, inside, c[None, :], row, column, height, width, b, kind_ptr, hue_ptr,
            weights_ptr, boxes_ptr, planes_ptr, channel_ptr, factor_ptr, nearest_ptr,
        )  # fmt: skip
    return v


@triton.jit
def _write(
    v, inside, b, plane, y, i, x, c, height, run, table, border, top, bottom, left, right,
    out_ptr, values_ptr,
    NORMALIZED: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Elements i of rows y of a plane: border, levels, and a box that is erased."""
    v = tl.where(inside, v, border)
    kept = (y < height)[:, None] & (i < run)[None, :]
    where = out_ptr + (plane * height + y)[:, None] * run + i[None, :]
    result: tl.constexpr = out_ptr.dtype.element_ty
    if NORMALIZED:
        entries = tl.reshape(v + c[None, :] * 256, [ROWS * COLUMNS])
        out = tl.reshape(tl.gather(table, entries, 0), [ROWS, COLUMNS])
        if (bottom > top) & (right > left):
            value = _rounded(tl.load(values_ptr + b * 3 + c), result, INTERPRETED)
            out = tl.where(_within(y, x, top, bottom, left, right), value[None, :], out)
        tl.store(where, out, mask=kept)
    else:
        tl.store(where, v.to(result), mask=kept)


@triton.jit
def _augment_kernel(
    images_ptr, out_ptr,
    source_ptr, flip_ptr, top_ptr, left_ptr, border_ptr, kind_ptr, hue_ptr, weights_ptr, boxes_ptr,
    planes_ptr, channel_ptr, factor_ptr, nearest_ptr, erase_ptr, values_ptr, levels_ptr, mix_ptr,
    sums_ptr, images, height, width, stride_n, stride_h, stride_w, stride_c,
    LAST: tl.constexpr, MIX: tl.constexpr, NORMALIZED: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS elements of slot b (LAST) or of one plane of it.

    Moved bytes are loaded all at once; where there is arithmetic to hold, PART rows at a time.
    """
    run = width * 3 if LAST else width
    across, down = tl.cdiv(run, COLUMNS), tl.cdiv(height, ROWS)
    plane = (tl.program_id(0) // (across * down)).to(tl.int64)
    i = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0) // across % down * ROWS
    if LAST:
        b, x, c = plane, i // 3, i % 3
    else:
        b, x, c = plane // 3, i, tl.zeros([COLUMNS], dtype=tl.int32) + (plane % 3).to(tl.int32)
    top = tl.minimum(tl.maximum(tl.load(top_ptr + b), -height), height).to(tl.int32)
    left = tl.minimum(tl.maximum(tl.load(left_ptr + b), -width), width).to(tl.int32)
    column = x + left
    column = tl.where(tl.load(flip_ptr + b) != 0, width - 1 - column, column)
    seen = (column >= 0) & (column < width) & (i < run)
    start = _source(images_ptr, source_ptr, b, images, stride_n)
    pixels = start + column.to(tl.int64) * stride_w
    table = tl.zeros([1024], dtype=out_ptr.dtype.element_ty)
    if NORMALIZED:
        entry = tl.arange(0, 1024)
        levels = tl.load(levels_ptr + entry, mask=entry < 768, other=0.0)
        table = _rounded(levels, out_ptr.dtype.element_ty, INTERPRETED)
    border = tl.load(border_ptr + b).to(tl.int32)
    upper, lower, near, far = _box(erase_ptr + b * 4, height, width)
    kind = tl.load(kind_ptr + b)
    plain = (kind < 1) | (kind > 6) | (kind == 5)  # bytes are only moved
    mixed = tl.full([], False, tl.int1)
    scale, offset = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    if MIX:
        mixed = tl.load(mix_ptr + b * 5 + 4) != 0.0
        plain = plain & (mixed == 0)
    if plain:
        alone = _one_of_three(tl.load(channel_ptr + b))
        pixels += tl.where(kind == 5, alone, c) * stride_c
        y = first + tl.arange(0, ROWS)
        row = y + top
        inside = ((row >= 0) & (row < height) & (y < height))[:, None] & seen[None, :]
        at = pixels[None, :] + (row.to(tl.int64) * stride_h)[:, None]
        v = tl.load(at, mask=inside, other=0).to(tl.int32)
        _write(
            v, inside, b, plane, y, i, x, c, height, run, table, border, upper, lower, near, far,
            out_ptr, values_ptr, NORMALIZED, INTERPRETED, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        if MIX:
            count = (height * width).to(tl.float64)
            scale, offset = _tone(sums_ptr + b * 9, mix_ptr + b * 5, count)
        for skipped in range(0, tl.minimum(ROWS, height - first), PART):
            y = first + skipped + tl.arange(0, PART)
            row = y + top
            inside = ((row >= 0) & (row < height) & (y < height))[:, None] & seen[None, :]
            at = pixels[None, :] + (row.to(tl.int64) * stride_h)[:, None]
            v = _shown(
                at, stride_c, inside, c, row, column, height, width, b, kind_ptr, hue_ptr,
                weights_ptr, boxes_ptr, planes_ptr, channel_ptr, factor_ptr, nearest_ptr, mix_ptr,
                mixed, scale, offset, MIX, PART, COLUMNS,
            )  # fmt: skip
            _write(
                v, inside, b, plane, y, i, x, c, height, run, table, border, upper, lower, near,
                far, out_ptr, values_ptr, NORMALIZED, INTERPRETED, PART, COLUMNS,
            )  # fmt: skip


def _columns(run: int, vector: int) -> int:
    """The widest tile that wastes little, of a few vectors at least."""
    widths = [8 * vector, 16 * vector, 32 * vector]
    covered = {width: triton.cdiv(run, width) * width for width in widths}
    good = [width for width in widths if covered[width] * (1 - WASTE) <= run]
    return max(good) if good else min(widths)


def _rows(elements: int, columns: int, height: int) -> int:
    return min(elements // columns, triton.next_power_of_2(height))


def augment(
    images: Tensor,
    source: Tensor,
    flip: Tensor,
    top: Tensor,
    left: Tensor,
    border: Tensor,
    kind: Tensor,
    hue: Tensor,
    weights: Tensor,
    boxes: Tensor,
    planes: Tensor,
    channel: Tensor,
    factor: Tensor,
    nearest: Tensor,
    erase: Tensor,
    values: Tensor,
    levels: Tensor,
    channel_mix: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
    out: Tensor | None = None,
) -> Tensor:
    """[B, 3, H, W]: see `Plan` for the arguments; into `out`, dense in that layout, if given."""
    count, (height, width) = source.shape[0], images.shape[1:3]
    if out is None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        shape = (count, 3, height, width)
        out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)
    if count == 0:
        return out
    numbers = kind, hue, weights, boxes, planes, channel, factor
    change = [*(column.contiguous() for column in numbers), _as_bytes(nearest)]
    frame = [source.contiguous(), _as_bytes(flip)]
    frame += [column.contiguous() for column in (top, left, border)]
    sizes = (images.shape[0], height, width, *images.stride())
    sums, mix = source, values  # not read without a mix
    if channel_mix is not None:
        mix = channel_mix.contiguous()
        sums = torch.zeros(count, 9, dtype=torch.int64, device=images.device)
        columns = _columns(width, 4)
        rows = _rows(PART, columns, height)
        _moments_kernel[(triton.cdiv(width, columns) * triton.cdiv(height, rows) * count,)](
            images, frame[0], *change, mix, sums, *sizes, ROWS=rows, COLUMNS=columns, **OPTIONS
        )
    run, planes_of_all = (3 * width, count) if channels_last else (width, 3 * count)
    columns = _columns(run, 16 // dtype.itemsize)
    rows = _rows(ELEMENTS, columns, height)
    part = PART if channel_mix is None else PART // 2
    _augment_kernel[(triton.cdiv(run, columns) * triton.cdiv(height, rows) * planes_of_all,)](
        images, out, *frame, *change, erase.contiguous(), values.contiguous(), levels.contiguous(),
        mix, sums, *sizes, LAST=channels_last, MIX=channel_mix is not None,
        NORMALIZED=dtype != torch.uint8, INTERPRETED=INTERPRETED, ROWS=rows, COLUMNS=columns,
        PART=_rows(part, columns, height), **OPTIONS,
    )  # fmt: skip
    return out


def _as_bytes(flags: Tensor) -> Tensor:
    return flags.contiguous().view(torch.uint8)
