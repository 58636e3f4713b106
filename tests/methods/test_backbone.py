"""ResNets: torchvision's names and arithmetic, two stems, pretrained weights."""

from __future__ import annotations

import copy
import math
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fastreid_vi.backbone import IMAGENET_URLS, TwoStreamResNet, WeightsError

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
PARAMETERS = {18: 11_176_512, 34: 21_284_672, 50: 23_508_032}  # torchvision's, without fc


def torchvision_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's ResNet without fc, written down from its definition."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, inputs: int, size: int) -> None:
        shapes[f"{name}.weight"] = (out, inputs, size, size)

    def norm(name: str, channels: int) -> None:
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{entry}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    inputs = 64
    for stage, count in enumerate(BLOCKS[depth], start=1):
        planes = 32 * 2**stage
        sizes = [(planes, 1), (planes, 3), (4 * planes, 1)] if depth == 50 else [(planes, 3)] * 2
        for j in range(count):
            prefix, width = f"layer{stage}.{j}", inputs
            for k, (out, size) in enumerate(sizes, start=1):
                conv(f"{prefix}.conv{k}", out, width, size)
                norm(f"{prefix}.bn{k}", out)
                width = out
            if j == 0 and (stage > 1 or depth == 50):
                conv(f"{prefix}.downsample.0", width, inputs, 1)
                norm(f"{prefix}.downsample.1", width)
            inputs = width
    return shapes


def plain_forward(state: dict[str, Tensor], images: Tensor, depth: int, last_stride: int) -> Tensor:
    """ResNet in evaluation mode from a state dict, by functional calls only."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.max_pool2d(F.relu(norm(conv(images, "conv1", 2), "bn1")), 3, 2, 1)
    for stage, count in enumerate(BLOCKS[depth], start=1):
        for j in range(count):
            stride = 1 if j or stage == 1 else last_stride if stage == 4 else 2
            prefix, shortcut = f"layer{stage}.{j}", x
            if f"{prefix}.downsample.0.weight" in state:
                shortcut = norm(conv(x, f"{prefix}.downsample.0", stride), f"{prefix}.downsample.1")
            strides = (1, stride, 1) if depth == 50 else (stride, 1)
            for k, s in enumerate(strides, start=1):
                x = norm(conv(x, f"{prefix}.conv{k}", s), f"{prefix}.bn{k}")
                x = F.relu(x if k < len(strides) else x + shortcut)
    return x


def shaken(network: TwoStreamResNet) -> TwoStreamResNet:
    """Batch norms with statistics and affine values that matter."""
    generator = torch.Generator().manual_seed(3)
    for name, value in network.state_dict().items():
        if name.endswith(("running_var", "running_mean", "bias")) or value.dim() == 1:
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.5)
    return network.eval()


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_names_and_shapes_are_torchvisions(depth: int) -> None:
    with torch.device("meta"):
        network = TwoStreamResNet(depth)
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert state == torchvision_shapes(depth)
    assert len(state) == {18: 120, 34: 216, 50: 318}[depth]
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[depth]


@pytest.mark.parametrize("last_stride", [1, 2])
@pytest.mark.parametrize("depth", [18, 50])
def test_forward_equals_functional_calls(depth: int, last_stride: int) -> None:
    torch.manual_seed(0)
    network = shaken(TwoStreamResNet(depth, last_stride=last_stride).double())
    images = torch.randn(2, 3, 49, 33, dtype=torch.float64)
    with torch.no_grad():
        features = network(images)
        expected = plain_forward(network.state_dict(), images, depth, last_stride)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)
    assert features.shape[1] == network.out_channels == {18: 512, 50: 2048}[depth]
    assert features.shape[2:] == ((4, 3) if last_stride == 1 else (2, 2))


def test_start_is_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    state = TwoStreamResNet(50).state_dict()
    for name, fan_out in (("layer3.1.conv2", 256 * 9), ("layer4.0.downsample.0", 2048)):
        std = float(state[f"{name}.weight"].std())
        assert std == pytest.approx(math.sqrt(2 / fan_out), rel=0.02)
    assert torch.equal(state["layer2.0.bn3.weight"], torch.ones(512))
    assert torch.equal(state["layer2.0.bn3.bias"], torch.zeros(512))


def test_separate_stems_see_their_own_rows() -> None:
    torch.manual_seed(0)
    network = shaken(TwoStreamResNet(18, stems="separate"))
    images = torch.randn(5, 3, 32, 16)
    modality = torch.tensor([1, 0, 0, 1, 0])
    with torch.no_grad():
        mixed = network(images, modality)
        for value in (0, 1):
            rows = modality == value
            alone = network(images[rows], modality[rows])
            torch.testing.assert_close(mixed[rows], alone, rtol=1e-4, atol=1e-4)
        swapped = network(images, 1 - modality)
    assert not torch.allclose(mixed, swapped, rtol=1e-2)


def test_stem_statistics_do_not_mix() -> None:
    torch.manual_seed(0)
    network = TwoStreamResNet(18, stems="separate").train()
    images, modality = torch.randn(6, 3, 32, 32), torch.tensor([1, 0, 1, 1, 0, 1])
    network(images, modality).sum().backward()
    for name, value in (("visible_stem", 0), ("infrared_stem", 1)):
        stem = network.get_submodule(name)
        mean = stem.conv1(images[modality == value]).mean(dim=(0, 2, 3))
        torch.testing.assert_close(stem.bn1.running_mean, 0.1 * mean.detach(), rtol=1e-4, atol=1e-6)
        assert stem.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("visible", [0, 2, 5])
def test_a_promised_number_of_visible_rows_spares_the_question(visible: int) -> None:
    torch.manual_seed(0)
    network = TwoStreamResNet(18, stems="separate").train()
    twin = copy.deepcopy(network)
    images = torch.randn(5, 3, 32, 32)
    modality = (torch.arange(5) >= visible).long()
    torch.testing.assert_close(network(images, None, visible), twin(images, modality))
    for name, value in network.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    with pytest.raises(ValueError, match="visible: expected 0 to 5, got 6"):
        network(images, modality, 6)


def test_gradient_reaches_the_right_stem_only() -> None:
    network = TwoStreamResNet(18, stems="separate")
    images, modality = torch.randn(3, 3, 32, 32), torch.zeros(3, dtype=torch.int64)
    network(images, modality).sum().backward()
    assert network.visible_stem.conv1.weight.grad is not None
    assert network.infrared_stem.conv1.weight.grad is None


@pytest.mark.parametrize(
    ("modality", "message"),
    [
        (None, "modality: expected [2] with separate stems, got None"),
        (torch.zeros(3, dtype=torch.int64), "modality: expected [2] with separate stems, got [3]"),
        (torch.tensor([0, 2]), "modality: expected 0 or 1"),
        (torch.tensor([-1, 1]), "modality: expected 0 or 1"),
    ],
)
def test_bad_modality(modality: Tensor | None, message: str) -> None:
    network = TwoStreamResNet(18, stems="separate")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        network(torch.zeros(2, 3, 32, 32), modality)
    assert message in str(caught.value)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="depth: expected 18, 34 or 50, got 101"):
        TwoStreamResNet(101)
    with pytest.raises(ValueError, match="last_stride: expected 1 or 2, got 3"):
        TwoStreamResNet(18, last_stride=3)
    with pytest.raises(ValueError, match="stems: expected 'shared' or 'separate'"):
        TwoStreamResNet(18, stems="both")
    network = TwoStreamResNet(18)
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\], got \[2, 1, 8, 8\]"):
        network(torch.zeros(2, 1, 8, 8))
    with pytest.raises(TypeError, match=r"images: expected a floating tensor, got torch.uint8"):
        network(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


# Pretrained weights.


@pytest.fixture(scope="module")
def imagenet() -> dict[str, Tensor]:
    """A state dict as torchvision's file of 2017 has it: with fc, without batch counters."""
    generator = torch.Generator().manual_seed(7)
    state = {
        name: torch.rand(shape, generator=generator)
        for name, shape in torchvision_shapes(18).items()
        if not name.endswith("num_batches_tracked")
    }
    return {**state, "fc.weight": torch.rand(1000, 512), "fc.bias": torch.rand(1000)}


@pytest.mark.parametrize("stems", ["shared", "separate"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_file(imagenet: dict[str, Tensor], tmp_path: Path, stems: str, suffix: str) -> None:
    path = tmp_path / f"resnet18{suffix}"
    torch.save(imagenet, path) if suffix == ".pth" else save_file(imagenet, path)
    network = TwoStreamResNet(18, stems=stems)
    network.load_weights(str(path))
    loaded = network.state_dict()
    prefixes = [""] if stems == "shared" else ["visible_stem.", "infrared_stem."]
    for name, value in imagenet.items():
        if name.startswith(("conv1", "bn1")):
            for prefix in prefixes:
                assert torch.equal(loaded[prefix + name], value)
        elif not name.startswith("fc."):
            assert torch.equal(loaded[name], value)


def test_hub_folder_needs_no_network(
    imagenet: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(imagenet, folder / IMAGENET_URLS[18].rsplit("/", 1)[1])
    network = TwoStreamResNet(18)
    network.load_weights("imagenet")
    assert torch.equal(network.conv1.weight, imagenet["conv1.weight"])


def test_no_network_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(WeightsError) as caught:
        TwoStreamResNet(50).load_weights("imagenet")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("resnet50-19c8e357.pth", "Name or service not known", "'none'", str(tmp_path)):
        assert part in message


def test_none_keeps_the_start() -> None:
    network = TwoStreamResNet(18)
    before = network.conv1.weight.detach().clone()
    network.load_weights("none")
    assert torch.equal(network.conv1.weight, before)


def test_foreign_weights_are_named_and_change_nothing(imagenet: dict[str, Tensor]) -> None:
    network = TwoStreamResNet(18)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fewer = {k: v for k, v in imagenet.items() if k != "layer2.0.bn1.bias"}
    with pytest.raises(WeightsError, match=r"missing layer2\.0\.bn1\.bias"):
        network.load_torchvision(fewer)
    with pytest.raises(WeightsError, match=r"unexpected attention\.weight"):
        network.load_torchvision({**imagenet, "attention.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"conv1.weight: expected shape \[64, 3, 7, 7\], got"):
        network.load_torchvision({**imagenet, "conv1.weight": torch.zeros(64, 1, 7, 7)})
    with pytest.raises(WeightsError, match="not torchvision's ResNet-34, missing"):
        TwoStreamResNet(34).load_torchvision(imagenet)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_unreadable_files(tmp_path: Path) -> None:
    network = TwoStreamResNet(18)
    with pytest.raises(WeightsError, match=r"no file 'nowhere\.pth'"):
        network.load_weights("nowhere.pth")
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(b"not weights at all")
        with pytest.raises(WeightsError, match="cannot read") as caught:
            network.load_weights(str(path))
        assert "\n" not in str(caught.value)
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "wrapped.pth")
    with pytest.raises(WeightsError, match="not a bare state dict"):
        network.load_weights(str(tmp_path / "wrapped.pth"))
