"""MCJA's image operations on uint8, bit for bit, and the normalised tail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from fastreid_vi.augment.draws import Draws
from fastreid_vi.certify.cases import Check, Procedure, Want, compare, exact
from fastreid_vi.certify.vectors import Array, Golden
from fastreid_vi.config import DataConfig
from fastreid_vi.data import spectrum
from fastreid_vi.data.transform import augment


def procedures() -> Iterator[Procedure]:
    """One procedure for every operation."""
    runs: dict[str, Any] = {
        "weighted gray": _gray,
        "cutmix": _cutmix,
        "jitter": _jitter,
        "hue": _hue,
        "views": _views,
        "flip, crop, normalise, erase": _tail,
    }
    for name, run in runs.items():
        yield Procedure(
            owner="mcja",
            name=f"mcja/augment {name}",
            run=partial(_checks, run),
            dtypes=("float64",),
            devices=("cpu",),
        )


def _checks(
    run: Callable[[dict[str, Array]], Iterator[tuple[str, Any, Want]]],
    golden: Golden,
    dtype: torch.dtype,
    device: str,
) -> Iterator[Check]:
    for name, got, want in run(golden.load("mcja/augment")):
        yield compare(name, "forward", got, want, dtype)


def _planar(images: Array) -> Array:
    found: Array = np.ascontiguousarray(np.moveaxis(images, -1, -3))
    return found


def _three(plane: Array) -> Want:
    """The stored plane stands for three equal ones."""
    return exact(np.broadcast_to(plane, (3, *plane.shape)))


def _gray(v: dict[str, Array]) -> Iterator[tuple[str, Any, Want]]:
    images = _planar(v["wg__img"])
    for i, (image, raw) in enumerate(zip(images, v["wg__u"], strict=True)):
        yield f"image {i}", spectrum.weighted_gray(image, raw / raw.sum()), _three(v["wg__out"][i])
    fixed = spectrum.weighted_gray(images[0], v["wg_fixed__weights"])
    yield "given weights", fixed, _three(v["wg_fixed__out"])


def _cutmix(v: dict[str, Array]) -> Iterator[tuple[str, Any, Want]]:
    for i, image in enumerate(_planar(v["cc__img"])):
        outside, inside = (int(c) for c in v["cc__bg_fg"][i])
        mixed = spectrum.cutmix_channels(image, v["cc__box_ijhw"][i], outside, inside)
        yield f"image {i}", mixed, _three(v["cc__out"][i])
    height, width = v["cc__img"].shape[1:3]
    sides = spectrum.box_sides(v["cc__area_fraction"], v["cc__log_ratio"], height, width)
    yield "sides of the boxes", np.stack(sides, axis=1), exact(v["cc__box_ijhw"][:, 2:])


def _jitter(v: dict[str, Array]) -> Iterator[tuple[str, Any, Want]]:
    outs = _planar(v["sj__out"])
    for i, image in enumerate(_planar(v["sj__img"])):
        moved = spectrum.jitter_spectrum(image, int(v["sj__channel"][i]), v["sj__factor"][i])
        yield f"image {i}", moved, exact(outs[i])


def _hue(v: dict[str, Array]) -> Iterator[tuple[str, Any, Want]]:
    outs = _planar(v["hue__out"])
    for i, image in enumerate(_planar(v["hue__img"])):
        yield f"image {i}", spectrum.shift_hue(image, float(v["hue__factor"][i])), exact(outs[i])


def _views(v: dict[str, Array]) -> Iterator[tuple[str, Any, Want]]:
    image = _planar(v["sel__img"])
    yield "r", spectrum.view(image, "r"), _three(v["sel__r"])
    yield "g", spectrum.view(image, "g"), _three(v["sel__g"])
    yield "b", spectrum.view(image, "b"), _three(v["sel__b"])
    yield "avg", spectrum.view(image, "avg"), _three(v["sel__avg"])


def _tail(v: dict[str, Array]) -> Iterator[tuple[str, Any, Want]]:
    """All draws are given: flip, crop in the image padded by 10 with 127, and erased box."""
    flip, top, left, erased, *box = v["tail__params"].astype(np.int64).T
    nothing = np.zeros((len(flip), 5), dtype=np.float32)
    boxes = np.stack(box, axis=1) * erased[:, None]
    height, width = v["tail__img"].shape[1:3]
    config = DataConfig(
        height=height,
        width=width,
        identities=2,
        images=4,
        sampler="identity_random",
        pad=10,
        pad_value=127,
        erase=0.5,
    )
    images = augment(_planar(v["tail__img"]), Draws(flip > 0, top, left, boxes, nothing), config)
    yield "images", images, Want(v["tail__out"], 1e-6, 1e-6, 1.0)
