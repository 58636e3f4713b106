"""The small networks that the golden vectors of the methods were made with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastreid_vi.backbone import Trunk, TwoStreamResNet


class GivenMap(Trunk):
    """The images are the feature map.

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels

    def forward(self, images: Tensor, modality: Tensor | None = None) -> Tensor:
        """The images themselves."""
        return images


class PooledConv(Trunk):
    """Adaptive average pool to 6 x 3, 1 x 1 convolution, ReLU: the encoder of AlignGAN's steps."""

    def __init__(self, channels: int = 2048) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 1)
        self.out_channels = channels

    def forward(self, images: Tensor, modality: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, C, 6, 3]."""
        return torch.relu(self.conv(F.adaptive_avg_pool2d(images, (6, 3))))


class MiniatureStem(nn.Module):
    """conv1 3x3 stride 2, batch norm, ReLU, max-pool."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, width, H / 4, W / 4]."""
        return F.max_pool2d(torch.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)


class Miniature(TwoStreamResNet):
    """LbA's golden network: four layers of one convolution behind two stems.

    Args:
        widths: of the stems and of layer1 to layer4.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        Trunk.__init__(self)
        self.stems, self.channels, self.out_channels = "separate", tuple(widths[1:]), widths[-1]
        self.visible_stem, self.infrared_stem = MiniatureStem(widths[0]), MiniatureStem(widths[0])
        for i, size in enumerate((1, 3, 3, 1), start=1):
            conv = nn.Conv2d(widths[i - 1], widths[i], size, padding=size // 2, bias=False)
            self.add_module(f"layer{i}", nn.Sequential(conv, nn.BatchNorm2d(widths[i]), nn.ReLU()))
