"""Official checkpoints of MPANet and of AGW's base network, in and out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastreid_vi import methods
from fastreid_vi.methods.base import OfficialKeyError
from fastreid_vi.methods.baseline import official as baseline
from fastreid_vi.methods.mpanet import official as mpanet
from tests.methods.mpanet_cases import images_batch
from tests.methods.test_backbone import torchvision_shapes
from tests.methods.test_mpanet import official_shapes

Shapes = dict[str, tuple[int, ...]]


def empty(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def agw_shapes(num_ids: int = 395) -> Shapes:
    """AGW's base network: three whole ResNet-50s, from the table of the LbA specification."""
    shapes: Shapes = {}
    for prefix in ("visible_module.visible", "thermal_module.thermal", "base_resnet.base"):
        shapes.update({f"{prefix}.{k}": v for k, v in torchvision_shapes(50).items()})
    for entry in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"bottleneck.{entry}"] = (2048,)
    shapes["bottleneck.num_batches_tracked"] = ()
    shapes["classifier.weight"] = (num_ids, 2048)
    return shapes


def build(**options: Any) -> methods.Method:
    torch.manual_seed(0)
    return methods.create("baseline", 4, depth=18, weights="none", **options)


# MPANet.


def test_mpanet_layout() -> None:
    shapes = official_shapes()
    ours, unused = mpanet.from_official(empty(shapes))
    assert unused == []
    with torch.device("meta"):
        network = methods.create("mpanet", 395, weights="none")
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in ours.items()} == wanted == shapes
    assert list(mpanet.to_official(ours)) == list(network.state_dict())


@pytest.mark.parametrize(
    "options", [{"parts": 3}, {"modality_attention": 1}, {"depth": 34}], ids=str
)
def test_mpanet_round_trip(options: dict[str, Any]) -> None:
    state = methods.create("mpanet", 4, **{"depth": 18, "weights": "none", **options}).state_dict()
    back, unused = mpanet.from_official(mpanet.to_official(state))
    assert unused == []
    assert list(back) == list(state)
    assert all(back[name] is state[name] for name in state)


def test_mpanet_names_what_does_not_fit() -> None:
    state = empty(official_shapes())
    absent = {k: v for k, v in state.items() if k != "visible_classifier_.weight"}
    with pytest.raises(OfficialKeyError, match=r"MPANet checkpoint: missing 'visible_classifier_"):
        mpanet.from_official(absent)
    with pytest.raises(OfficialKeyError, match=r"unknown 'backbone\.fc\.bias'"):
        mpanet.from_official({**state, "backbone.fc.bias": torch.empty(1000)})
    with pytest.raises(ValueError, match=r"bn_neck\.bias: expected shape \[14336\], got \[\]"):
        mpanet.from_official({**state, "bn_neck.bias": torch.tensor(0.0)})
    with pytest.raises(OfficialKeyError, match="more"):
        mpanet.from_official({})


# The baseline.


def test_baseline_layout() -> None:
    official = empty(agw_shapes())
    assert len(official) == 960
    ours, unused = baseline.from_official(official)
    with torch.device("meta"):
        network = methods.create("baseline", 395, weights="none")
    assert {n: t.shape for n, t in ours.items()} == {
        n: t.shape for n, t in network.state_dict().items()
    }
    assert len(unused) == 960 - len(ours)
    assert not [n for n in unused if not n.startswith(
        ("visible_module.visible.layer", "thermal_module.thermal.layer",
         "base_resnet.base.conv1.", "base_resnet.base.bn1."))]  # fmt: skip
    back = baseline.to_official(ours)
    assert list(back) == list(official)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in official.items()}
    only_used = {n: t for n, t in official.items() if n not in set(unused)}
    assert baseline.from_official(only_used) == (ours, [])


@pytest.mark.parametrize("with_base", [False, True])
def test_baseline_round_trip(with_base: bool) -> None:
    network, batch = build(), images_batch()
    state = network.state_dict()
    base = None
    if with_base:
        filler = {n: torch.rand(s) for n, s in torchvision_shapes(18).items() if "tracked" not in n}
        base = {**filler, "fc.weight": torch.rand(3)}
    official = baseline.to_official(state, base)
    ours, unused = baseline.from_official(official)
    source = (
        state["backbone.layer1.0.conv1.weight"] if base is None else base["layer1.0.conv1.weight"]
    )
    assert official["visible_module.visible.layer1.0.conv1.weight"] is source
    assert "visible_module.visible.layer1.0.conv1.weight" in unused
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(ours)
    one, two = (n.embed(batch.images, batch.modality) for n in (network, other))
    assert torch.equal(one, two)


def test_baseline_names_what_does_not_fit() -> None:
    official = empty(agw_shapes())
    non_local = {**official, "NL_2.0.g.weight": torch.empty(1), "NL_2.0.g.bias": torch.empty(1)}
    with pytest.raises(
        OfficialKeyError, match="non-local blocks, which the baseline does not have"
    ):
        baseline.from_official(non_local)
    with pytest.raises(OfficialKeyError, match=r"AGW checkpoint: unknown 'gem\.p'$"):
        baseline.from_official({**official, "gem.p": torch.ones(1)})
    absent = {k: v for k, v in official.items() if k != "thermal_module.thermal.conv1.weight"}
    with pytest.raises(
        OfficialKeyError, match=r"missing 'thermal_module\.thermal\.conv1\.weight'$"
    ):
        baseline.from_official(absent)
    with pytest.raises(ValueError, match=r"bottleneck\.bias: expected shape \[2048\], got \[5\]"):
        baseline.from_official({**official, "bottleneck.bias": torch.empty(5)})
    shared = build(stems="shared").state_dict()
    with pytest.raises(OfficialKeyError, match=r"missing 'visible_module\.visible\.conv1\.weight'"):
        baseline.to_official(shared)
    with pytest.raises(OfficialKeyError, match=r"base: missing 'visible_module\.visible\.layer1"):
        baseline.to_official(build().state_dict(), {"layer1.weight": torch.empty(1)})
