"""Norms and resizing: MAM, MDA, instance norm, AlignGAN's encoder input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreid_vi import ops
from fastreid_vi.certify.cases import OpCase, Want, forward, gradient, narrow
from fastreid_vi.certify.vectors import Array, Golden

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ADAPTER = ("sc_w", "sc_b", "ca_w", "ca_bn_w", "ca_bn_b", "norm_w", "norm_b")
_BUFFERS = {
    "ca_running_mean": "ca_rm",
    "ca_running_var": "ca_rv",
    "norm_running_mean": "norm_rm",
    "norm_running_var": "norm_rv",
}


def cases(golden: Golden) -> Iterator[OpCase]:
    """Every golden case of the family."""
    for name in ("a", "b"):
        yield _alleviation(golden, name)
    for name in ("a", "b", "zero", "eval", "peaky", "wide"):
        yield _adapter(golden, name)
    for name in ("a", "b"):
        yield from _instance_norm(golden, name)
    yield _plain_norm(golden)
    for name in ("full", "odd"):
        yield _resize(golden, name)


def _alleviation(golden: Golden, name: str) -> OpCase:
    v = golden.case("mpanet/mam", name, "/")
    eps = float(v["eps"])
    return OpCase(
        op="modality_alleviation",
        name=f"mpanet/mam {name}",
        leaves={key: v[key] for key in ("x", "w1", "w2")},
        call=lambda x, w1, w2: {"y": ops.modality_alleviation(x, w1, w2, eps=eps)},
        results={"y": forward(v["y"])},
        cotangents={"y": v["cot"]},
        gradients={key: gradient(v[f"grad_{key}"]) for key in ("x", "w1", "w2")},
    )


def _adapter(golden: Golden, name: str) -> OpCase:
    v = golden.case("mcja/mda", name)
    train, wide = bool(v["train"]), name != "wide"

    def call(x: Tensor, **rest: Tensor) -> Mapping[str, Tensor]:
        buffers: dict[str, Any] = {key: rest[key] for key in _BUFFERS}
        weights = (rest[key] for key in _ADAPTER)
        y = ops.distribution_adapter(x, *weights, **buffers, training=train)
        return {"y": y, **buffers}

    def either(field: str, single: float) -> Want:
        return Want(v[f"{field}64"], single, 1e-10) if wide else narrow(v[field], single)

    return OpCase(
        op="distribution_adapter",
        name=f"mcja/mda {name}",
        leaves={"x": v["x"], **{key: v[key] for key in _ADAPTER}},
        given={key: v[f"{field}_in"] for key, field in _BUFFERS.items()},
        call=call,
        results={
            "y": either("y", 1e-5),
            **{key: narrow(v[f"{field}_out"], 1e-5) for key, field in _BUFFERS.items()},
        },
        cotangents={"y": v["gout"]},
        # The gradient of sc_b is rounding noise in the file and zero by the maths.
        gradients={
            "x": either("gx", 1e-4),
            **{key: narrow(v[f"g_{key}"], 1e-4) for key in _ADAPTER if key != "sc_b"},
            "sc_b": narrow(np.zeros_like(v["sc_b"]), 1e-4),
        },
    )


def _instance_norm(golden: Golden, name: str) -> Iterator[OpCase]:
    """Training on x1, on x2 after it, then evaluation of x1 with the statistics of both."""
    v = golden.case("aligngan/instance_norm", name)
    modes = (("train", "x1", "0", "1"), ("train", "x2", "1", "2"), ("eval", "x1", "2", "2"))
    for mode, x, before, after in modes:
        stored = (mode, x) != ("train", "x2")
        results = {"y": narrow(v[f"{mode}_y1"], 1e-5)} if stored else {}
        fields = {"x": "gx1", "weight": "gw", "bias": "gb"}
        yield OpCase(
            op="instance_norm_act",
            name=f"aligngan/instance_norm {name} {mode} {x}",
            leaves={"x": v[x], "weight": v["w"], "bias": v["bias"]},
            given={"mean": v[f"rm{before}"], "var": v[f"rv{before}"], "train": mode == "train"},
            call=_normalised,
            results={
                **results,
                "mean": narrow(v[f"rm{after}"], 1e-6),
                "var": narrow(v[f"rv{after}"], 1e-6),
            },
            cotangents={"y": v["gout"]},
            gradients={
                leaf: narrow(v[f"{mode}_{field}"], 1e-4) for leaf, field in fields.items() if stored
            },
        )


def _normalised(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, train: bool
) -> Mapping[str, Tensor]:
    y = ops.instance_norm_act(
        x, weight, bias, activation="none", running_mean=mean, running_var=var, training=train
    )
    return {"y": y, "mean": mean, "var": var}


def _plain_norm(golden: Golden) -> OpCase:
    v = golden.case("aligngan/instance_norm", "plain")
    return OpCase(
        op="instance_norm_act",
        name="aligngan/instance_norm plain",
        leaves={"x": v["x"]},
        call=lambda x: {"y": ops.instance_norm_act(x, activation="none")},
        results={"y": narrow(v["y"], 1e-5)},
        cotangents={"y": v["gout"]},
        gradients={"x": narrow(v["gx"], 1e-4)},
    )


def _resize(golden: Golden, name: str) -> OpCase:
    """384 x 192; rows, corners and sums of the result, upstream gradient by its formula."""
    v = golden.case("aligngan/resize_norm", name)
    rows, columns = (torch.from_numpy(v[key]) for key in ("y_rows", "y_cols"))
    pixels = v["u8"].shape[2] * v["u8"].shape[3]

    def call(x: Tensor) -> Mapping[str, Tensor]:
        mean, std = [2 * m - 1 for m in _MEAN], [2 * s for s in _STD]
        y = ops.resize_normalize(x, (384, 192), mean=mean, std=std)
        return {
            "y": y,
            "rows": y[:, :, rows.to(x.device)[:, None], columns.to(x.device)],
            "corner": y[:, :, :7, :7],
            "far corner": y[:, :, -7:, -7:],
            "mean": y.double().mean((2, 3)),
            "mean square": y.double().square().mean((2, 3)),
        }

    largest = float(np.abs(v["gx_sub"]).max())
    parts: dict[str, Any] = {
        "sub": ("x", lambda g: g[:, :, ::3, ::3]),
        "corner": ("x", lambda g: g[:, :, :5, :5]),
        "mean": ("x", lambda g: g.double().mean((2, 3))),
        "mean square": ("x", lambda g: g.double().square().mean((2, 3))),
    }
    return OpCase(
        op="resize_normalize",
        name=f"aligngan/resize_norm {name}",
        leaves={"x": (v["u8"].astype(np.float64) / 255 - 0.5) / 0.5},
        call=call,
        results={
            "rows": _near(v["y_sub"]),
            "corner": _near(v["y_corner"]),
            "far corner": _near(v["y_corner_end"]),
            "mean": _near(v["y_sum"] / (384 * 192)),
            "mean square": _near(v["y_sumsq"] / (384 * 192)),
        },
        cotangents={"y": _upstream(v["upstream_coeffs"], v["u8"].shape[0])},
        gradients={
            "sub": _near(v["gx_sub"], largest),
            "corner": _near(v["gx_corner"], largest),
            "mean": _near(v["gx_sum"] / pixels, largest),
            "mean square": _near(v["gx_sumsq"] / pixels, largest**2),
        },
        parts=parts,
    )


def _near(value: Array, scale: float = 1.0) -> Want:
    return Want(value, 5e-5, 5e-5, scale)


def _upstream(coefficients: Array, batch: int) -> Array:
    u0, u1, u2 = (int(k) for k in coefficients)
    c, i, j = np.ogrid[:3, :384, :192]
    one = ((u0 * i + u1 * j + u2 * c) % 17 - 8) / 8
    found: Array = np.broadcast_to(one, (batch, *one.shape)).copy()
    return found
