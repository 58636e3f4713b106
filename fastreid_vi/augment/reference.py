"""The definition of `augment`, in plain PyTorch: every room gives these bytes and these bits.

Images are uint8 [B, H, W, 3]. Every step is exact, or rounded once in the stated width and order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastreid_vi.augment.draws import KINDS


def augment_reference(
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
) -> Tensor:
    """[B, 3, H, W]: see `Plan` for the arguments and the order of the steps."""
    x = images[source.clamp(0, max(images.shape[0] - 1, 0))]  # checked after the room has run
    x = changed(x, kind, hue, weights, boxes, planes, channel, factor, nearest)
    if channel_mix is not None:
        chosen = (channel_mix[:, 4] != 0)[:, None, None, None]
        x = torch.where(chosen, toned(x, channel_mix), x)
    x = torch.where(flip[:, None, None, None], x.flip(2), x)
    out = moved(x, top, left, border).permute(0, 3, 1, 2)
    if dtype != torch.uint8:
        out = levels[torch.arange(3, device=x.device)[:, None, None], out.long()]
        inside = box_mask(erase, *out.shape[2:])[:, None]
        out = torch.where(inside, values[:, :, None, None], out).to(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return out.contiguous(memory_format=layout)


def changed(
    x: Tensor,
    kind: Tensor,
    hue: Tensor,
    weights: Tensor,
    boxes: Tensor,
    planes: Tensor,
    channel: Tensor,
    factor: Tensor,
    nearest: Tensor,
) -> Tensor:
    """Images with their channels changed; every kind is computed for its own slots."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "hue": lambda s: turned(x[s], hue[s]),
        "gray": lambda s: weighted(x[s], weights[s], nearest[s]),
        "cutmix": lambda s: mixed_planes(x[s], boxes[s], planes[s]),
        "jitter": lambda s: drawn_to(x[s], channel[s], factor[s], nearest[s]),
        "channel": lambda s: plane(x[s], channel[s]).expand(-1, -1, -1, 3),
        "average": lambda s: averaged(x[s], nearest[s]),
    }
    y = x.clone()
    for name, change in changes.items():
        slots = torch.nonzero(kind == KINDS.index(name))[:, 0]
        if slots.numel():
            y[slots] = change(slots)
    return y


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """[B, H, W] bool: inside the boxes [B, 4] (top, left, height, width)."""
    top, left, tall, wide = (side[:, None, None] for side in boxes.unbind(1))
    row = torch.arange(height, device=boxes.device)[:, None]
    column = torch.arange(width, device=boxes.device)
    return (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)


def plane(x: Tensor, channel: Tensor) -> Tensor:
    """[B, H, W, 1]: one channel of every image."""
    index = channel.clamp(0, 2)[:, None, None, None].expand(*x.shape[:3], 1)
    return x.gather(3, index)


def as_levels(numbers: Tensor, nearest: Tensor) -> Tensor:
    """uint8: half to even, or the fraction cut off."""
    near = nearest.reshape(-1, *[1] * (numbers.dim() - 1))
    return torch.where(near, numbers.round(), numbers).to(torch.uint8)


def weighted(x: Tensor, weights: Tensor, nearest: Tensor) -> Tensor:
    """Three equal planes (w1 R + w2 G) + w3 B, in float64."""
    red, green, blue = x.double().unbind(3)  # [B, H, W]
    w1, w2, w3 = (w[:, None, None] for w in weights.unbind(1))
    gray = (w1 * red + w2 * green) + w3 * blue
    return as_levels(gray, nearest)[..., None].expand_as(x)


def averaged(x: Tensor, nearest: Tensor) -> Tensor:
    """Three equal planes (R + G + B) / 3."""
    total = x.sum(3, dtype=torch.float64)
    mean = total / torch.tensor(3.0, dtype=torch.float64, device=x.device)
    return as_levels(mean, nearest)[..., None].expand_as(x)


def mixed_planes(x: Tensor, boxes: Tensor, planes: Tensor) -> Tensor:
    """Three equal planes: one channel, and another one in a box."""
    inside = box_mask(boxes, *x.shape[1:3])[..., None]
    return torch.where(inside, plane(x, planes[:, 1]), plane(x, planes[:, 0])).expand_as(x)


def drawn_to(x: Tensor, channel: Tensor, factor: Tensor, nearest: Tensor) -> Tensor:
    """Every channel c becomes g + factor (c - g), g one of them, in float32."""
    centre = plane(x, channel).float()
    share = factor[:, None, None, None]
    return as_levels(centre + share * (x.float() - centre), nearest)


def turned(x: Tensor, shift: Tensor) -> Tensor:
    """The hue moved by `shift` of Pillow's 256 hues."""
    hue, saturation, value = to_hsv(x)
    return from_hsv((hue + shift[:, None, None]) % 256, saturation, value)


def to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue, saturation, value [B, H, W], int64 0 to 255: Pillow's arithmetic."""
    red, green, blue = x.long().unbind(3)
    value, low = x.amax(3).long(), x.amin(3).long()
    spread = (value - low).float()
    divisor = torch.where(spread > 0, spread, torch.ones_like(spread))
    r, g, b = (((value - c).float() / divisor).double() for c in (red, green, blue))
    sector = torch.where(
        red == value,
        (b - g).float(),
        torch.where(green == value, (2.0 + r - b).float(), (4.0 + g - r).float()),
    )
    six, full = (torch.tensor(n, dtype=torch.float64, device=x.device) for n in (6.0, 255.0))
    turn = torch.fmod(sector.double() / six + 1.0, 1.0).float()
    hue = (turn.double() * full).long()
    saturation = ((spread / value.clamp(min=1).float()).double() * full).long()
    grey = value == low
    return torch.where(grey, 0, hue), torch.where(grey, 0, saturation), value


def from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """uint8 [B, H, W, 3]: Pillow's arithmetic."""
    full = torch.tensor(255.0, dtype=torch.float64, device=hue.device)
    place = hue.double() * 6.0 / full  # 0 to 6
    sector = place.floor()
    part = (place - sector).float().double()
    # Pillow holds the part and the saturation in float32, and their product too.
    share = (saturation.float() / full.float()).double()
    product = (share * part).float().double()
    v = value.double()
    p = _half_up(v * (1.0 - share))
    q = _half_up(v * (1.0 - product))
    t = _half_up(v * (1.0 - share * (1.0 - part)))
    # Red, green, blue of the six sectors; a hue of 255 is the first one again.
    orders = (
        (value, t, p),
        (q, value, p),
        (p, value, t),
        (p, q, value),
        (t, p, value),
        (value, p, q),
    )
    number = sector.long() % 6
    out = torch.stack(orders[0], dim=3)
    for i, order in enumerate(orders[1:], 1):
        out = torch.where((number == i)[..., None], torch.stack(order, dim=3), out)
    out = torch.where((saturation == 0)[..., None], value[..., None], out)
    return out.to(torch.uint8)


def _half_up(x: Tensor) -> Tensor:
    """C's round() of numbers >= 0."""
    whole = x.floor()
    return (whole + (x - whole >= 0.5)).long()


def toned(x: Tensor, mix: Tensor) -> Tensor:
    """Three equal planes: weighted channels, moved to a mean and a spread of their grey levels.

    Sums over the image are whole numbers; what follows is float64, in this order.
    """
    gains, offset = tone(x, mix)
    red, green, blue = x.double().unbind(3)
    a, b, c = (g[:, None, None] for g in gains.unbind(1))
    grey = ((a * red + b * green) + c * blue) + offset[:, None, None]
    return grey.round().clamp(0, 255).to(torch.uint8)[..., None].expand_as(x)


def tone(x: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Gains [B, 3] of the channels and offset [B], float64, that give the asked mean and spread."""
    rows = x.flatten(1, 2).long()  # [B, S, 3]
    count = torch.tensor(float(max(rows.shape[1], 1)), dtype=torch.float64, device=x.device)
    sums = rows.sum(1).double()
    w, sigma, mu = mix[:, :3].double(), mix[:, 4].double(), mix[:, 3].double()

    def covariance(i: int, j: int) -> Tensor:
        product = (rows[:, :, i] * rows[:, :, j]).sum(1).double()
        return product - sums[:, i] * sums[:, j] / count

    own = [(w[:, i] * w[:, i]) * covariance(i, i) for i in range(3)]
    cross = [(w[:, i] * w[:, j]) * covariance(i, j) for i, j in ((0, 1), (0, 2), (1, 2))]
    variance = ((own[0] + own[1]) + own[2]) + 2.0 * ((cross[0] + cross[1]) + cross[2])
    deviation = (variance / count).clamp(min=0).sqrt()
    scale = sigma / (deviation + 1e-3)
    mean = ((w[:, 0] * sums[:, 0] + w[:, 1] * sums[:, 1]) + w[:, 2] * sums[:, 2]) / count
    return w * scale[:, None], mu - mean * scale


def moved(x: Tensor, top: Tensor, left: Tensor, border: Tensor) -> Tensor:
    """A window of the size of the image that starts at (top, left); `border` outside the image."""
    height, width = x.shape[1:3]
    rows = top[:, None] + torch.arange(height, device=x.device)  # [B, H]
    columns = left[:, None] + torch.arange(width, device=x.device)  # [B, W]
    inside = ((rows >= 0) & (rows < height))[:, :, None]
    inside = inside & ((columns >= 0) & (columns < width))[:, None]
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    shown = x[batch, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
    return torch.where(inside[..., None], shown, border[:, None, None, None])
