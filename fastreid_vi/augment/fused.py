"""`augment`: everything that a plan says, in one pass over the images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreid_vi import _checks
from fastreid_vi._dispatch import NATIVE, OPS, register
from fastreid_vi.augment.draws import KINDS
from fastreid_vi.augment.plan import Plan
from fastreid_vi.augment.reference import augment_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
LAYOUTS = (torch.channels_last, torch.contiguous_format)

# What a column of a plan must be: dtype and the sizes after B.
_COLUMNS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "source": (torch.int64, ()),
    "flip": (torch.bool, ()),
    "top": (torch.int64, ()),
    "left": (torch.int64, ()),
    "border": (torch.uint8, ()),
    "kind": (torch.int64, ()),
    "hue": (torch.int64, ()),
    "weights": (torch.float64, (3,)),
    "boxes": (torch.int64, (4,)),
    "planes": (torch.int64, (2,)),
    "channel": (torch.int64, ()),
    "factor": (torch.float32, ()),
    "nearest": (torch.bool, ()),
    "erase": (torch.int64, (4,)),
    "values": (torch.float32, (3,)),
    "channel_mix": (torch.float32, (5,)),
}


def augment(
    images: Tensor,
    plan: Plan,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    out: Tensor | None = None,
) -> Tensor:
    """Take, change, flip, crop, normalise and erase images, in one pass.

    For every slot b of the plan: image `source[b]`; its channels changed as `kind[b]` says (hue,
    weighted grayscale, channel cutmix, spectrum jitter, one channel, the mean of all); mixed, if
    `channel_mix[b]` has a spread; flipped; moved by `top[b]`, `left[b]` within a border; every
    value v of channel c replaced by levels[c, v]; the box `erase[b]` set to `values[b]`. Bytes are
    exact until `levels`, and the float32 result is rounded once to `dtype`.

    Args:
        images: [N, H, W, 3] uint8, any strides: a batch, or a whole pack.
        plan: B slots, on the device of `images`; see `Plan`, `sample_plan`, `view_plan`.
        dtype: float32, bfloat16 or float16; or uint8 for the bytes before normalisation (`levels`
            and `erase` are left out).
        memory_format: of the result, channels_last or contiguous_format.
        out: [B, 3, H, W] of this dtype and memory format, to write into and to return: memory that
            was used before is faster than new.
    Returns:
        [B, 3, H, W]. Not differentiable.
    Raises:
        TypeError: `images` is not uint8, a column of the plan has another dtype, `dtype` is none
            of those listed, or not that of `out`.
        ValueError: a shape or device does not fit. On the CPU also: the plan reads outside the
            images or their channels, a kind that does not exist, a crop outside -H to H or -W to W,
            a box with a negative side, gray weights that do not sum to one, a jitter factor outside
            0 to 1, numbers that are not finite.

    >>> import torch
    >>> from fastreid_vi.augment import augment, plain_plan
    >>> images = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
    >>> plan = plain_plan(torch.zeros(4, dtype=torch.int64))
    >>> augment(images, plan, dtype=torch.bfloat16).shape
    torch.Size([4, 3, 2, 2])

    Spec: mcja 3.5, mpanet 4, lba 4, aligngan 3.1. Golden: mcja/augment. Backends: cpu, triton.
    """
    check_images(images)
    _check_plan(plan, images)
    if dtype not in DTYPES:
        listed = ", ".join(str(kind).removeprefix("torch.") for kind in DTYPES)
        raise TypeError(f"dtype: expected one of {listed}, got {dtype}")
    if memory_format not in LAYOUTS:
        raise ValueError(
            f"memory_format: expected channels_last or contiguous_format, got {memory_format}"
        )
    arguments = (images, *plan, dtype, memory_format == torch.channels_last)
    if out is not None:
        return _augment_into(out, *arguments)
    result: Tensor = _augment(*arguments)
    return result


def _augment_into(out: Tensor, *arguments: Any) -> Tensor:
    images, source, dtype, columns = arguments[0], arguments[1], *arguments[-2:]
    shape = (source.shape[0], 3, *images.shape[1:3])
    layout = torch.channels_last if columns else torch.contiguous_format
    if out.dtype != dtype:
        raise TypeError(f"out: expected {dtype}, got {_checks.described(out)}")
    if out.shape != shape or out.device != images.device:
        wanted = f"{list(shape)} on {images.device}"
        raise ValueError(f"out: expected {wanted}, got {_checks.described(out)} on {out.device}")
    if not out.is_contiguous(memory_format=layout):
        raise ValueError(f"out: expected {layout}, got strides {out.stride()}")
    op = OPS["augment"]
    room = op.choose(*arguments)
    if room == "cpu":
        getattr(torch.ops, NATIVE).augment_into(out, *arguments[:-2], columns)
    elif room == "triton":
        kernel: Any = op.room(room)
        kernel(*arguments, out)
    else:
        return out.copy_(_augment(*arguments))
    if _checks.values_wanted(images.device.type):
        _verify(out, *arguments)
    return out


def check_images(images: Tensor) -> None:
    """Images [N, H, W, 3], uint8, with pixels."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected uint8 [N, H, W, 3], got {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8 [N, H, W, 3], got {_checks.described(images)}")
    if images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images: expected uint8 [N, H, W, 3], got {_checks.described(images)}")
    if images.shape[1] == 0 or images.shape[2] == 0:
        raise ValueError(f"images: expected at least one pixel, got {_checks.described(images)}")


def check_column(
    name: str, column: Any, count: int, dtype: torch.dtype, sizes: tuple[int, ...], images: Tensor
) -> None:
    """A tensor [count, *sizes] of a dtype, where `images` is."""
    wanted = f"{str(dtype).removeprefix('torch.')} {[count, *sizes]}"
    if not isinstance(column, Tensor):
        raise TypeError(f"{name}: expected {wanted}, got {type(column).__name__}")
    if column.dtype != dtype:
        raise TypeError(f"{name}: expected {wanted}, got {_checks.described(column)}")
    if tuple(column.shape) != (count, *sizes):
        raise ValueError(f"{name}: expected {wanted}, got {_checks.described(column)}")
    if column.device != images.device:
        raise ValueError(f"{name}: expected device {images.device}, got {column.device}")


def integers(name: str, values: Tensor, images: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Integers [B, *sizes] as int64."""
    if isinstance(values, Tensor) and values.dtype in (torch.int32, torch.int16, torch.uint8):
        values = values.long()
    check_column(name, values, images.shape[0], torch.int64, sizes, images)
    return values


def check_floating(
    name: str, values: Tensor, count: int, sizes: tuple[int, ...], images: Tensor
) -> None:
    """Numbers [count, *sizes], float32 or float64."""
    double = isinstance(values, Tensor) and values.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    check_column(name, values, count, dtype, sizes, images)


def floating(name: str, values: Tensor, images: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """`check_floating` for one row per image."""
    check_floating(name, values, images.shape[0], sizes, images)
    return values


def _check_plan(plan: Plan, images: Tensor) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
    if not isinstance(plan.source, Tensor) or plan.source.dim() != 1:
        raise ValueError("plan.source: expected int64 [B]")
    count = plan.source.shape[0]
    for name, (dtype, sizes) in _COLUMNS.items():
        if name != "channel_mix" or plan.channel_mix is not None:
            check_column(f"plan.{name}", getattr(plan, name), count, dtype, sizes, images)
    check_column("plan.levels", plan.levels, 3, torch.float32, (256,), images)
    if images.shape[0] == 0 and count > 0:
        raise ValueError(f"images: expected images for the {count} slots of the plan, got none")


# Values.


def _verify(result: Tensor, images: Tensor, *arguments: Any) -> None:
    plan = Plan(*arguments[: len(Plan._fields)])
    height, width = images.shape[1:3]
    between("plan.source", plan.source, 0, images.shape[0] - 1)
    between("plan.top", plan.top, -height, height)
    between("plan.left", plan.left, -width, width)
    between("plan.kind", plan.kind, 0, len(KINDS) - 1)
    between("plan.hue", plan.hue, 0, 255)
    between("plan.planes", plan.planes, 0, 2)
    between("plan.channel", plan.channel, 0, 2)
    check_boxes("plan.boxes", plan.boxes)
    check_boxes("plan.erase", plan.erase)
    gray = plan.kind == KINDS.index("gray")
    if bool(gray.any()):
        check_weights("plan.weights", plan.weights[gray])
    check_factor("plan.factor", plan.factor)
    check_finite("plan.values", plan.values)
    check_finite("plan.levels", plan.levels)
    if plan.channel_mix is not None:
        check_finite("plan.channel_mix", plan.channel_mix)


def _first(name: str, expected: str, bad: Tensor, values: Tensor) -> None:
    """Raise for the first row of `bad` [B] or [B, k] that is set."""
    row = int(bad.reshape(bad.shape[0], -1).any(1).to(torch.uint8).argmax())
    raise ValueError(f"{name}: expected {expected}, got {values[row].tolist()} in row {row}")


def between(name: str, values: Tensor, low: int, high: int) -> None:
    """Integers are in low to high."""
    if values.numel():
        smallest, largest = (int(v) for v in torch.aminmax(values))
        if smallest < low or largest > high:
            _first(name, f"{low} to {high}", (values < low) | (values > high), values)


def check_boxes(name: str, boxes: Tensor) -> None:
    """Sides are not negative."""
    if boxes.numel() and int(boxes[:, 2:].amin()) < 0:
        _first(name, "heights and widths >= 0", boxes[:, 2:] < 0, boxes)


def check_weights(name: str, weights: Tensor) -> None:
    """Weights are in 0 to 1 and sum to one, up to rounding."""
    # In float32, for weights that were drawn in it; NaN fails every comparison.
    good = ((weights.sum(1) - 1).abs() <= 1e-5) & (weights >= 0).all(1) & (weights <= 1).all(1)
    if not bool(good.all()):
        _first(name, "three weights in 0 to 1 that sum to one", ~good, weights)


def check_factor(name: str, factor: Tensor) -> None:
    """Factors are in 0 to 1."""
    good = (factor >= 0) & (factor <= 1)
    if not bool(good.all()):
        _first(name, "0 to 1", ~good, factor)


def check_finite(name: str, values: Tensor) -> None:
    """No NaN, no infinity."""
    good = values.isfinite()
    if not bool(good.all()):
        _first(name, "finite numbers", ~good, values)


# Registration.


def refuse_gradient(ctx: Any, *grads: Any) -> Any:
    """Backward of what has none."""
    raise RuntimeError("fastreid_vi.augment is not differentiable")


def _fake(images: Tensor, source: Tensor, *rest: Any) -> Tensor:
    dtype, channels_last = rest[-2:]
    shape = (source.shape[0], 3, *images.shape[1:3])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.new_empty(shape, dtype=dtype).contiguous(memory_format=layout)


def _refuses(backend: str, images: Tensor, source: Tensor, *rest: Any) -> str | None:
    if backend != "triton":
        return None
    count, (height, width) = source.shape[0], images.shape[1:3]
    if 3 * height * width >= 2**31:  # places in an image are held in 32 bits
        return f"images of {height} x {width} pixels are too large for it"
    if 3 * count * (1 + height * width // 32) >= 2**31:  # more programs than a launch may have
        return f"{count} slots of {height} x {width} pixels are too many for one launch"
    return None


_augment = register(
    "augment",
    "(Tensor images, Tensor source, Tensor flip, Tensor top, Tensor left, Tensor border,"
    " Tensor kind, Tensor hue, Tensor weights, Tensor boxes, Tensor planes, Tensor channel,"
    " Tensor factor, Tensor nearest, Tensor erase, Tensor values, Tensor levels,"
    " Tensor? channel_mix, ScalarType dtype, bool channels_last) -> Tensor",
    reference=augment_reference,
    fake=_fake,
    family="augment",
    backends=("cpu", "triton"),
    refuses=_refuses,
    verify=_verify,
    backward=refuse_gradient,
)
