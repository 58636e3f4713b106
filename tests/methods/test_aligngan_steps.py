"""AlignGAN against one iteration of every stage of the released code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from fastreid_vi.certify.method_aligngan import NETWORKS, golden_batch, released
from fastreid_vi.methods import recipe
from fastreid_vi.methods.aligngan import AlignGAN, losses
from fastreid_vi.methods.base import Losses
from tests.conftest import golden
from tests.methods.aligngan_cases import JOINT, WARMUP, backward, build
from tests.methods.aligngan_golden import case, check_gradients, close


class Calls:
    """Records the values of a criterion in the order of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, list[float]] = {}
        for name in ("adversarial", "distance", "identity", "batch_hard"):
            monkeypatch.setattr(losses, name, self._recording(name, getattr(losses, name)))

    def _recording(self, name: str, function: Any) -> Any:
        def record(*args: Any, **options: Any) -> Tensor:
            value: Tensor = function(*args, **options)
            self.found.setdefault(name, []).append(float(value.detach()))
            return value

        return record

    def check(self, v: dict[str, np.ndarray]) -> None:
        names = {"mse": "adversarial", "cls": "identity", "tri": "batch_hard"}
        for theirs, ours in names.items():
            assert self.found[ours] == pytest.approx(list(v[f"calls_{theirs}"]), rel=1e-6)
        if "calls_cycle" in v:  # ours: cycle and mapping of one direction, then of the other
            ir, rgb_again, rgb, ir_again = self.found["distance"]
            assert [rgb, ir] == pytest.approx(list(v["calls_cycle"]), rel=1e-6)
            assert [rgb_again, ir_again] == pytest.approx(list(v["calls_identity"]), rel=1e-6)


def gradients_of(v: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Fields of one network, under our parameter names."""
    found = {}
    for field, array in v.items():
        kind, _, rest = field.partition("__")
        owner, _, parameter = rest.partition("__")
        if owner == name and kind.startswith("g"):
            renamed = f"conv.{parameter[2:]}" if name == "encoder" else parameter
            found[f"{kind}__{renamed}"] = array
    return found


def check_networks(network: AlignGAN, v: dict[str, np.ndarray], names: Iterable[str]) -> None:
    """Sums over whole planes cancel: up to 6e-6 remain of the released code's rounding."""
    for name in names:
        fields = gradients_of(v, name)
        assert check_gradients(network.get_submodule(NETWORKS[name][0]), fields, 1e-5) > 2, name


def test_feature_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    v = golden("aligngan/steps")
    network, batch, calls = released(v), golden_batch(v), Calls(monkeypatch)
    stage = case(v, "warm_feature")
    found = backward(network, batch._replace(paired=0), "feature_warmup")
    for theirs, ours in (("cls", "identity"), ("tri", "batch_hard")):
        assert calls.found[ours] == pytest.approx(list(stage[f"calls_{theirs}"]), rel=1e-6)
    assert 100 * float(found.terms["accuracy"]) == pytest.approx(float(stage["returned"][0]))
    check_networks(network, stage, ("encoder", "embeder"))
    build(recipe("aligngan", "sysu").optim, network, "feature_warmup").step()
    bias = network.get_parameter("backbone.conv.bias")[:32]
    close(bias, stage["encoder_bias_after_sgd_first32"], 1e-6)


@pytest.mark.parametrize("which", ["warm_pixel", "joint_pixel", "joint_pixel_rolled_ir_pids"])
def test_pixel_iteration(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    v = golden("aligngan/steps")
    rolled = "pids_rolled" if which.endswith("pids") else "pids"
    network, batch, calls = released(v), golden_batch(v, infrared_pids=rolled), Calls(monkeypatch)
    stage = case(v, which)
    pixel, plain = recipe("aligngan", "sysu").optim_of("generators"), which == "joint_pixel"
    phases = WARMUP if which == "warm_pixel" else JOINT[1:]
    totals, norms = [], {}
    for phase in phases:
        found: Losses = backward(network, batch, phase)
        totals.append(float(found.total.detach()))
        if phase.startswith("generators"):
            terms = found.terms
            if plain:
                norms = {
                    field: network.get_submodule("visible_to_infrared").state_dict()[key].clone()
                    for field, key in buffers(stage)
                }
            if which != "joint_pixel_rolled_ir_pids":
                check_networks(network, stage, ("G_rgb2ir", "G_ir2rgb"))
        elif "rolled" not in which:
            check_networks(network, stage, (phase.capitalize(),))  # "d_rgb" is D_rgb
        build(pixel, network, phase).step()
    calls.check(stage)
    expected = [float(x) for x in stage["returned"]]
    shown = [float(terms[n].detach()) for n in ("gan", "cycle", "mapping")]
    assert shown == pytest.approx(expected[:3], rel=1e-5)
    assert totals[1] + totals[2] == pytest.approx(expected[3], rel=1e-5)
    others = [float(terms[n].detach()) for n in ("triplet", "identity")]
    assert others == pytest.approx(expected[4:], rel=1e-5)
    for field, value in norms.items():
        close(value, stage[field], 1e-6)
    if plain:
        weight = network.get_parameter("visible_to_infrared.model.0.weight")
        close(weight, stage["G_rgb2ir_conv0_after_adam"], 1e-6)


def buffers(stage: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """Fields of G's running statistics, and their keys."""
    fields = [f for f in stage if f.startswith("G_rgb2ir_model") and "running" in f]
    assert len(fields) == 4
    names = [f.removeprefix("G_rgb2ir_").removesuffix("_after") for f in fields]
    return [(f, n.replace("_running", ".running")) for f, n in zip(fields, names, strict=True)]


def test_joint_feature_step(monkeypatch: pytest.MonkeyPatch) -> None:
    v = golden("aligngan/steps")
    network, batch, calls = released(v), golden_batch(v), Calls(monkeypatch)
    stage = case(v, "joint_feature")
    found = backward(network, batch, "feature")
    calls.check(stage)
    check_networks(network, stage, ("encoder", "embeder"))
    fake, real = (100 * float(found.terms[f"accuracy_{n}"]) for n in ("fake", "real"))
    assert [fake, real] == pytest.approx(list(stage["returned"][:2]), rel=1e-5)
