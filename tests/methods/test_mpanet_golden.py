"""MPANet against the released code's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastreid_vi.config import INFRARED, VISIBLE, Batch
from fastreid_vi.methods import recipe
from fastreid_vi.methods.mpanet import MPANet, MPANetOptions
from fastreid_vi.methods.mpanet.losses import Outputs, center_cluster, mutual_mean_learning
from fastreid_vi.ops import CenterCluster
from tests.conftest import golden
from tests.methods.mpanet_cases import GivenMap, small

DTYPES = [torch.float64, torch.float32]
TERMS = {  # golden name -> ours
    "p_reg": "separation",
    "cc": "center_cluster",
    "acc": "accuracy",
    "ce": "identity",
    "ce_v": "visible_identity",
    "ce_i": "infrared_identity",
    "KL": "divergence",
}


def close(actual: Tensor, expected: Any, dtype: torch.dtype, *, gradient: bool = False) -> None:
    """README tolerances: 1e-9 in float64; in float32 1e-5, gradients 1e-4 of the largest."""
    want = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    got = actual.detach().double()
    if dtype == torch.float64:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))
    elif gradient:
        assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def modality_of(cams: np.ndarray) -> Tensor:
    """Cameras 3 and 6 are infrared; RegDB's released ids are 2 and 3."""
    return torch.from_numpy(np.where(np.isin(cams, (3, 6)), INFRARED, VISIBLE)).long()


def released(arrays: dict[str, np.ndarray], dtype: torch.dtype, **options: Any) -> MPANet:
    """A network with the golden file's settings and start."""
    num_ids = len(arrays["init/classifier.weight"])
    chosen = MPANetOptions(
        parts=int(arrays["num_parts"]),
        margin=float(arrays["cfg/margin"]),
        sep_weight=float(arrays["cfg/weight_sep"]),
        sid_weight=2 * float(arrays["cfg/weight_sid"]),
        kl_weight=float(arrays["cfg/weight_KL"]),
        update_rate=float(arrays["cfg/update_rate"]),
        normalize_test=False,
        **options,
    )
    network = MPANet(num_ids, chosen, backbone=GivenMap(arrays["x"].shape[1])).to(dtype)
    state = network.state_dict()
    for name, value in arrays.items():
        if name.startswith("init/"):
            state[name[5:]].copy_(torch.from_numpy(value))
    for side in ("visible", "infrared"):
        state[f"{side}_classifier_.weight"].copy_(state[f"{side}_classifier.weight"])
    return network


def run_golden(file: str, dtype: torch.dtype, **options: Any) -> None:
    arrays = golden(f"mpanet/{file}")
    network = released(arrays, dtype, **options)
    network.begin_epoch(1)
    modality = modality_of(arrays["cam_ids"])
    labels, cams = (torch.from_numpy(arrays[k]) for k in ("labels", "cam_ids"))
    images = torch.from_numpy(arrays["x"]).to(dtype).requires_grad_()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=float(arrays["sgd_lr"]))
    for step in range(3):
        losses = network.training_step(Batch(images, labels, modality, cams))
        for name, term in TERMS.items():
            close(losses.terms[term], arrays[f"step{step}/{name}"], dtype)
        close(losses.total, arrays[f"step{step}/total"], dtype)
        optimizer.zero_grad()
        losses.total.backward()
        if step == 0:
            assert images.grad is not None
            close(images.grad, arrays["step0/grad/x"], dtype, gradient=True)
            for name in (k[11:] for k in arrays if k.startswith("step0/grad/") and k[11:] != "x"):
                gradient = network.get_parameter(name).grad
                close(gradient, arrays[f"step0/grad/{name}"], dtype, gradient=True)
        optimizer.step()
        network.after_step()
    state = network.state_dict()
    assert int(state["bn_neck.num_batches_tracked"]) == int(arrays["final/num_batches_tracked"])
    finals = [k[6:] for k in arrays if k.startswith("final/") and k[6:] in state]
    assert len(finals) == 7  # both means, both conv entries, neck weight and statistics
    for name in finals:
        close(state[name], arrays[f"final/{name}"], dtype)
    close(network.embed(images.detach(), modality), arrays["final/eval_feat"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", ["train_forward", "train_forward_regdb_cams"])
@pytest.mark.parametrize("cc_mode", ["pairs", "rows"])
def test_three_training_iterations(file: str, dtype: torch.dtype, cc_mode: str) -> None:
    run_golden(file, dtype, cc_mode=cc_mode)


def test_expanded_distances_agree_in_double() -> None:
    run_golden("train_forward", torch.float64, cc_mode="rows", cc_expand=True, cc_safe=False)


# Mutual mean learning.


@pytest.mark.parametrize("dtype", DTYPES)
def test_mutual_mean_learning(dtype: torch.dtype) -> None:
    arrays = golden("mpanet/mutual_mean_learning")
    num_ids, width = arrays["init/visible_classifier"].shape
    network = small(num_ids, width // 2, parts=1).to(dtype)
    state = network.state_dict()
    for name in (k[5:] for k in arrays if k.startswith("init/")):
        state[f"{name}.weight"].copy_(torch.from_numpy(arrays[f"init/{name}"]))
    modality = modality_of(arrays["cam_ids"])
    assert np.array_equal(modality.numpy() == INFRARED, arrays["sub"])
    network.update_means()
    f = torch.from_numpy(arrays["f"]).to(dtype).requires_grad_()
    logits = {
        side: network.get_submodule(side)(f)
        for side in (
            "visible_classifier",
            "infrared_classifier",
            "visible_classifier_",
            "infrared_classifier_",
        )
    }
    outputs = Outputs(f, f, f, *logits.values())
    labels = torch.from_numpy(arrays["labels"])
    result = mutual_mean_learning(outputs, labels, modality)
    close(result.visible, arrays["ce_v"], dtype)
    close(result.infrared, arrays["ce_i"], dtype)
    close(result.divergence, arrays["kl"], dtype)
    weight = 2 * float(arrays["weight_sid"]), float(arrays["weight_kl"])
    total = weight[0] * (result.visible + result.infrared) + weight[1] * result.divergence
    close(total, arrays["total"], dtype)
    total.backward()
    assert f.grad is not None
    close(f.grad, arrays["grad_f"], dtype, gradient=True)
    for side in ("visible", "infrared"):
        students = network.get_parameter(f"{side}_classifier.weight")
        close(students.grad, arrays[f"grad_{side}_classifier"], dtype, gradient=True)
        means = network.get_parameter(f"{side}_classifier_.weight")
        assert means.grad is None
        close(means, arrays[f"after/{side}_classifier_"], dtype)
    reversed_ = mutual_mean_learning(outputs, labels, modality, "teacher_student")
    close(reversed_.divergence, arrays["kl_reversed_option"], dtype)


# Centre cluster loss.


def cluster(case: str, dtype: torch.dtype, **options: Any) -> tuple[CenterCluster, Tensor]:
    arrays = golden("mpanet/center_cluster")
    x = torch.from_numpy(arrays[f"{case}/x"]).to(dtype).requires_grad_()
    labels = torch.from_numpy(arrays[f"{case}/labels"])
    result = center_cluster(x, labels, margin=float(arrays["margin"]), **options)
    result.loss.backward()
    assert x.grad is not None
    return result, x.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["k8", "k10", "k4", "k4_shuffled"])
@pytest.mark.parametrize("options", [{}, {"safe": False}, {"expand": True}], ids=str)
def test_center_cluster_pairs(case: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    arrays = golden("mpanet/center_cluster")
    result, gradient = cluster(case, dtype, **options)
    close(result.loss, arrays[f"{case}/pair_loss"], dtype)
    close(result.pull, arrays[f"{case}/dist_pc"], dtype)
    close(result.push, arrays[f"{case}/pair_dist_an"], dtype)
    close(gradient, arrays[f"{case}/pair_grad"], dtype, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["k8", "k10", "k4", "k4_shuffled"])
@pytest.mark.parametrize("options", [{}, {"safe": False}, {"expand": True}], ids=str)
def test_center_cluster_rows(case: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    arrays = golden("mpanet/center_cluster")
    result, gradient = cluster(case, dtype, mode="rows", **options)
    close(result.loss, arrays[f"{case}/loss"], dtype)
    close(result.pull, arrays[f"{case}/dist_pc"], dtype)
    close(result.push, arrays[f"{case}/dist_an"], dtype)
    close(gradient, arrays[f"{case}/grad"], dtype, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["pairs", "rows"])
def test_duplicated_image(mode: str, dtype: torch.dtype) -> None:
    arrays = golden("mpanet/center_cluster")
    nan = torch.from_numpy(arrays["duplicate/grad_isnan"])
    result, gradient = cluster("duplicate", dtype, mode=mode, safe=False)
    close(result.loss, arrays["duplicate/loss"], dtype)
    assert torch.equal(gradient.isnan(), nan)
    result, safe = cluster("duplicate", dtype, mode=mode)
    close(result.loss, arrays["duplicate/loss"], dtype)
    assert bool(safe.isfinite().all())
    torch.testing.assert_close(safe[~nan], gradient[~nan])


# Schedule.


def test_rates_of_every_epoch() -> None:
    arrays = golden("mpanet/sampler_schedule")
    network = small()
    for dataset in ("sysu", "regdb"):
        run = recipe("mpanet", dataset)
        assert run.schedule.epochs == len(arrays["epoch"])
        for epoch, lr, rate in zip(
            arrays["epoch"], arrays[f"lr_{dataset}"], arrays["update_rate"], strict=True
        ):
            drops = sum(epoch > after for after in run.schedule.milestones)
            assert run.optim.lr * run.schedule.gamma**drops == pytest.approx(lr, rel=1e-12)
            network.begin_epoch(int(epoch))
            assert network.update_rate == pytest.approx(rate, rel=1e-12)
