"""AlignGAN's generators: images of one modality to images of the other.

Spec: aligngan 2, 3.2. Golden: aligngan/generator.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from fastreid_vi import ops
from fastreid_vi.layers import InstanceNormAct
from fastreid_vi.ops.instance_norm import Activation

Statistics = Literal["running", "instance"]


class GeneratorNorm(InstanceNormAct):
    """Instance norm with running statistics that evaluation may leave alone (A3).

    Training with `track_running_stats` set to False leaves them as they are.
    """

    def __init__(self, channels: int, in_eval: Statistics, activation: Activation = "relu") -> None:
        super().__init__(channels, activation=activation)
        self.in_eval: Statistics = in_eval

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        tracked = self.track_running_stats if self.training else self.in_eval == "running"
        return ops.instance_norm_act(
            input,
            self.weight,
            self.bias,
            residual=residual,
            activation=self.activation,
            eps=self.eps,
            running_mean=self.running_mean if tracked else None,
            running_var=self.running_var if tracked else None,
            training=self.training,
            momentum=self.momentum or 0.0,
        )


class ResidualBlock(nn.Module):
    """x + IN(conv(ReLU(IN(conv x)))), both convolutions 3 x 3."""

    def __init__(self, channels: int, in_eval: Statistics) -> None:
        super().__init__()
        # The official sequences have their activations as entries of their own: the numbers jump.
        self.model = nn.Sequential(
            OrderedDict(
                {
                    "0": nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    "1": GeneratorNorm(channels, in_eval),
                    "3": nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    "4": GeneratorNorm(channels, in_eval, "none"),
                }
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        conv1, norm1, conv2, norm2 = self.model
        out: Tensor = norm2(conv2(norm1(conv1(x))), x)
        return out


class Generator(nn.Module):
    """Two halvings, residual blocks, two doublings.

    Args:
        conv_dim: channels of the first layer.
        residual_blocks: number of residual blocks.
        in_eval: statistics of the norms in evaluation.

    Convolutions start as N(0, 0.02). Parameter names are those of the official checkpoint.
    """

    def __init__(
        self, conv_dim: int = 64, residual_blocks: int = 4, in_eval: Statistics = "running"
    ) -> None:
        super().__init__()
        entries: dict[str, nn.Module] = {}
        k, width = 0, conv_dim

        def add(conv: nn.Module, channels: int) -> None:
            nonlocal k
            entries[str(k)], entries[str(k + 1)] = conv, GeneratorNorm(channels, in_eval)
            k += 3

        add(nn.Conv2d(3, width, 7, padding=3, bias=False), width)
        for _ in range(2):
            width *= 2
            add(nn.Conv2d(width // 2, width, 4, stride=2, padding=1, bias=False), width)
        for _ in range(residual_blocks):
            entries[str(k)] = ResidualBlock(width, in_eval)
            k += 1
        for _ in range(2):
            width //= 2
            conv = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False)
            add(conv, width)
        entries[str(k)] = nn.Conv2d(width, 3, 7, padding=3, bias=False)
        entries[str(k + 1)] = nn.Tanh()
        self.model = nn.Sequential(OrderedDict(entries))
        start_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> the same; H and W are multiples of 4."""
        if images.shape[-2] % 4 or images.shape[-1] % 4:
            height, width = images.shape[-2:]
            raise ValueError(
                f"images: expected height and width divisible by 4, got {height} x {width}"
            )
        out: Tensor = self.model(images)
        return out


def start_convolutions(network: nn.Module) -> None:
    """Official start of generators and discriminators: N(0, 0.02); biases keep PyTorch's."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
