"""Augment's steps one by one and in one pass: golden bytes, and the golden float32 to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastreid_vi import augment
from fastreid_vi.augment.erase import random_erase
from fastreid_vi.certify.cases import OpCase, Want, exact
from fastreid_vi.certify.vectors import Array, Golden

Step = Callable[[Tensor], Tensor]


def cases(golden: Golden) -> Iterator[OpCase]:
    """Calls of `augment`, through the functions that name its steps, and of `random_erase`."""
    v = golden.load("mcja/augment")
    yield _step("weighted grayscale", v["wg__img"], _three(v["wg__out"]), _gray(v["wg__u"]))
    yield _step("channel cutmix", v["cc__img"], _three(v["cc__out"]), _cutmix(v))
    yield _step("spectrum jitter", v["sj__img"], exact(v["sj__out"]), _jitter(v))
    yield _step("hue", v["hue__img"], exact(v["hue__out"]), _hue(v["hue__factor"]))
    for view in augment.VIEWS[1:]:
        want = _three(v[f"sel__{view}"][None])
        yield _step(f"channel selection, {view}", v["sel__img"][None], want, _select(view))
    yield _step("flip, crop, normalise, erase", v["tail__img"], exact(v["tail__out"]), _tail(v))
    yield _erase(v)


def _step(name: str, images: Array, want: Want, step: Step) -> OpCase:
    def call(*, images: Tensor) -> Mapping[str, Tensor]:
        return {"images": step(images)}

    return OpCase(
        op="augment",
        name=f"mcja/augment {name}",
        leaves={},
        call=call,
        given={"images": images},
        results={"images": want},
    )


def _three(plane: Array) -> Want:
    """The stored plane stands for three equal ones."""
    return exact(np.repeat(plane[..., None], 3, axis=-1))


def _on(images: Tensor, array: Any, dtype: torch.dtype | None = None) -> Tensor:
    # Draws keep their own precision, whichever is certified.
    return torch.from_numpy(np.array(array)).to(images.device, dtype)


def _gray(raw: Array) -> Step:
    weights = np.stack([row / row.sum() for row in raw])
    return lambda images: augment.weighted_grayscale(images, _on(images, weights))


def _cutmix(v: dict[str, Array]) -> Step:
    return lambda images: augment.channel_cutmix(
        images, _on(images, v["cc__box_ijhw"]), _on(images, v["cc__bg_fg"])
    )


def _jitter(v: dict[str, Array]) -> Step:
    return lambda images: augment.spectrum_jitter(
        images, _on(images, v["sj__channel"]), _on(images, v["sj__factor"])
    )


def _hue(shift: Array) -> Step:
    return lambda images: augment.hue_jitter(images, _on(images, shift))


def _select(view: Any) -> Step:
    return lambda images: augment.channel_selection(images, view)


def _tail(v: dict[str, Array]) -> Step:
    def step(images: Tensor) -> Tensor:
        flip, top, left, erased, *box = _on(images, v["tail__params"], torch.int64).T
        plan = augment.plain_plan(torch.arange(len(images), device=images.device))
        plan = plan._replace(
            flip=flip > 0,
            top=top - 10,
            left=left - 10,
            erase=torch.stack(box, dim=1) * erased[:, None],
        )
        return augment.augment(images, plan)

    return step


def _erase(v: dict[str, Array]) -> OpCase:
    """The erased boxes filled with ones, to be erased again."""
    *_, erased, top, left, height, width = v["tail__params"].astype(np.int64).T
    boxes = np.stack([top, left, height, width], axis=1) * erased[:, None]
    images = v["tail__out"].copy()
    for image, (i, j, tall, wide) in zip(images, boxes.tolist(), strict=True):
        image[:, i : i + tall, j : j + wide] = 1

    def call(*, images: Tensor, boxes: Tensor) -> Mapping[str, Tensor]:
        return {"images": random_erase(images, boxes, torch.zeros(3, device=images.device))}

    return OpCase(
        op="random_erase",
        name="mcja/augment tail",
        leaves={},
        call=call,
        given={"images": images, "boxes": boxes},
        results={"images": exact(v["tail__out"])},
    )
