"""MCJA against the released code's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastreid_vi import ops
from fastreid_vi.config import Batch
from fastreid_vi.layers import DistributionAdapter, GeM
from fastreid_vi.methods.mcja import MCJAOptions
from fastreid_vi.methods.mcja.losses import (
    cross_modality_retrieval,
    mcja_losses,
    rank_galleries,
)
from fastreid_vi.methods.mcja.spectra import MEAN, STD, spectral_view
from tests.conftest import golden
from tests.methods.mcja_cases import modality_of, small

DTYPES = [torch.float64, torch.float32]
PATHS = ["auto", "pav"]


def close(actual: Tensor | None, expected: Any, tolerance: float) -> None:
    """Relative to each entry, and to the largest one."""
    assert actual is not None
    want = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    got = actual.detach().double()
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


# Modality distribution adapter.

PARAMETERS = {  # golden name -> official name
    "sc_w": "sc_conv.weight",
    "sc_b": "sc_conv.bias",
    "ca_w": "ca_conv.weight",
    "ca_bn_w": "ca_bn.weight",
    "ca_bn_b": "ca_bn.bias",
    "norm_w": "norm_bn.weight",
    "norm_b": "norm_bn.bias",
}
BUFFERS = {
    "ca_rm": "ca_bn.running_mean",
    "ca_rv": "ca_bn.running_var",
    "norm_rm": "norm_bn.running_mean",
    "norm_rv": "norm_bn.running_var",
}


def adapter_of(arrays: dict[str, np.ndarray], case: str, dtype: torch.dtype) -> DistributionAdapter:
    maps, channels = arrays[f"{case}__sc_w"].shape[:2]
    adapter = DistributionAdapter(channels, maps).to(dtype)
    counts = {f"{n}.num_batches_tracked": torch.tensor(0) for n in ("ca_bn", "norm_bn")}
    state = {name: torch.from_numpy(arrays[f"{case}__{k}"]) for k, name in PARAMETERS.items()}
    state |= {name: torch.from_numpy(arrays[f"{case}__{k}_in"]) for k, name in BUFFERS.items()}
    adapter.load_state_dict({**state, **counts})
    return adapter.train(bool(arrays[f"{case}__train"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["a", "b", "zero", "eval", "peaky", "wide"])
def test_adapter_with_the_official_names(case: str, dtype: torch.dtype) -> None:
    arrays = golden("mcja/mda")
    adapter = adapter_of(arrays, case, dtype)
    x = torch.from_numpy(arrays[f"{case}__x"]).to(dtype).requires_grad_()
    y = adapter(x)
    y.backward(torch.from_numpy(arrays[f"{case}__gout"]).to(dtype))
    wide = "64" if dtype == torch.float64 and f"{case}__y64" in arrays else ""
    close(y, arrays[f"{case}__y{wide}"], 1e-10 if wide else 1e-5)
    close(x.grad, arrays[f"{case}__gx{wide}"], 1e-10 if wide else 1e-4)
    for short, name in PARAMETERS.items():
        if short == "sc_b":  # rounding noise in the released code, exactly zero here
            assert not bool(adapter.get_parameter(name).grad.any())  # type: ignore[union-attr]
        else:
            close(adapter.get_parameter(name).grad, arrays[f"{case}__g_{short}"], 1e-4)
    for short, name in BUFFERS.items():
        close(adapter.get_buffer(name), arrays[f"{case}__{short}_out"], 1e-5)
    assert int(adapter.ca_bn.num_batches_tracked) == int(adapter.training)  # type: ignore[arg-type]
    assert (case == "zero") == torch.equal(y, x)


# Head.


@pytest.mark.parametrize("dtype", DTYPES)
def test_gem(dtype: torch.dtype) -> None:
    arrays = golden("mcja/head")
    x = torch.from_numpy(arrays["gem__x"]).to(dtype).requires_grad_()
    y = GeM()(x)
    y.backward(torch.from_numpy(arrays["gem__gout"]).to(dtype))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    close(y, arrays["gem__y64"], tolerance)
    close(x.grad, arrays["gem__gx64"], tolerance)
    close(y, arrays["gem__y"], 1e-5)
    close(x.grad, arrays["gem__gx"], 1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_training_step_of_the_head(dtype: torch.dtype, path: str) -> None:
    """Float32 tolerance throughout: the released head takes float32 steps in double too."""
    a = {k[3:]: v for k, v in golden("mcja/head").items() if k.startswith("a__")}
    network = small(len(a["cls_w"]), a["x"].shape[1], cmr_path=path, normalize_test=False).to(dtype)
    state = network.state_dict()
    for name, key in (
        ("bn_neck.weight", "bn_w"),
        ("bn_neck.running_mean", "bn_rm_in"),
        ("bn_neck.running_var", "bn_rv_in"),
        ("classifier.weight", "cls_w"),
    ):
        state[name].copy_(torch.from_numpy(a[key]))
    images = torch.from_numpy(a["x"]).to(dtype).requires_grad_()
    labels, cams = (torch.from_numpy(a[key]) for key in ("ids", "cams"))
    losses = network.training_step(Batch(images, labels, modality_of(a["cams"]), cams))
    losses.total.backward()
    for term, key in (("identity", "loss_id"), ("retrieval", "loss_cmr"), ("accuracy", "cls_acc")):
        close(losses.terms[term], a[key], 1e-5)
    close(losses.total, a["loss"], 1e-5)
    close(losses.total, a["loss64"], 1e-5)
    close(images.grad, a["gx"], 1e-4)
    close(images.grad, a["gx64"], 1e-4)
    close(network.bn_neck.weight.grad, a["g_bn_w"], 1e-4)
    close(network.classifier.weight.grad, a["g_cls_w"], 1e-4)
    assert network.bn_neck.bias.grad is None
    close(network.bn_neck.running_mean, a["bn_rm_out"], 1e-5)
    close(network.bn_neck.running_var, a["bn_rv_out"], 1e-5)
    close(network.pool(images), a["gem"], 1e-5)
    close(network.embed(images.detach(), modality_of(a["cams"])), a["eval_out"], 1e-5)
    logits = torch.from_numpy(a["emb"] @ a["cls_w"].T).to(dtype)
    emb = torch.from_numpy(a["emb"]).to(dtype)
    again = mcja_losses(emb, logits, labels, modality_of(a["cams"]), MCJAOptions(cmr_path=path))
    close(again.total, a["loss"], 1e-5)


# Cross-modality retrieval loss.

CASES = ["p4k4", "p8k16", "p8k16rand", "removed", "onedir", "tiny_gallery", "strength008",
         "strength005", "strength002", "novalid"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_retrieval_loss(case: str, dtype: torch.dtype, path: str) -> None:
    c = {k.split("__")[1]: v for k, v in golden("mcja/cmr").items() if k.startswith(f"{case}__")}
    emb = torch.from_numpy(c["emb"]).to(dtype).requires_grad_()
    ids, mods = torch.from_numpy(c["ids"]), torch.from_numpy(c["mods"])
    loss = cross_modality_retrieval(emb, ids, mods, strength=float(c["strength"]), path=path)
    (1.7 * loss).backward()
    wide = dtype == torch.float64
    close(loss, c["loss64"], 1e-9 if wide else 1e-5)
    close(emb.grad, c["gemb64"], 1e-9 if wide else 1e-4)
    close(loss, c["loss"], 1e-5)
    close(emb.grad, c["gemb"], 1e-3)
    assert (case == "novalid") == (int(c["n_valid_directions"]) == 0) == (loss.item() == 0)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c not in ("p8k16", "p8k16rand", "strength005", "novalid")]
)
def test_ranks_of_every_kept_query(case: str) -> None:
    c = {k.split("__")[1]: v for k, v in golden("mcja/cmr").items() if k.startswith(f"{case}__")}
    emb, mods = torch.from_numpy(c["emb"]).double(), torch.from_numpy(c["mods"])
    ranked = rank_galleries(emb, mods, strength=float(c["strength"]))
    valid = 0
    for side in (0, 1):  # visible queries, then infrared
        queries, gallery = np.flatnonzero(c["mods"] == side), np.flatnonzero(c["mods"] != side)
        match = c["ids"][queries][:, None] == c["ids"][gallery][None, :]
        queries = queries[match.any(1) & ~match.all(1)]
        if not len(queries):
            continue
        assert bool(ranked.gallery[queries][:, gallery].all())
        close(ranked.distance[queries][:, gallery], c[f"dist{valid}"], 1e-6)
        close(ranked.ranks[queries][:, gallery], c[f"rank{valid}"], 2e-6 * len(gallery))
        valid += 1
    assert valid == int(c["n_valid_directions"])


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("n", [5, 16, 64, 200])
def test_soft_rank(n: int, index: int) -> None:
    arrays = golden("mcja/soft_rank")
    assert n in arrays["sizes"]
    x = torch.from_numpy(arrays[f"n{n}__x"]).double().requires_grad_()
    ranks = ops.soft_rank(x, strength=float(arrays["strengths"][index]))
    ranks.backward(torch.from_numpy(arrays[f"n{n}__gout"]).double())
    close(ranks, arrays[f"n{n}__s{index}__y64"], 1e-9)
    close(x.grad, arrays[f"n{n}__s{index}__gx64"], 1e-9)


# Views of the visible images.


@pytest.mark.parametrize("spectrum", ["r", "g", "b"])
def test_views_are_those_of_the_uint8_image(spectrum: str) -> None:
    arrays = golden("mcja/augment")
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))

    def normalised(image: np.ndarray) -> Tensor:
        return ((torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std)[None]

    view = spectral_view(normalised(arrays["sel__img"]), spectrum)  # type: ignore[arg-type]
    channel = arrays[f"sel__{spectrum}"]
    close(view, normalised(np.stack([channel] * 3, axis=2)).numpy(), 1e-6)
