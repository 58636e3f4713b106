"""LbA against the released code's numbers: two training steps of a miniature, rates, pairs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastreid_vi import backend, methods
from fastreid_vi._dispatch import OPS
from fastreid_vi.config import Batch
from fastreid_vi.methods.lba import LbA, LbAOptions
from fastreid_vi.methods.lba.official import official_names
from fastreid_vi.methods.lba.pairing import Arrangement, Pairs, draw_pairs
from fastreid_vi.train.optim import build_optimizer, lr_at, phase_parameters, set_lr
from tests.conftest import golden
from tests.methods.lba_cases import Miniature

DTYPES = [torch.float64, torch.float32]
WEIGHTINGS = {"official": "batch", "paper": "sample"}
TERMS = {  # golden name -> ours
    "ce_id": "identity",
    "tri": "triplet",
    "ce_ic3": "consistency3",
    "ce_ic4": "consistency4",
    "dt3": "dense3",
    "dt4": "dense4",
}
# Each room with both weightings and both dtypes; Triton's interpreter is slow, so not crosswise.
CASES = [
    (variant, dtype, room)
    for room in ("reference", *OPS["dense_alignment"].backends)
    for variant in WEIGHTINGS
    for dtype in DTYPES
    if room != "triton" or (variant == "official") == (dtype == torch.float32)
]


def close(actual: Any, expected: Any, dtype: torch.dtype, *, gradient: bool = False) -> None:
    """README tolerances: 1e-9 in float64; in float32 1e-5, gradients 1e-4 of the largest."""
    want = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    got = actual.detach().double()
    assert got.shape == want.shape
    relative = 1e-9 if dtype == torch.float64 else 1e-4 if gradient else 1e-5
    bound = relative * float(want.abs().max())
    assert float((got - want).abs().max()) <= bound


def released(
    arrays: dict[str, np.ndarray], dtype: torch.dtype, **options: Any
) -> tuple[LbA, dict[str, str]]:
    """A network with the golden file's start, and our name of every golden one."""
    stem = arrays["init/visible_module.visible.conv1.weight"]
    trunk = [arrays[f"init/base_resnet.base.layer{i}.0.weight"] for i in (1, 2, 3, 4)]
    widths = (len(stem), *(len(weight) for weight in trunk))
    chosen = LbAOptions(margin=float(arrays["margin"]), dt_weight=float(arrays["lw_dt"]), **options)
    num_ids = len(arrays["init/classifier.weight"])
    network = LbA(num_ids, chosen, backbone=Miniature(widths)).to(dtype)
    state = network.state_dict()
    names = {theirs: ours for theirs, ours in official_names(state).items() if ours is not None}
    given = {name[5:] for name in arrays if name.startswith("init/")}
    assert given == {name for name in names if not name.endswith("num_batches_tracked")}
    for name in given:
        state[names[name]].copy_(torch.from_numpy(arrays[f"init/{name}"]))
    return network, names


def golden_batch(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> Batch:
    images = torch.from_numpy(np.concatenate((arrays["x_v"], arrays["x_t"]))).to(dtype)
    modality = torch.arange(len(images)) // len(arrays["x_v"])
    labels = torch.from_numpy(arrays["labels"])
    return Batch(images, labels, modality, modality, int(arrays["num_pos"]))


def golden_pairs(arrays: dict[str, np.ndarray], steps: int) -> Iterator[Pairs]:
    for step in range(steps):
        for layer in (3, 4):
            found = (arrays[f"step{step}/layer{layer}/{kind}_idx"] for kind in ("pos", "neg"))
            yield Pairs(*map(torch.from_numpy, found))


def run_golden(variant: str, dtype: torch.dtype, *, paired: bool = True, **options: Any) -> None:
    arrays = golden("lba/e2e_tiny")
    network, names = released(arrays, dtype, weighting=WEIGHTINGS[variant], **options)
    batch = golden_batch(arrays, dtype)
    if not paired:
        batch = batch._replace(paired=0)
    drawn = golden_pairs(arrays, 2)
    network.draw = lambda arrangement: next(drawn)  # type: ignore[method-assign]
    recipe = methods.recipe("lba", "sysu")
    optimizer = build_optimizer(phase_parameters(network, "main"), recipe.optim)
    set_lr(optimizer, 0.01)
    for step in range(2):
        losses = network.training_step(batch)
        for name, term in TERMS.items():
            close(losses.terms[term], arrays[f"{variant}/step{step}/{name}"], dtype)
        close(losses.total, arrays[f"{variant}/step{step}/total"], dtype)
        optimizer.zero_grad()
        losses.total.backward()
        if step == 0:
            prefix = f"{variant}/step0/grad/"
            graded = [name[len(prefix) :] for name in arrays if name.startswith(prefix)]
            assert {names[n] for n in graded} == {
                n for n, p in network.named_parameters() if p.requires_grad
            }
            for name in graded:
                gradient = network.get_parameter(names[name]).grad
                close(gradient, arrays[prefix + name], dtype, gradient=True)
        optimizer.step()
        network.after_step()
    assert next(drawn, None) is None
    if variant == "paper":  # the file ends here
        return
    state = network.state_dict()
    finals = [name[15:] for name in arrays if name.startswith("official/final/")]
    assert len(finals) == len(names) - 7  # all but the batch counters
    for name in finals:
        close(state[names[name]], arrays[f"official/final/{name}"], dtype)
    counts = {n: int(v) for n, v in state.items() if n.endswith("num_batches_tracked")}
    assert counts.pop("bottleneck.num_batches_tracked") == 6
    assert counts.pop("backbone.layer4.1.num_batches_tracked") == 4
    assert set(counts.values()) == {2}
    features = network.embed(batch.images, batch.modality)
    expected = np.concatenate([arrays[f"official/final_eval/feat_{m}"] for m in "vt"])
    close(features, expected, dtype)


@pytest.mark.parametrize(("variant", "dtype", "room"), CASES, ids=str)
def test_two_training_steps(variant: str, dtype: torch.dtype, room: str) -> None:
    with backend(room):
        run_golden(variant, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_promise_give_the_same(dtype: torch.dtype) -> None:
    run_golden("official", dtype, paired=False)


def test_logits_of_the_first_step() -> None:
    arrays = golden("lba/e2e_tiny")
    network, _ = released(arrays, torch.float64, weighting="batch")
    drawn = golden_pairs(arrays, 1)
    network.draw = lambda arrangement: next(drawn)  # type: ignore[method-assign]
    seen: list[Tensor] = []
    network.classifier.register_forward_hook(lambda module, args, out: seen.append(out))
    pooled: list[Tensor] = []
    network.bottleneck.register_forward_hook(lambda module, args, out: pooled.append(args[0]))
    network.training_step(golden_batch(arrays, torch.float64))
    for found, name in zip(seen, ("cls_ic_layer3", "cls_ic_layer4", "cls_id"), strict=True):
        close(found, arrays[f"official/step0/{name}"], torch.float64)
    close(pooled[2], arrays["official/step0/feat4_p"], torch.float64)


def test_rates_of_every_epoch() -> None:
    arrays = golden("lba/sampler_schedule")
    recipe = methods.recipe("lba", "sysu")
    epochs = range(1, recipe.schedule.epochs + 1)
    assert len(epochs) == len(arrays["lr_head"])
    rates = np.array([lr_at(epoch, recipe.optim, recipe.schedule) for epoch in epochs])
    np.testing.assert_allclose(rates, arrays["lr_head"], rtol=1e-12)
    scaled = rates * recipe.optim.backbone_lr_scale
    np.testing.assert_allclose(scaled, arrays["lr_base"], rtol=1e-12)


def test_groups_of_the_optimiser() -> None:
    network, _ = released(golden("lba/e2e_tiny"), torch.float32)
    recipe = methods.recipe("lba", "sysu")
    trunk, head = build_optimizer(phase_parameters(network, "main"), recipe.optim).param_groups
    assert {id(p) for p in head["params"]} == {
        id(network.bottleneck.weight),
        id(network.classifier.weight),
    }
    assert {id(p) for p in trunk["params"]} == {id(p) for p in network.backbone.parameters()}
    assert (trunk["lr"], head["lr"]) == (pytest.approx(0.01), 0.1)
    for group in (trunk, head):
        assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (5e-4, 0.9, True)


def test_pairs_of_the_official_draws() -> None:
    arrays = golden("lba/sampler_schedule")
    arrangement = Arrangement(int(arrays["ids_per_batch"]), int(arrays["num_pos"]))
    state = random.getstate()
    try:
        for i, seed in enumerate(arrays["pair_python_seeds"].tolist()):
            random.seed(seed)
            pairs = draw_pairs(arrangement, rng="python")
            assert pairs.positive.tolist() == arrays["pair_pos"][i].tolist()
            assert pairs.negative.tolist() == arrays["pair_neg"][i].tolist()
    finally:
        random.setstate(state)
