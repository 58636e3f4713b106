"""MPANet: three training iterations from a given map, mutual mean learning, rates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastreid_vi import methods
from fastreid_vi.certify.cases import Check, Procedure, Want, compare, exact, forward, gradient
from fastreid_vi.certify.networks import GivenMap
from fastreid_vi.certify.vectors import Array, Golden
from fastreid_vi.config import INFRARED, VISIBLE, Batch
from fastreid_vi.methods.mpanet import MPANet, MPANetOptions
from fastreid_vi.methods.mpanet.losses import Outputs, mutual_mean_learning
from fastreid_vi.train.optim import lr_at

_TERMS = {  # golden name -> ours
    "p_reg": "separation",
    "cc": "center_cluster",
    "acc": "accuracy",
    "ce": "identity",
    "ce_v": "visible_identity",
    "ce_i": "infrared_identity",
    "KL": "divergence",
}
_SIDES = ("visible_classifier", "infrared_classifier")


def procedures() -> Iterator[Procedure]:
    """Everything that is certified of MPANet beside its layout and sampler."""
    for file in ("train_forward", "train_forward_regdb_cams"):
        for mode in ("rows", "pairs"):
            yield Procedure(
                owner="mpanet",
                name=f"mpanet/{file}, three iterations, centres by {mode}",
                run=partial(_iterations, file, mode),
            )
    yield Procedure(owner="mpanet", name="mpanet/mutual_mean_learning", run=_mutual)
    yield Procedure(
        owner="mpanet",
        name="mpanet/sampler_schedule, rates",
        run=_rates,
        dtypes=("float64",),
        devices=("cpu",),
    )


def _modality(cams: Array) -> Tensor:
    """Cameras 3 and 6 are infrared; RegDB's released ids are 2 and 3."""
    return torch.from_numpy(np.where(np.isin(cams, (3, 6)), INFRARED, VISIBLE)).long()


def _network(v: dict[str, Array], mode: Literal["rows", "pairs"]) -> MPANet:
    options = MPANetOptions(
        parts=int(v["num_parts"]),
        margin=float(v["cfg/margin"]),
        sep_weight=float(v["cfg/weight_sep"]),
        sid_weight=2 * float(v["cfg/weight_sid"]),
        kl_weight=float(v["cfg/weight_KL"]),
        update_rate=float(v["cfg/update_rate"]),
        normalize_test=False,
        cc_mode=mode,
    )
    num_ids = len(v["init/classifier.weight"])
    network = MPANet(num_ids, options, backbone=GivenMap(v["x"].shape[1]))
    state = network.state_dict()
    for name in (key for key in v if key.startswith("init/")):
        state[name[5:]].copy_(torch.from_numpy(v[name]))
    for side in _SIDES:
        state[f"{side}_.weight"].copy_(state[f"{side}.weight"])
    return network


def _iterations(
    file: str, mode: Literal["rows", "pairs"], golden: Golden, dtype: torch.dtype, device: str
) -> Iterator[Check]:
    v = golden.load(f"mpanet/{file}")
    network = _network(v, mode).to(device, dtype)
    network.begin_epoch(1)
    images = torch.from_numpy(v["x"]).to(device, dtype).requires_grad_()
    labels, cams = (torch.from_numpy(v[key]).to(device) for key in ("labels", "cam_ids"))
    batch = Batch(images, labels, _modality(v["cam_ids"]).to(device), cams)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=float(v["sgd_lr"]))
    for step in range(3):
        losses = network.training_step(batch)
        for name, got in {n: losses.terms[t] for n, t in _TERMS.items()}.items():
            yield compare(f"step {step} {name}", "forward", got, _scalar(v, step, name), dtype)
        yield compare(
            f"step {step} total", "forward", losses.total, _scalar(v, step, "total"), dtype
        )
        optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            for name in (key[11:] for key in v if key.startswith("step0/grad/")):
                leaf = images if name == "x" else network.get_parameter(name)
                want = gradient(v[f"step0/grad/{name}"])
                yield compare(f"gradient of {name}", "gradient", leaf.grad, want, dtype)
        optimizer.step()
        network.after_step()
    state = network.state_dict()
    for name in (key[6:] for key in v if key.startswith("final/") and key[6:] in state):
        yield compare(
            f"after three steps {name}", "forward", state[name], forward(v[f"final/{name}"]), dtype
        )
    tracked = state["bn_neck.num_batches_tracked"]
    yield compare("batches seen", "forward", tracked, exact(v["final/num_batches_tracked"]), dtype)
    features = network.embed(images.detach(), batch.modality)
    yield compare("test features", "forward", features, forward(v["final/eval_feat"]), dtype)


def _scalar(v: dict[str, Array], step: int, name: str) -> Want:
    value = v[f"step{step}/{name}"]
    return Want(value, 1e-6, 1e-6) if name == "acc" else forward(value)  # stored in float32


def _mutual(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("mpanet/mutual_mean_learning")
    num_ids, width = v["init/visible_classifier"].shape
    options = MPANetOptions(parts=1, update_rate=float(v["update_rate"]))
    network = MPANet(num_ids, options, backbone=GivenMap(width // 2)).to(device, dtype)
    state = network.state_dict()
    for name in (key for key in v if key.startswith("init/")):
        state[f"{name[5:]}.weight"].copy_(torch.from_numpy(v[name]))
    network.update_means()
    f = torch.from_numpy(v["f"]).to(device, dtype).requires_grad_()
    logits = [network.get_submodule(side)(f) for side in (*_SIDES, *(s + "_" for s in _SIDES))]
    outputs = Outputs(f, f, f, *logits)
    labels, modality = torch.from_numpy(v["labels"]).to(device), _modality(v["cam_ids"]).to(device)
    found = mutual_mean_learning(outputs, labels, modality)
    for name, got in (("ce_v", found.visible), ("ce_i", found.infrared), ("kl", found.divergence)):
        yield compare(name, "forward", got, forward(v[name]), dtype)
    swapped = mutual_mean_learning(outputs, labels, modality, "teacher_student").divergence
    want = forward(v["kl_reversed_option"])
    yield compare("kl, arguments swapped", "forward", swapped, want, dtype)
    identity = 2 * float(v["weight_sid"]) * (found.visible + found.infrared)
    total = identity + float(v["weight_kl"]) * found.divergence
    yield compare("total", "forward", total, forward(v["total"]), dtype)
    total.backward()  # type: ignore[no-untyped-call]
    yield compare("gradient of f", "gradient", f.grad, gradient(v["grad_f"]), dtype)
    for side in _SIDES:
        student, mean = (network.get_parameter(f"{side}{end}.weight") for end in ("", "_"))
        grad = gradient(v[f"grad_{side}"])
        yield compare(f"gradient of {side}", "gradient", student.grad, grad, dtype)
        yield compare(f"{side}_ after", "forward", mean, forward(v[f"after/{side}_"]), dtype)


def _rates(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("mpanet/sampler_schedule")
    network = MPANet(2, MPANetOptions(parts=1), backbone=GivenMap(2))
    epochs = [int(epoch) for epoch in v["epoch"]]
    for dataset in ("sysu", "regdb"):
        run = methods.recipe("mpanet", dataset)
        rates = [lr_at(epoch, run.optim, run.schedule) for epoch in epochs]
        yield compare(
            f"learning rate, {dataset}", "forward", rates, _rate(v[f"lr_{dataset}"]), dtype
        )
    updates = []
    for epoch in epochs:
        network.begin_epoch(epoch)
        updates.append(network.update_rate)
    yield compare("update rate of the means", "forward", updates, _rate(v["update_rate"]), dtype)


def _rate(value: Array) -> Want:
    return Want(value, 1e-12, 1e-12)
