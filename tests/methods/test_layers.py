"""Layers: golden vectors through the modules, parameter names, starts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastreid_vi.layers import (
    BNNeck,
    CMAlign,
    DistributionAdapter,
    GeM,
    InstanceNormAct,
    ModalityAlleviation,
    PatternPool,
)
from tests.conftest import golden

DTYPES = [torch.float64, torch.float32]


def close(actual: Tensor, expected: np.ndarray, dtype: torch.dtype, *, gradient: bool) -> None:
    """README tolerances: 1e-9 in float64; in float32 1e-5, gradients 1e-4 of the largest."""
    want = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    error = (actual.detach().double() - want).abs()
    if dtype == torch.float64:
        assert bool((error <= 1e-9 * want.abs().clamp(min=float(want.abs().max()))).all())
    elif gradient:
        assert float(error.max()) <= 1e-4 * float(want.abs().max())
    else:
        torch.testing.assert_close(actual.detach().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["a", "b"])
def test_modality_alleviation_golden(case: str, dtype: torch.dtype) -> None:
    arrays = {k[2:]: v for k, v in golden("mpanet/mam").items() if k.startswith(f"{case}/")}
    layer = ModalityAlleviation(arrays["x"].shape[1], int(arrays["ratio"])).to(dtype)
    names = {"channel_attention.0.weight": "w1", "channel_attention.2.weight": "w2"}
    layer.load_state_dict({key: torch.from_numpy(arrays[w]) for key, w in names.items()})
    x = torch.from_numpy(arrays["x"]).to(dtype).requires_grad_()
    y = layer(x)
    (y * torch.from_numpy(arrays["cot"]).to(dtype)).sum().backward()
    close(y, arrays["y"], dtype, gradient=False)
    close(x.grad, arrays["grad_x"], dtype, gradient=True)
    for key, w in names.items():
        close(layer.get_parameter(key).grad, arrays[f"grad_{w}"], dtype, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pattern_pool_golden(dtype: torch.dtype) -> None:
    arrays = golden("mpanet/pattern_attention")
    parts, channels = arrays["w"].shape[:2]
    layer = PatternPool(channels, parts).to(dtype)
    layer.load_state_dict({k: torch.from_numpy(arrays[k[0]]) for k in ("weight", "bias")})
    x = torch.from_numpy(arrays["x"]).to(dtype).requires_grad_()
    pooled, maps = layer(x)
    features = torch.cat((pooled.flatten(1), x.mean(dim=(2, 3))), dim=1)
    (features * torch.from_numpy(arrays["cot"]).to(dtype)).sum().backward()
    close(maps, arrays["masks"], dtype, gradient=False)
    close(features, arrays["feats"], dtype, gradient=False)
    close(x.grad, arrays["feats_grad_x"], dtype, gradient=True)
    close(layer.weight.grad, arrays["feats_grad_w"], dtype, gradient=True)
    close(layer.bias.grad, arrays["feats_grad_b"], dtype, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["a", "b"])
def test_instance_norm_golden(case: str, dtype: torch.dtype) -> None:
    """Two training steps move the buffers, evaluation uses them; names are InstanceNorm2d's."""
    arrays = {
        k.removeprefix(f"{case}__"): torch.from_numpy(np.asarray(v)).to(dtype)
        for k, v in golden("aligngan/instance_norm").items()
        if k.startswith(f"{case}__")
    }
    layer = InstanceNormAct(arrays["w"].shape[0], activation="none").to(dtype)
    names = {"weight": "w", "bias": "bias", "running_mean": "rm0", "running_var": "rv0"}
    state = {key: arrays[name] for key, name in names.items()}
    layer.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)})
    close(layer(arrays["x1"]), arrays["train_y1"].numpy(), torch.float32, gradient=False)
    layer(arrays["x2"])
    close(layer.running_mean, arrays["rm2"].numpy(), torch.float32, gradient=False)
    close(layer.running_var, arrays["rv2"].numpy(), torch.float32, gradient=False)
    assert int(layer.num_batches_tracked) == 0
    x = arrays["x1"].requires_grad_()
    layer.eval()
    y = layer(x)
    y.backward(arrays["gout"])
    close(y, arrays["eval_y1"].numpy(), torch.float32, gradient=False)
    close(x.grad, arrays["eval_gx1"].numpy(), torch.float32, gradient=True)
    close(layer.weight.grad, arrays["eval_gw"].numpy(), torch.float32, gradient=True)
    close(layer.bias.grad, arrays["eval_gb"].numpy(), torch.float32, gradient=True)


def test_instance_norm_equals_the_sequence_of_pytorch() -> None:
    torch.manual_seed(0)
    plain, ours = nn.InstanceNorm2d(4, affine=True, track_running_stats=True), InstanceNormAct(4)
    assert list(ours.state_dict()) == list(plain.state_dict())
    x, skip = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(ours(x, skip), plain(x).relu() + skip)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x).relu())
    bare = InstanceNormAct(4, activation="leaky_relu", affine=False, track_running_stats=False)
    want = nn.functional.leaky_relu(nn.functional.instance_norm(x), 0.2)
    torch.testing.assert_close(bare(x), want)
    assert not bare.state_dict()


MDA_NAMES = {
    "sc_conv.weight": "sc_w",
    "sc_conv.bias": "sc_b",
    "ca_conv.weight": "ca_w",
    "ca_bn.weight": "ca_bn_w",
    "ca_bn.bias": "ca_bn_b",
    "norm_bn.weight": "norm_w",
    "norm_bn.bias": "norm_b",
}
MDA_BUFFERS = {
    "ca_bn.running_mean": "ca_rm",
    "ca_bn.running_var": "ca_rv",
    "norm_bn.running_mean": "norm_rm",
    "norm_bn.running_var": "norm_rv",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["a", "b", "eval"])
def test_distribution_adapter_golden(case: str, dtype: torch.dtype) -> None:
    """Outputs, gradients under the official names, and running statistics."""
    arrays = {
        k.removeprefix(f"{case}__"): torch.from_numpy(np.asarray(v))
        for k, v in golden("mcja/mda").items()
        if k.startswith(f"{case}__")
    }
    maps, channels = arrays["sc_w"].shape[:2]
    layer = DistributionAdapter(channels, maps).to(dtype).train(bool(arrays["train"]))
    state = {key: arrays[name] for key, name in MDA_NAMES.items()}
    state |= {key: arrays[f"{name}_in"] for key, name in MDA_BUFFERS.items()}
    layer.load_state_dict(state, strict=False)
    x = arrays["x"].to(dtype).requires_grad_()
    y = layer(x)
    y.backward(arrays["gout"].to(dtype))
    close(y, arrays["y64"].numpy(), dtype, gradient=False)
    close(x.grad, arrays["gx64"].numpy(), dtype, gradient=True)
    for key, name in MDA_NAMES.items():
        grad = layer.get_parameter(key).grad
        if name == "sc_b":
            assert not grad.any()
        else:
            close(grad, arrays[f"g_{name}"].numpy(), torch.float32, gradient=True)
    for key, name in MDA_BUFFERS.items():
        want = arrays[f"{name}_out"].numpy()
        close(layer.get_buffer(key), want, torch.float32, gradient=False)
    tracked = int(bool(arrays["train"]))
    assert [int(n.num_batches_tracked) for n in (layer.ca_bn, layer.norm_bn)] == [tracked] * 2


@pytest.mark.parametrize(("dataset", "maps"), [("sysu", 2), ("regdb", 12)])
def test_distribution_adapter_has_the_official_layout(dataset: str, maps: int) -> None:
    layout = golden("mcja/state_dict_layout")
    rows = zip(*(layout[f"{dataset}__{k}"].tolist() for k in ("names", "shapes")), strict=True)
    official = {k.removeprefix("MDA_2.0."): s for k, s in rows if k.startswith("MDA_2.0.")}
    layer = DistributionAdapter(512, maps)
    ours = {k: "x".join(map(str, v.shape)) for k, v in layer.state_dict().items()}
    assert ours == official
    assert list(ours) == list(official)
    x = torch.randn(2, 512, 3, 2)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gem_is_the_formula(dtype: torch.dtype) -> None:
    x = torch.rand(3, 4, 5, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    expected = ((x**3).mean(dim=(2, 3)) + 1e-12) ** (1 / 3)
    torch.testing.assert_close(GeM()(x), expected)
    torch.testing.assert_close(GeM(1.0)(x), x.mean(dim=(2, 3)))


def test_modality_alleviation_starts_kaiming() -> None:
    torch.manual_seed(0)
    weights = dict(ModalityAlleviation(2048).named_parameters())
    assert {k: tuple(v.shape) for k, v in weights.items()} == {
        "channel_attention.0.weight": (128, 2048, 1, 1),
        "channel_attention.2.weight": (2048, 128, 1, 1),
    }
    reduce_std = float(weights["channel_attention.0.weight"].detach().std())
    expand_std = float(weights["channel_attention.2.weight"].detach().std())
    assert reduce_std == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    assert expand_std == pytest.approx(math.sqrt(2 / 2048), rel=0.02)


def test_pattern_pool_starts_uniform() -> None:
    torch.manual_seed(0)
    layer = PatternPool(2048, 6)
    bound = 1 / math.sqrt(2048)
    assert float(layer.weight.detach().abs().max()) <= bound
    assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(layer.bias, torch.zeros(6))
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "weight": (6, 2048, 1, 1),
        "bias": (6,),
    }


def test_neck_bias_is_frozen_at_zero() -> None:
    neck = BNNeck(8)
    neck(torch.randn(4, 8)).square().sum().backward()
    assert neck.weight.grad is not None
    assert neck.bias.grad is None
    assert torch.equal(neck.bias, torch.zeros(8))
    assert torch.equal(neck.weight, torch.ones(8))
    torch.manual_seed(0)
    spread = BNNeck(4096, weight_std=0.01).weight
    assert float(spread.detach().mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(spread.detach().std()) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(("weighting", "key"), [("sample", "paper"), ("batch", "official")])
def test_alignment_equals_the_published_block(weighting: Any, key: str) -> None:
    v = golden("lba/cmalign_loss_c_signed")
    x = torch.from_numpy(v["feat"]).double().requires_grad_()
    layer = CMAlign(float(v["temperature"]), float(v["margin"]), weighting)
    assert f"weighting='{weighting}'" in repr(layer)
    result = layer(x, torch.from_numpy(v["pos_idx"]), torch.from_numpy(v["neg_idx"]))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(float(v[f"loss_{key}"]), rel=1e-9)
    torch.testing.assert_close(result.aligned.detach(), torch.from_numpy(v["recon_pos"]))
    want = torch.from_numpy(v[f"grad_feat_loss_{key}"])
    torch.testing.assert_close(x.grad, want, rtol=1e-6, atol=1e-12)


def test_bad_layer_arguments() -> None:
    with pytest.raises(ValueError, match=r"ratio: expected 1 to channels \(8\), got 16"):
        ModalityAlleviation(8)
    with pytest.raises(ValueError, match="weight_std: expected >= 0, got -1"):
        BNNeck(4, weight_std=-1)
