"""AlignGAN: one iteration of every stage with tiny networks, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastreid_vi import methods
from fastreid_vi.certify.cases import Check, Procedure, Want, compare
from fastreid_vi.certify.fill import fill_embedder, filled
from fastreid_vi.certify.networks import PooledConv
from fastreid_vi.certify.vectors import Array, Golden
from fastreid_vi.config import INFRARED, VISIBLE, Batch
from fastreid_vi.methods.aligngan import AlignGAN, AlignGANOptions
from fastreid_vi.methods.base import Losses
from fastreid_vi.train.optim import build_optimizer, phase_parameters
from fastreid_vi.train.players import phases_of

NETWORKS = {  # golden name -> ours, offset of its fill
    "G_rgb2ir": ("visible_to_infrared", 100),
    "G_ir2rgb": ("infrared_to_visible", 200),
    "D_rgb": ("visible_discriminator", 300),
    "D_rgb_warmup": ("visible_warmup_discriminator", 400),
    "D_ir_warmup": ("infrared_warmup_discriminator", 500),
    "D_ir": ("infrared_discriminator", 600),
    "encoder": ("backbone", 700),
    "embeder": ("embedder", 800),
}
_PIXEL = {  # case -> phases
    "warm_pixel": ("generators_warmup", "d_rgb_warmup", "d_ir_warmup"),
    "joint_pixel": ("generators", "d_rgb", "d_ir"),
    "joint_pixel_rolled_ir_pids": ("generators", "d_rgb", "d_ir"),
}
_TIGHT, _STORED = 1e-6, 1e-5  # float64 values; values stored in float32
_GRADIENT = 1e-5  # sums over whole planes cancel: 6e-6 of the largest entry remain


def procedures() -> Iterator[Procedure]:
    """One procedure for every stored iteration."""
    stages: list[tuple[str, Any]] = [("warm_feature", _warm_feature)]
    stages += [("joint_feature", _joint_feature)]
    stages += [(name, partial(_pixel, name)) for name in _PIXEL]
    for name, run in stages:
        yield Procedure(
            owner="aligngan", name=f"aligngan/steps {name}", run=run, dtypes=("float64",)
        )


def released(v: Mapping[str, Array], device: str = "cpu") -> AlignGAN:
    """The golden file's tiny networks, in float64."""
    *_, classes, s = (int(n) for n in v["cfg_P_K_ncls_seed"])
    options = AlignGANOptions(
        conv_dim=2,
        residual_blocks=1,
        dropout=0.0,
        pixel_images=0,
        pixel_triplet_labels="official",
    )
    network = AlignGAN(classes, options, backbone=PooledConv()).double()
    for name, offset in NETWORKS.values():
        part = network.get_submodule(name)
        if name == "embedder":
            fill_embedder(part, s + offset)
            continue
        norms = {id(m.weight) for m in part.modules() if isinstance(m, nn.InstanceNorm2d)}
        for q, p in enumerate(part.parameters()):
            scale = 3 / np.sqrt(np.prod(p.shape[1:])) if p.dim() > 1 else 0.3
            value = filled(p.shape, s + offset + q, float(scale))
            if id(p) in norms:
                value = 1 + filled(p.shape, s + offset + q, 0.5)
            p.data.copy_(value)
    return network.to(device)


def golden_batch(v: Mapping[str, Array], device: str = "cpu", infrared_pids: str = "pids") -> Batch:
    """The golden file's images, visible then infrared."""

    def read(name: str) -> Tensor:
        low = (v[name].astype(np.float64) / 127.5 - 1).astype(np.float32)
        wide = torch.from_numpy(low).double().expand(-1, 3, -1, -1)
        return wide.repeat_interleave(8, 2).repeat_interleave(8, 3)

    labels = torch.from_numpy(np.concatenate([v["pids"], v[infrared_pids]]))
    modality = torch.tensor([VISIBLE, INFRARED]).repeat_interleave(len(v["pids"]))
    images = torch.cat([read("rgb_low_u8"), read("ir_low_u8")])
    images, labels, modality = (t.to(device) for t in (images, labels, modality))
    return Batch(images, labels, modality, modality, int(v["cfg_P_K_ncls_seed"][1]))


def _backward(network: AlignGAN, batch: Batch, phase: str) -> Losses:
    network.zero_grad()
    with phases_of(network)[phase].alone():
        losses = network.training_step(network.phase_batch(batch, phase), phase)
        losses.total.backward()  # type: ignore[no-untyped-call]
    return losses


def _step(network: AlignGAN, phase: str) -> None:
    optim = methods.recipe("aligngan", "sysu").optim_of(network.player(phase))
    build_optimizer(phase_parameters(network, phase), optim).step()


def _tight(value: Any) -> Want:
    return Want(value, _TIGHT, _TIGHT)


def _gradients(
    network: AlignGAN, stage: Mapping[str, Array], names: Sequence[str]
) -> Iterator[Check]:
    """Gradients in full, by their norm, or by their first elements."""
    for name in names:
        part = network.get_submodule(NETWORKS[name][0])
        for field in (key for key in stage if key.split("__")[1:2] == [name]):
            kind, _, key = field.split("__")
            own = f"conv.{key[2:]}" if name == "encoder" else key
            grad = part.get_parameter(own).grad
            assert grad is not None  # this phase moves that network
            got = {"gnorm": grad.norm(), "gfirst16": grad.flatten()[:16]}.get(kind, grad)
            scale = None if kind == "gnorm" else float(grad.abs().max())
            want = Want(stage[field], _GRADIENT, _GRADIENT, scale)
            yield compare(f"{kind} of {name} {key}", "gradient", got, want, torch.float64)


def _compared(values: Mapping[str, tuple[Any, Any]], bound: float) -> Iterator[Check]:
    for name, (got, want) in values.items():
        yield compare(name, "forward", got, Want(want, bound, bound), torch.float64)


def _warm_feature(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("aligngan/steps")
    stage, network = golden.case("aligngan/steps", "warm_feature"), released(v, device)
    losses = _backward(network, golden_batch(v, device)._replace(paired=0), "feature_warmup")
    terms = losses.terms
    yield from _compared(
        {
            "identity": (terms["identity"], stage["calls_cls"][0]),
            "triplet": (terms["triplet"], stage["calls_tri"][0]),
        },
        _TIGHT,
    )
    accuracy = 100 * terms["accuracy"], stage["returned"][0]
    yield from _compared({"accuracy": accuracy}, _STORED)
    yield from _gradients(network, stage, ("encoder", "embeder"))
    _step(network, "feature_warmup")
    bias = network.get_parameter("backbone.conv.bias")[:32]
    want = _tight(stage["encoder_bias_after_sgd_first32"])
    yield compare("encoder bias after SGD", "forward", bias, want, dtype)


def _joint_feature(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("aligngan/steps")
    stage, network = golden.case("aligngan/steps", "joint_feature"), released(v, device)
    terms = _backward(network, golden_batch(v, device), "feature").terms
    calls = {key: stage[f"calls_{key}"] for key in ("mse", "cls", "tri")}
    yield from _compared(
        {
            "gan": (terms["gan"], calls["mse"][0]),
            "identity, fake": (terms["identity_fake"], calls["cls"][0]),
            "identity, real": (terms["identity_real"], calls["cls"][1]),
            "triplet, fake": (terms["triplet_fake"], calls["tri"][0]),
            "triplet, real": (terms["triplet_real"], calls["tri"][1]),
        },
        _TIGHT,
    )
    shown = {
        f"accuracy, {name}": (100 * terms[f"accuracy_{name}"], stage["returned"][i])
        for i, name in enumerate(("fake", "real"))
    }
    yield from _compared(shown, _STORED)
    yield from _gradients(network, stage, ("encoder", "embeder"))


def _pixel(case: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    """The generators, then both discriminators; every network's optimiser steps."""
    v = golden.load("aligngan/steps")
    stage, network = golden.case("aligngan/steps", case), released(v, device)
    rolled = "pids_rolled" if case.endswith("pids") else "pids"
    batch = golden_batch(v, device, rolled)
    generators, d_rgb, d_ir = _PIXEL[case]
    terms = _backward(network, batch, generators).terms
    calls = {key: stage[f"calls_{key}"] for key in ("mse", "cycle", "identity", "cls", "tri")}
    yield from _compared(
        {
            "gan": (terms["gan"], calls["mse"][:2].mean()),
            "cycle": (terms["cycle"], calls["cycle"].mean()),
            "mapping": (terms["mapping"], calls["identity"].mean()),
            "triplet": (terms["triplet"], calls["tri"].sum()),
            "identity": (terms["identity"], calls["cls"][0]),
        },
        _TIGHT,
    )
    yield from _gradients(network, stage, ("G_rgb2ir", "G_ir2rgb"))
    state = network.visible_to_infrared.state_dict()
    for field in (key for key in stage if "_running_" in key):
        name = field.removeprefix("G_rgb2ir_").removesuffix("_after").replace("_run", ".run")
        yield compare(f"{name} after", "forward", state[name], _tight(stage[field]), dtype)
    _step(network, generators)
    if "G_rgb2ir_conv0_after_adam" in stage:
        weight = network.get_parameter("visible_to_infrared.model.0.weight")
        want = _tight(stage["G_rgb2ir_conv0_after_adam"])
        yield compare("first convolution after Adam", "forward", weight, want, dtype)
    total = torch.zeros((), dtype=dtype, device=device)
    scores = iter(calls["mse"][2:])
    for phase in (d_rgb, d_ir):
        losses = _backward(network, batch, phase)
        total = total + losses.total.detach()
        for name, got in losses.terms.items():
            yield compare(f"{phase} {name}", "forward", got, _tight(next(scores)), dtype)
        yield from _gradients(network, stage, (phase.capitalize(),))  # "d_rgb" is D_rgb
        _step(network, phase)
    yield from _compared({"discriminators": (total, stage["returned"][3])}, _STORED)
