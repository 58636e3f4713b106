from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastreid_vi
from fastreid_vi import ops
from tests.conftest import golden
from tests.contract import LAYOUTS, OpContract, arranged, device_of
from tests.ops.test_pool import seeded, tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TestResizeNormalize(OpContract):
    op, layouts = "resize_normalize", LAYOUTS
    # images, size, mean, std
    cases = (
        ((2, 3, 8, 6), (24, 9), (0.1, 0.2, 0.3), (0.5, 1.5, 2.5)),
        ((1, 5, 9, 13), (4, 5), (0.0, 1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 4.0, 5.0)),
        ((3, 6, 5, 4), (5, 4), 0.5, 0.25),
        ((0, 3, 4, 4), (6, 6), 0.0, 1.0),
        ((2, 1, 1, 1), (3, 2), 0.0, 2.0),
        ((2, 3, 40, 7), (2, 23), 0.5, 0.5),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, size, mean, std = case
        return seeded(*shape, low=0.0), size, mean, std

    def call(self, *args: Any) -> Any:
        images, size, mean, std = args
        return ops.resize_normalize(images, size, mean=mean, std=std)

    @pytest.mark.parametrize("kind", [torch.float32, torch.float64])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("name", ["full", "odd"])
    def test_golden(self, room: str, name: str, layout: str, kind: torch.dtype) -> None:
        """AlignGAN's encoder input; its step from [-1, 1] to [0, 1] sits in mean and std."""
        narrow = (layout, kind) == ("contiguous", torch.float32)
        if room == "triton" and device_of(room) == "cpu" and not narrow:
            pytest.skip("one case of this size is enough for the interpreter")
        v = {k.removeprefix(f"{name}__"): a for k, a in golden("aligngan/resize_norm").items()}
        x = (tensor(v["u8"]).to(kind) / 255 - 0.5) / 0.5
        x = arranged(x, layout).to(device_of(room)).requires_grad_()
        mean, std = [2 * m - 1 for m in IMAGENET_MEAN], [2 * s for s in IMAGENET_STD]
        with fastreid_vi.backend(room):
            y = ops.resize_normalize(x, (384, 192), mean=mean, std=std)
            index = [torch.arange(n) for n in (384, 192, 3)]
            u = [int(k) for k in v["upstream_coeffs"]]
            i, j, c = index[0][None, :, None], index[1], index[2][:, None, None]
            upstream = ((u[0] * i + u[1] * j + u[2] * c) % 17 - 8) / 8
            y.backward(upstream.to(y.dtype).to(y.device).expand_as(y))
        out = y.detach().cpu().double().numpy()
        dx = x.grad.cpu().double().numpy()
        close = lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)  # noqa: E731
        close(out[:, :, v["y_rows"][:, None], v["y_cols"]], v["y_sub"])
        close(out[:, :, :7, :7], v["y_corner"])
        close(out[:, :, -7:, -7:], v["y_corner_end"])
        close(out.mean((2, 3)), v["y_sum"] / (384 * 192))
        close(np.square(out).mean((2, 3)), v["y_sumsq"] / (384 * 192))
        scale = np.abs(v["gx_sub"]).max()
        close(dx[:, :, ::3, ::3] / scale, v["gx_sub"] / scale)
        close(dx[:, :, :5, :5] / scale, v["gx_corner"] / scale)
        pixels = dx.shape[2] * dx.shape[3]
        close(dx.mean((2, 3)) / scale, v["gx_sum"] / (pixels * scale))
        close(np.square(dx).mean((2, 3)) / scale**2, v["gx_sumsq"] / (pixels * scale**2))

    @pytest.mark.parametrize("size", [(7, 5), (14, 10), (3, 2), (7, 11), (1, 1), (20, 3)])
    def test_equals_interpolate_in_float64(self, room: str, size: tuple[int, int]) -> None:
        x = seeded(2, 3, 7, 5)
        want = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
        with fastreid_vi.backend(room):
            y = ops.resize_normalize(x.to(device_of(room)), size, mean=0.0, std=1.0)
        torch.testing.assert_close(y.cpu(), want)


@settings(deadline=None, max_examples=40)
@given(
    source=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_constants_stay_and_gradients_keep_their_sum(
    source: tuple[int, int], size: tuple[int, int]
) -> None:
    """The weights of every result sum to one; the adjoint is the transpose."""
    images = torch.full((1, 2, *source), 0.75, dtype=torch.float64, requires_grad=True)
    y = ops.resize_normalize(images, size, mean=0.25, std=0.5)
    torch.testing.assert_close(y, torch.ones_like(y))
    g, x = seeded(*y.shape), seeded(*images.shape)
    (dx,) = torch.autograd.grad(y, images, g)
    torch.testing.assert_close(dx.sum(), g.sum() / 0.5)
    moved = ops.resize_normalize(x, size, mean=0.0, std=0.5)
    torch.testing.assert_close((dx * x).sum(), (g * moved).sum())


def test_same_size_is_the_normalisation_alone() -> None:
    x = seeded(2, 3, 5, 4).float()
    y = ops.resize_normalize(x, (5, 4), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(y, (x - mean) / std)


def test_autocast() -> None:
    x = torch.rand(1, 3, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.resize_normalize(x, (8, 8), mean=0.5, std=0.5)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.ones(3, 4, 4)}, ValueError, r"images: expected shape \[B, C, H, W\]"),
        ({"images": torch.ones(1, 3, 4, 4).byte()}, TypeError, "images: expected a floating"),
        ({"size": (0, 4)}, ValueError, r"size: expected \(height, width\), both >= 1"),
        ({"size": (4, 4, 4)}, ValueError, r"size: expected \(height, width\)"),
        ({"mean": (0.0, 1.0)}, ValueError, r"mean: expected one number per channel \(3\), got 2"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std: expected > 0, got 0.0"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"images": torch.ones(1, 3, 4, 4), "size": (8, 8), "mean": 0.0, "std": 1.0}
    with pytest.raises(error, match=message):
        ops.resize_normalize(**{**good, **change})
