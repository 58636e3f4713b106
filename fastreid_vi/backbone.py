"""ResNet-18, -34 and -50 without classifier: torchvision's parameter names, one or two stems.

A batch may mix visible and infrared images. The trunk (layer1..layer4) is shared by both
modalities; the stem (conv1, bn1, max-pool) is shared or there is one per modality.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor, nn

from fastreid_vi.config import INFRARED, VISIBLE

Depth = Literal[18, 34, 50]
Stems = Literal["shared", "separate"]
LastStride = Literal[1, 2]

BLOCKS: Final = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
PLANES: Final = (64, 128, 256, 512)
IMAGENET_URLS: Final = {
    18: "https://download.pytorch.org/models/resnet18-5c106cde.pth",
    34: "https://download.pytorch.org/models/resnet34-333f7ec4.pth",
    50: "https://download.pytorch.org/models/resnet50-19c8e357.pth",
}
_STEMS: Final = {VISIBLE: "visible_stem", INFRARED: "infrared_stem"}
_UNUSED: Final = frozenset({"fc.weight", "fc.bias"})  # the ImageNet classifier


class WeightsError(ValueError):
    """Pretrained weights that are missing, unreadable or of another network; one line."""


class Trunk(nn.Module):
    """A feature extractor: `trunk(images, modality)` gives the map [B, out_channels, H, W]."""

    out_channels: int


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18, -34)."""

    expansion: Final = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, planes, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out + shortcut)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50); the stride is in the 3x3."""

    expansion: Final = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = _conv(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, 4 planes, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out + shortcut)
        return result


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Projection of the shortcut, where the shape changes."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class Stem(nn.Module):
    """conv1 7x7 stride 2, batch norm, ReLU and 3x3 max-pool of one modality."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, PLANES[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(PLANES[0])

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 64, H / 4, W / 4]."""
        return _stem(images, self.conv1, self.bn1)


def _stem(images: Tensor, conv1: nn.Module, bn1: nn.Module) -> Tensor:
    return nn.functional.max_pool2d(bn1(conv1(images)).relu_(), 3, stride=2, padding=1)


class TwoStreamResNet(Trunk):
    """ResNet without its classifier, for visible and infrared images.

    Args:
        depth: 18, 34 or 50.
        stems: "shared": parameters `conv1`, `bn1` serve both modalities; "separate": `visible_stem`
            and `infrared_stem` each have their own.
        last_stride: stride of layer4 (3x3 convolution and shortcut); re-identification uses 1.
    Raises:
        ValueError: another depth, stem or stride.

    Weights start as torchvision's do (Kaiming normal, fan out); `load_weights` reads ImageNet's. A
    subclass that changes maps inside the trunk overrides `after_layer`, or between the blocks of a
    layer `run_layer`.

    Spec: mpanet 2, lba 2.
    """

    def __init__(
        self, depth: Depth = 50, *, stems: Stems = "shared", last_stride: LastStride = 1
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth: expected 18, 34 or 50, got {depth!r}")
        if stems not in ("shared", "separate"):
            raise ValueError(f"stems: expected 'shared' or 'separate', got {stems!r}")
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride: expected 1 or 2, got {last_stride!r}")
        self.depth, self.stems = depth, stems
        if stems == "shared":
            stem = Stem()
            # Direct attributes, because official checkpoints say `backbone.conv1`.
            self.conv1, self.bn1 = stem.conv1, stem.bn1
        else:
            for name in _STEMS.values():
                self.add_module(name, Stem())
        block = Bottleneck if depth == 50 else BasicBlock
        inputs = PLANES[0]
        for i, (planes, count) in enumerate(zip(PLANES, BLOCKS[depth], strict=True), start=1):
            stride = {1: 1, 4: last_stride}.get(i, 2)
            blocks: list[nn.Module] = []
            for j in range(count):
                blocks.append(block(inputs, planes, stride if j == 0 else 1))
                inputs = planes * block.expansion
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.channels = tuple(planes * block.expansion for planes in PLANES)
        """Channels of the maps after layer1..layer4."""
        self.out_channels = self.channels[-1]
        self._initialise()

    def _initialise(self) -> None:
        """torchvision's start; batch norm's default, weight 1 and bias 0, is already there."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self, images: Tensor, modality: Tensor | None = None, visible: int | None = None
    ) -> Tensor:
        """Feature map of a batch, rows in the order given.

        Args:
            images: [B, 3, H, W], floating, normalised.
            modality: [B] int64, `VISIBLE` or `INFRARED`; needed with separate stems only.
            visible: as for `stem`.
        Returns:
            [B, out_channels, H', W'], H' = H / 16 for `last_stride` 1, H / 32 for 2 (rounded up).
        Raises:
            ValueError: wrong shapes, or a modality that is missing or neither 0 nor 1.
            TypeError: images that are not floating.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images: expected a floating tensor, got {images.dtype}")
        features = self.stem(images, modality, visible)
        for i in range(1, 5):
            features = self.after_layer(i, self.run_layer(i, features))
        return features

    def stem(self, images: Tensor, modality: Tensor | None, visible: int | None = None) -> Tensor:
        """Run each row through the stem of its modality: [B, 64, H / 4, W / 4].

        Args:
            images: [B, 3, H, W].
            modality: [B] int64; needed with separate stems only.
            visible: promise that the first so many rows are visible and the others infrared
                (`Batch.paired`): `modality` is then not read, which would wait for the device.
        """
        if self.stems == "shared":
            return _stem(images, self.conv1, self.bn1)
        if visible is not None:
            return self._stem_halves(images, visible)
        if modality is None or modality.shape != images.shape[:1]:
            got = "None" if modality is None else list(modality.shape)
            raise ValueError(
                f"modality: expected [{images.shape[0]}] with separate stems, got {got}"
            )
        # Each stem's batch norm must see its own rows only, so the rows are sorted by modality; the
        # counts are the one place where the device is waited for.
        counts = [int(n) for n in torch.stack([(modality == m).sum() for m in _STEMS]).tolist()]
        if sum(counts) != images.shape[0]:
            raise ValueError(f"modality: expected {VISIBLE} or {INFRARED}, got other values")
        order = torch.argsort(modality, stable=True)
        halves = torch.split(images[order], counts) if min(counts) else [images] * 2
        parts = [
            self.get_submodule(name)(half)
            for name, half, count in zip(_STEMS.values(), halves, counts, strict=True)
            if count
        ]
        if len(parts) < 2:
            alone: Tensor = parts[0] if parts else self.get_submodule(_STEMS[VISIBLE])(images)
            return alone
        return torch.cat(parts)[torch.argsort(order)]

    def _stem_halves(self, images: Tensor, visible: int) -> Tensor:
        """Rows [visible | infrared], none of them moved."""
        if not 0 <= visible <= images.shape[0]:
            raise ValueError(f"visible: expected 0 to {images.shape[0]}, got {visible}")
        halves = torch.split(images, [visible, images.shape[0] - visible])
        stems = [self.get_submodule(name) for name in _STEMS.values()]
        parts = [stem(half) for stem, half in zip(stems, halves, strict=True) if len(half)]
        return torch.cat(parts) if parts else stems[0](images)

    def run_layer(self, index: int, features: Tensor) -> Tensor:
        """Run layer `index` (1..4), block by block in order."""
        features = self.get_submodule(f"layer{index}")(features)
        return features

    def after_layer(self, index: int, features: Tensor) -> Tensor:
        """Change the map that leaves layer `index` (1..4); the plain trunk passes it on."""
        return features

    def _torchvision_keys(self) -> Iterator[tuple[str, str]]:
        """Own key and torchvision's, for every entry that comes from a plain ResNet."""
        for own in self.state_dict():
            first, _, rest = own.partition(".")
            if first in _STEMS.values():
                yield own, rest
            elif first in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
                yield own, own

    def load_torchvision(self, state: Mapping[str, Tensor]) -> None:
        """Copy a torchvision ResNet state dict into trunk and stems (both stems get the same copy).

        `fc.weight` and `fc.bias` are not used. Batch counters may be absent, as in files before
        2018.

        Raises:
            WeightsError: a key is missing or unexpected, or a shape differs; nothing is changed
            then.
        """
        pairs = list(self._torchvision_keys())
        target = self.state_dict()
        wanted = {theirs for _, theirs in pairs}
        missing = sorted(k for k in wanted - set(state) if not k.endswith("num_batches_tracked"))
        unexpected = sorted(set(state) - wanted - _UNUSED)
        network = f"torchvision's ResNet-{self.depth}"
        if missing:
            raise WeightsError(f"weights: not {network}, missing {_some(missing)}")
        if unexpected:
            raise WeightsError(f"weights: not {network}, unexpected {_some(unexpected)}")
        for own, theirs in pairs:
            if theirs in state and state[theirs].shape != target[own].shape:
                expected, got = list(target[own].shape), list(state[theirs].shape)
                raise WeightsError(f"weights: {theirs}: expected shape {expected}, got {got}")
        with torch.no_grad():
            for own, theirs in pairs:
                if theirs in state:
                    target[own].copy_(state[theirs])

    def load_weights(self, weights: str) -> None:
        """Start from pretrained weights.

        Args:
            weights: "none" keeps the random start; "imagenet" reads torchvision's file from
                PyTorch's hub folder and downloads it when it is not there; anything else is a path
                to a torchvision state dict (.pth or .safetensors).
        Raises:
            WeightsError: no such file, no network, or not the weights of this network.
        """
        if weights != "none":
            self.load_torchvision(read_weights(weights, self.depth))


def depth_of(names: Iterable[str]) -> Depth:
    """Depth of the ResNet with these entries, named as torchvision's; 50 where they do not tell."""
    known = set(names)
    if "layer1.0.conv1.weight" not in known or "layer1.0.conv3.weight" in known:
        return 50
    return 34 if "layer1.2.conv1.weight" in known else 18


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def read_weights(weights: str, depth: int) -> dict[str, Tensor]:
    """Read a state dict from a local file, or for "imagenet" from the hub folder or its URL.

    Raises:
        WeightsError: the file is absent or unreadable, or cannot be downloaded.
    """
    if weights == "imagenet":
        return _download(depth)
    path = Path(weights)
    if not path.is_file():
        raise WeightsError(
            f"weights: no file {weights!r}; expected a torchvision ResNet-{depth} state dict "
            "(.pth or .safetensors), 'imagenet' or 'none'"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise half a dozen unrelated types on a damaged file
        raise WeightsError(f"weights: cannot read {weights!r}: {_first_line(error)}") from error
    return _state_dict(state, weights)


def _state_dict(state: object, source: str) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"weights: {source!r} is not a bare state dict (names to tensors)")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _download(depth: int) -> dict[str, Tensor]:
    url = IMAGENET_URLS[depth]
    try:
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"weights: no ImageNet weights for ResNet-{depth}: {url} cannot be downloaded "
            f"or read ({_first_line(error)}); put that file into {folder}, give the path of a "
            "local copy, or 'none' to train from scratch"
        ) from error
    return _state_dict(state, url)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
