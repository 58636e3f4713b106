"""Changes of a pixel's channels and boxes in an image, to the byte of `augment.reference`.

Kernels that use these are compiled without fused multiply-add.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nearest(x):
    """Half to even; |x| < 2^51 in float64, 2^22 in float32."""
    if x.dtype == tl.float64:
        large = tl.full([], 6755399441055744.0, tl.float64)  # 1.5 * 2^52
    else:
        large = tl.full([], 12582912.0, tl.float32)  # 1.5 * 2^23
    return (x + large) - large


@triton.jit
def _level(x, near):
    """Byte of a number: half to even, or the fraction cut off. Near is a scalar."""
    return tl.where(near, _nearest(x), x).to(tl.int32) & 255


@triton.jit
def _turned(red, green, blue, c, shift):
    """Channel c with the hue moved by `shift` of Pillow's 256.

    Pillow's arithmetic in float32 and float64, where integers give the same for all arguments:
    its products are never half way between two bytes.
    """
    value = tl.maximum(red, tl.maximum(green, blue))
    low = tl.minimum(red, tl.minimum(green, blue))
    spread = value - low
    # Sectors 0, 2, 4: the largest channel is red, green, blue. One of the others is the smallest,
    # a whole sector away; how far the third one is, is a fraction.
    base = tl.where(red == value, 0, tl.where(green == value, 2, 4))
    after = tl.where(red == value, blue, tl.where(green == value, red, green))
    middle = red + green + blue - value - low
    fraction = tl.div_rn((value - middle).to(tl.float32), tl.maximum(spread, 1).to(tl.float32))
    above = (base + 1).to(tl.float32) - fraction
    below = (base - 1).to(tl.float32) + fraction
    sector = tl.where(after == low, above, below)
    # The product is the quotient by 6 as far as the byte that comes out of it.
    sixth = tl.full([], 0.16666666666666666, tl.float64)
    turn = sector.to(tl.float64) * sixth + 1.0
    place = tl.where(turn >= 1.0, turn - 1.0, turn).to(tl.float32)
    hue = tl.where(spread == 0, 0, (place.to(tl.float64) * 255.0).to(tl.int32))
    # A quotient of whole numbers rounded down: half of one more is far from the next.
    most = (255 * spread).to(tl.float32) + 0.5
    saturation = (most / tl.maximum(value, 1).to(tl.float32)).to(tl.int32)
    # The channel falls from the value to p in sector 1 and rises again in sector 4; the other two
    # are a third and two thirds of the circle behind.
    around = 6 * ((hue + shift) & 255) + tl.where(c == 0, 0, tl.where(c == 1, 1020, 510))
    around = tl.where(around >= 1530, around - 1530, around)
    depth = tl.minimum(tl.maximum(tl.minimum(around - 255, 1275 - around), 0), 255)
    return (2 * value * (65025 - saturation * depth) + 65025) // 130050


@triton.jit
def _bytes(pixel, c, stride_c, inside):
    """Channel c of pixels."""
    return tl.load(pixel + c * stride_c, mask=inside, other=0).to(tl.int32)


@triton.jit
def _span(start, size, length):
    """Begin and end of a side of a box, clipped to 0..length."""
    begin = tl.minimum(tl.maximum(start, 0), length)
    end = tl.minimum(tl.maximum(start + size, 0), length)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _box(box_ptr, height, width):
    """Top, bottom, left, right of a box, clipped to the image."""
    top, bottom = _span(tl.load(box_ptr), tl.load(box_ptr + 2), height)
    left, right = _span(tl.load(box_ptr + 1), tl.load(box_ptr + 3), width)
    return top, bottom, left, right


@triton.jit
def _within(y, x, top, bottom, left, right):
    """Which of the rows y and columns x lie in a box."""
    return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None, :]


@triton.jit
def _one_of_three(c):
    return tl.minimum(tl.maximum(c, 0), 2).to(tl.int32)


@triton.jit
def _changed(
    pixel, stride_c, inside, c, row, column, height, width, b,
    kind_ptr, hue_ptr, weights_ptr, boxes_ptr, planes_ptr, channel_ptr, factor_ptr, nearest_ptr,
):  # fmt: skip
    """Channel c of source pixels after the change of slot b; `row`, `column` are theirs."""
    kind = tl.load(kind_ptr + b)
    near = tl.load(nearest_ptr + b) != 0
    if kind == 1:  # hue
        red, green = _bytes(pixel, 0, stride_c, inside), _bytes(pixel, 1, stride_c, inside)
        blue = _bytes(pixel, 2, stride_c, inside)
        v = _turned(red, green, blue, c, (tl.load(hue_ptr + b) & 255).to(tl.int32))
    elif kind == 2:  # gray
        w = weights_ptr + b * 3
        total = tl.load(w) * _bytes(pixel, 0, stride_c, inside).to(tl.float64)
        total += tl.load(w + 1) * _bytes(pixel, 1, stride_c, inside).to(tl.float64)
        total += tl.load(w + 2) * _bytes(pixel, 2, stride_c, inside).to(tl.float64)
        v = _level(total, near)
    elif kind == 3:  # cutmix
        top, bottom, left, right = _box(boxes_ptr + b * 4, height, width)
        outside = _one_of_three(tl.load(planes_ptr + b * 2))
        within = _one_of_three(tl.load(planes_ptr + b * 2 + 1))
        inner = _within(row, column, top, bottom, left, right)
        plane = tl.where(inner, within, outside)
        v = _bytes(pixel, plane, stride_c, inside)
    elif kind == 4:  # jitter
        centre = _one_of_three(tl.load(channel_ptr + b))
        g = _bytes(pixel, centre, stride_c, inside).to(tl.float32)
        x = _bytes(pixel, c, stride_c, inside).to(tl.float32)
        v = _level(g + tl.load(factor_ptr + b) * (x - g), near)
    elif kind == 5:  # channel
        v = _bytes(pixel, _one_of_three(tl.load(channel_ptr + b)), stride_c, inside)
    elif kind == 6:  # average: a third is never half way
        total = _bytes(pixel, 0, stride_c, inside) + _bytes(pixel, 1, stride_c, inside)
        v = (total + _bytes(pixel, 2, stride_c, inside) + near.to(tl.int32)) // 3
    else:
        v = _bytes(pixel, c, stride_c, inside)
    return v
