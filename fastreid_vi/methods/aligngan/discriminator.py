"""AlignGAN's discriminators: of images, and of pairs (image, feature map).

Spec: aligngan 2. Golden: aligngan/discriminators.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastreid_vi import ops
from fastreid_vi.layers import InstanceNormAct
from fastreid_vi.methods.aligngan.generator import start_convolutions

SLOPE = 0.2


class NormedConv2d(nn.Conv2d):
    """4 x 4 convolution of stride 2 in front of an instance norm.

    The norm takes any constant out again, so the bias that the official checkpoint has is neither
    added nor trained (A15).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 4, stride=2, padding=1)
        assert self.bias is not None  # nn.Conv2d has one by default
        self.bias.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / 2, W / 2]."""
        out: Tensor = self._conv_forward(input, self.weight, None)
        return out


def _norm(channels: int) -> InstanceNormAct:
    return InstanceNormAct(
        channels,
        activation="leaky_relu",
        negative_slope=SLOPE,
        affine=False,
        track_running_stats=False,
    )


def _branch(conv: nn.Conv2d, *widths: int) -> nn.Sequential:
    """`conv` with its activation, then halvings with norms, numbered as the official entries."""
    entries: dict[str, nn.Module] = {"0": conv, "1": nn.LeakyReLU(SLOPE, inplace=True)}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        entries |= {f"{3 * i + 2}": NormedConv2d(inputs, outputs), f"{3 * i + 3}": _norm(outputs)}
    return nn.Sequential(OrderedDict(entries))


def _tail(*widths: int) -> nn.Sequential:
    entries: dict[str, nn.Module] = {}
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        entries |= {f"{3 * i}": NormedConv2d(inputs, outputs), f"{3 * i + 1}": _norm(outputs)}
    return nn.Sequential(OrderedDict(entries))


def _check_positions(features: Tensor, halvings: int) -> None:
    """A norm over one position is zero, whatever comes in."""
    if features.shape[-1] * features.shape[-2] < 2:
        height, width = (int(n) << halvings for n in features.shape[-2:])
        raise ValueError(
            f"images: expected more than one position after {halvings} halvings, got about "
            f"{height} x {width} pixels"
        )


class Discriminator(nn.Module):
    """Scores of image patches, 1 for real and 0 for fake (least squares).

    Args:
        conv_dim: channels of the first layer.
        layers: halvings after the first.
    """

    def __init__(self, conv_dim: int = 64, layers: int = 4) -> None:
        super().__init__()
        widths = [conv_dim * 2**i for i in range(layers + 1)]
        self.model = _branch(nn.Conv2d(3, conv_dim, 4, stride=2, padding=1), *widths)
        self.conv_src = nn.Conv2d(widths[-1], 1, 3, padding=1, bias=False)
        self.halvings = layers + 1
        start_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1, H / 2^(layers + 1), W / 2^(layers + 1)]."""
        features = self.model(images)
        _check_positions(features, self.halvings)
        scores: Tensor = self.conv_src(features)
        return scores


class JointDiscriminator(nn.Module):
    """Scores of pairs (image, feature map): real if both are, and of one person.

    Args:
        channels: of the encoder's map.
        conv_dim: channels of the first layer.

    Nothing in it mixes samples: `image_branch` and `feature_branch` of a batch may serve several
    pairings in `score`.
    """

    halvings = 5

    def __init__(self, channels: int = 2048, conv_dim: int = 64) -> None:
        super().__init__()
        d = conv_dim
        first = nn.Conv2d(3, d, 4, stride=2, padding=1)
        self.image_convs = _branch(first, d, 2 * d, 4 * d)
        self.feature_convs = _branch(nn.Conv2d(channels, d, 1))
        self.dis_convs = _tail(5 * d, 8 * d, 16 * d)
        self.conv_src = nn.Conv2d(16 * d, 1, 3, padding=1, bias=False)
        start_convolutions(self)

    def image_branch(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 4 conv_dim, H / 8, W / 8]."""
        out: Tensor = self.image_convs(images)
        return out

    def feature_branch(self, features: Tensor, images: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, conv_dim, H / 8, W / 8] for the H, W of `images`."""
        size = images.shape[-2] // 8, images.shape[-1] // 8
        # With fixed order in backward, unlike F.interpolate.
        return ops.resize_normalize(self.feature_convs(features), size, mean=0.0, std=1.0)

    def score(self, images: Tensor, features: Tensor) -> Tensor:
        """Outputs of both branches, row by row -> [B, 1, H / 32, W / 32]."""
        mixed = self.dis_convs(torch.cat((images, features), dim=1))
        _check_positions(mixed, self.halvings)
        scores: Tensor = self.conv_src(mixed)
        return scores

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        """[B, 3, H, W] and [B, channels, h, w] -> [B, 1, H / 32, W / 32]."""
        return self.score(self.image_branch(images), self.feature_branch(features, images))
