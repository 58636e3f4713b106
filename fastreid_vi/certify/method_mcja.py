"""MCJA: one training step of the head, the retrieval loss by sorting and pooling."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import numpy as np
import torch

from fastreid_vi.certify.cases import Check, Procedure, Want, compare, narrow
from fastreid_vi.certify.networks import GivenMap
from fastreid_vi.certify.vectors import Golden
from fastreid_vi.config import INFRARED, VISIBLE, Batch
from fastreid_vi.methods.mcja import MCJA, MCJAOptions
from fastreid_vi.methods.mcja.losses import cross_modality_retrieval

Path = Literal["auto", "pav"]
_PATHS: tuple[Path, ...] = ("auto", "pav")
_STATE = {
    "bn_neck.weight": "bn_w",
    "bn_neck.running_mean": "bn_rm_in",
    "bn_neck.running_var": "bn_rv_in",
    "classifier.weight": "cls_w",
}
_RETRIEVAL = (
    "p4k4", "p8k16", "p8k16rand", "removed", "onedir", "tiny_gallery", "strength008",
    "strength005", "strength002", "novalid",
)  # fmt: skip


def procedures() -> Iterator[Procedure]:
    """Everything that is certified of MCJA beside its layout, adapters and sampler."""
    for path in _PATHS:
        yield Procedure(
            owner="mcja", name=f"mcja/head a, one step, {path} path", run=partial(_head, path)
        )
    yield Procedure(owner="mcja", name="mcja/cmr, pav path", run=_retrieval)


def _head(path: Path, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    """Float32 tolerance throughout: the released head takes float32 steps in float64 too."""
    v = golden.case("mcja/head", "a")
    options = MCJAOptions(cmr_path=path, normalize_test=False)
    network = MCJA(len(v["cls_w"]), options, backbone=GivenMap(v["x"].shape[1]))
    network.to(device, dtype)
    state = network.state_dict()
    for name, key in _STATE.items():
        state[name].copy_(torch.from_numpy(v[key]))
    images = torch.from_numpy(v["x"]).to(device, dtype).requires_grad_()
    labels, cams = (torch.from_numpy(v[key]).to(device) for key in ("ids", "cams"))
    sides = np.where(np.isin(v["cams"], (1, 2, 4, 5)), VISIBLE, INFRARED)
    modality = torch.from_numpy(sides).long().to(device)
    losses = network.training_step(Batch(images, labels, modality, cams))
    losses.total.backward()  # type: ignore[no-untyped-call]
    for name, key in (
        ("identity", "loss_id"),
        ("retrieval", "loss_cmr"),
        ("accuracy", "cls_acc"),
    ):
        yield compare(name, "forward", losses.terms[name], narrow(v[key], 1e-5), dtype)
    yield compare("total", "forward", losses.total, narrow(v["loss64"], 1e-5), dtype)
    for name, leaf, key in (
        ("x", images, "gx64"),
        ("bn_neck.weight", network.bn_neck.weight, "g_bn_w"),
        ("classifier.weight", network.classifier.weight, "g_cls_w"),
    ):
        yield compare(f"gradient of {name}", "gradient", leaf.grad, narrow(v[key], 1e-4), dtype)
    state = network.state_dict()
    for name in ("running_mean", "running_var"):
        want = narrow(v[f"bn_r{name[8]}_out"], 1e-5)
        yield compare(f"bn_neck.{name} after", "forward", state[f"bn_neck.{name}"], want, dtype)
    yield compare("gem", "forward", network.pool(images), narrow(v["gem"], 1e-5), dtype)
    features = network.embed(images.detach(), modality)
    yield compare("test features", "forward", features, narrow(v["eval_out"], 1e-5), dtype)


def _retrieval(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    for name in _RETRIEVAL:
        v = golden.case("mcja/cmr", name)
        emb = torch.from_numpy(v["emb"]).to(device, dtype).requires_grad_()
        ids, mods = (torch.from_numpy(v[key]).to(device) for key in ("ids", "mods"))
        strength = float(v["strength"])
        loss = cross_modality_retrieval(emb, ids, mods, strength=strength, path="pav")
        (1.7 * loss).backward()  # type: ignore[no-untyped-call]
        yield compare(f"{name} loss", "forward", loss, Want(v["loss64"], 1e-5, 1e-9), dtype)
        largest = max(float(np.abs(v["gemb64"]).max()), 1e-6)
        want = Want(v["gemb64"], 1e-4, 1e-9, largest)
        yield compare(f"{name} gradient", "gradient", emb.grad, want, dtype)
