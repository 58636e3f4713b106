"""LbA: two training steps of a miniature, pairs, rates."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Literal

import numpy as np
import torch

from fastreid_vi import methods
from fastreid_vi.certify.cases import Check, Procedure, Want, compare, exact, forward, gradient
from fastreid_vi.certify.networks import Miniature
from fastreid_vi.certify.vectors import Array, Golden
from fastreid_vi.config import Batch
from fastreid_vi.methods.lba import LbA, LbAOptions
from fastreid_vi.methods.lba.pairing import Arrangement, Pairs, draw_pairs
from fastreid_vi.train.optim import build_optimizer, lr_at, phase_parameters, set_lr

_TERMS = {  # golden name -> ours
    "ce_id": "identity",
    "tri": "triplet",
    "ce_ic3": "consistency3",
    "ce_ic4": "consistency4",
    "dt3": "dense3",
    "dt4": "dense4",
}
_LAYERS = (3, 4)
_LR = 0.01


class _Drawn(LbA):
    """Takes its partners from the file."""

    pairs: Iterator[Pairs]

    def draw(self, arrangement: Arrangement) -> Pairs:
        """The next stored draw."""
        return next(self.pairs)


def procedures() -> Iterator[Procedure]:
    """Everything that is certified of LbA beside its layout and sampler."""
    variants: tuple[tuple[str, Literal["batch", "sample"]], ...] = (
        ("official", "batch"),
        ("paper", "sample"),
    )
    for variant, weighting in variants:
        yield Procedure(
            owner="lba",
            name=f"lba/e2e_tiny {variant}, two steps",
            run=partial(_steps, variant, weighting),
        )
    for name, run in (("pairs", _pairs), ("rates", _rates)):
        yield Procedure(
            owner="lba",
            name=f"lba/sampler_schedule, {name}",
            run=run,
            dtypes=("float64",),
            devices=("cpu",),
        )


def _ours(name: str) -> str:
    """Our key of a golden one: it has the official names of a smaller network."""
    for theirs, ours in (
        ("visible_module.visible.", "backbone.visible_stem."),
        ("thermal_module.thermal.", "backbone.infrared_stem."),
        ("base_resnet.base.", "backbone."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _network(v: dict[str, Array], weighting: Literal["batch", "sample"]) -> _Drawn:
    stem = v["init/visible_module.visible.conv1.weight"]
    trunk = [v[f"init/base_resnet.base.layer{i}.0.weight"] for i in (1, 2, 3, 4)]
    options = LbAOptions(
        margin=float(v["margin"]), dt_weight=float(v["lw_dt"]), weighting=weighting
    )
    backbone = Miniature([len(weight) for weight in (stem, *trunk)])
    network = _Drawn(len(v["init/classifier.weight"]), options, backbone=backbone)
    state = network.state_dict()
    for name in (key[5:] for key in v if key.startswith("init/")):
        state[_ours(name)].copy_(torch.from_numpy(v[f"init/{name}"]))
    return network


def _stored_pairs(v: dict[str, Array]) -> Iterator[Pairs]:
    for step in (0, 1):
        for layer in _LAYERS:
            found = (v[f"step{step}/layer{layer}/{kind}_idx"] for kind in ("pos", "neg"))
            yield Pairs(*map(torch.from_numpy, found))


def _steps(
    variant: str,
    weighting: Literal["batch", "sample"],
    golden: Golden,
    dtype: torch.dtype,
    device: str,
) -> Iterator[Check]:
    v = golden.load("lba/e2e_tiny")
    network = _network(v, weighting).to(device, dtype)
    network.pairs = _stored_pairs(v)
    images = torch.from_numpy(np.concatenate((v["x_v"], v["x_t"]))).to(device, dtype)
    modality = (torch.arange(len(images)) // len(v["x_v"])).to(device)
    labels = torch.from_numpy(v["labels"]).to(device)
    batch = Batch(images, labels, modality, modality, int(v["num_pos"]))
    optim = methods.recipe("lba", "sysu").optim
    optimizer = build_optimizer(phase_parameters(network, "main"), optim)
    set_lr(optimizer, _LR)
    for step in (0, 1):
        losses = network.training_step(batch)
        named = {**{n: losses.terms[t] for n, t in _TERMS.items()}, "total": losses.total}
        for name, got in named.items():
            want = forward(v[f"{variant}/step{step}/{name}"])
            yield compare(f"step {step} {name}", "forward", got, want, dtype)
        optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        prefix = f"{variant}/step{step}/grad/"
        for name in (key.removeprefix(prefix) for key in v if key.startswith(prefix)):
            grad = network.get_parameter(_ours(name)).grad
            want = gradient(v[prefix + name])
            yield compare(f"gradient of {name}", "gradient", grad, want, dtype)
        optimizer.step()
        network.after_step()
    if variant != "official":  # the file ends here
        return
    state, prefix = network.state_dict(), "official/final/"
    for name in (key.removeprefix(prefix) for key in v if key.startswith(prefix)):
        want = forward(v[prefix + name])
        yield compare(f"after two steps {name}", "forward", state[_ours(name)], want, dtype)
    features = network.embed(images, modality)
    stored = np.concatenate([v[f"official/final_eval/feat_{m}"] for m in "vt"])
    yield compare("test features", "forward", features, forward(stored), dtype)


def _pairs(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    """The official draws of Python's generator."""
    v = golden.load("lba/sampler_schedule")
    arrangement = Arrangement(int(v["ids_per_batch"]), int(v["num_pos"]))
    before = random.getstate()
    try:
        for i, seed in enumerate(v["pair_python_seeds"].tolist()):
            random.seed(seed)
            found = draw_pairs(arrangement, rng="python")
            for name, got in (("pos", found.positive), ("neg", found.negative)):
                yield compare(
                    f"seed {seed} {name}", "forward", got, exact(v[f"pair_{name}"][i]), dtype
                )
    finally:
        random.setstate(before)


def _rates(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("lba/sampler_schedule")
    run = methods.recipe("lba", "sysu")
    epochs = range(1, run.schedule.epochs + 1)
    rates = np.array([lr_at(epoch, run.optim, run.schedule) for epoch in epochs])
    base = rates * run.optim.backbone_lr_scale
    for name, got in (("lr_head", rates), ("lr_base", base)):
        yield compare(name, "forward", got, Want(v[name], 1e-12, 1e-12), dtype)
