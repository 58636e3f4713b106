"""Network layers as `nn.Module` skins over `fastreid_vi.ops`.

Parameter names are those of the papers' code.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from fastreid_vi import ops
from fastreid_vi.ops._matching import Weighting
from fastreid_vi.ops.instance_norm import Activation as NormActivation
from fastreid_vi.ops.pool import Activation


class GeM(nn.Module):
    """Generalised-mean pooling with a fixed exponent; see `ops.gem_pool`."""

    def __init__(self, p: float = 3.0, eps: float = 1e-12) -> None:
        super().__init__()
        self.p, self.eps = p, eps

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C]."""
        return ops.gem_pool(features, self.p, self.eps)

    def extra_repr(self) -> str:
        """Exponent and epsilon."""
        return f"p={self.p}, eps={self.eps}"


class PatternPool(nn.Module):
    """A 1x1 convolution that predicts pattern maps, and pooling under them; see `ops.pattern_pool`.

    Parameters `weight` [P, C, 1, 1] (uniform, bound 1/sqrt(C)) and `bias` [P] (0).
    """

    def __init__(self, channels: int, parts: int, activation: Activation = "sigmoid") -> None:
        super().__init__()
        conv = nn.Conv2d(channels, parts, 1)
        assert conv.bias is not None  # nn.Conv2d has one by default
        self.weight, self.bias = conv.weight, conv.bias
        nn.init.zeros_(self.bias)
        self.activation: Activation = activation

    def forward(self, features: Tensor) -> ops.PatternPool:
        """[B, C, H, W] -> `PatternPool(pooled [B, P, C], maps [B, P, H, W])`."""
        return ops.pattern_pool(features, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """Sizes and activation."""
        parts, channels = self.weight.shape[:2]
        return f"{channels}, {parts}, activation={self.activation!r}"


class ModalityAlleviation(nn.Module):
    """MPANet's MAM: a learned gate between each channel and its instance norm.

    See `ops.modality_alleviation`. Parameters `channel_attention.0.weight` [C/r, C, 1, 1] and
    `channel_attention.2.weight` [C, C/r, 1, 1], Kaiming normal (fan out, ReLU).
    """

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        if ratio < 1 or channels < ratio:
            raise ValueError(f"ratio: expected 1 to channels ({channels}), got {ratio}")
        # The sequence only holds the weights, under their official names; the op does the work.
        self.channel_attention = nn.Sequential(
            nn.Conv2d(channels, channels // ratio, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // ratio, channels, 1, bias=False),
            nn.Sigmoid(),
        )
        for weight in self.channel_attention.parameters():
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; may be negative."""
        reduce_weight, expand_weight = self.channel_attention.parameters()
        return ops.modality_alleviation(features, reduce_weight, expand_weight)


class BNNeck(nn.BatchNorm1d):
    """Batch norm between the metric and the identity losses; its bias stays 0 and gets no gradient.

    Args:
        features: D.
        weight_std: the weight starts as N(1, weight_std); 0 for exactly 1.
    """

    def __init__(self, features: int, *, weight_std: float = 0.0) -> None:
        super().__init__(features)
        if not (math.isfinite(weight_std) and weight_std >= 0):
            raise ValueError(f"weight_std: expected >= 0, got {weight_std}")
        if weight_std:
            nn.init.normal_(self.weight, 1.0, weight_std)
        self.bias.requires_grad_(False)


class InstanceNormAct(nn.InstanceNorm2d):
    """Instance norm, activation and residual sum in one; see `ops.instance_norm_act`.

    AlignGAN's norm: parameters and buffers are those of `nn.InstanceNorm2d` with `affine` and
    `track_running_stats`, and so is their use: training moves the running statistics, evaluation
    takes them. `num_batches_tracked` stays 0.
    """

    def __init__(
        self,
        channels: int,
        *,
        activation: NormActivation = "relu",
        negative_slope: float = 0.2,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(channels, eps, momentum, affine, track_running_stats)
        self.activation: NormActivation = activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return ops.instance_norm_act(
            input,
            self.weight,
            self.bias,
            residual=residual,
            activation=self.activation,
            negative_slope=self.negative_slope,
            eps=self.eps,
            running_mean=self.running_mean,
            running_var=self.running_var,
            training=self.training,
            momentum=self.momentum or 0.0,
        )

    def extra_repr(self) -> str:
        """Size and what the defaults do not say."""
        return (
            f"{self.num_features}, activation={self.activation!r}, affine={self.affine},"
            f" track_running_stats={self.track_running_stats}"
        )


class DistributionAdapter(nn.Module):
    """MCJA's MDA: a gate from pooled pseudo-modalities, a batch norm of the gated map, and a sum.

    See `ops.distribution_adapter`. Names and starts of the official module: `sc_conv`, `ca_conv`
    (PyTorch's defaults), `ca_bn`, and `norm_bn`, which starts at zero: a fresh module is the
    identity.
    """

    def __init__(self, channels: int, maps: int = 2) -> None:
        super().__init__()
        if channels < 1 or maps < 1:
            raise ValueError(f"channels, maps: expected >= 1, got {channels}, {maps}")
        # They hold parameters and buffers, under their official names; the op does the work.
        self.sc_conv = nn.Conv2d(channels, maps, 1)
        self.ca_conv = nn.Conv1d(channels, channels, maps, groups=channels, bias=False)
        self.ca_bn = nn.BatchNorm1d(channels)
        self.norm_bn = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm_bn.weight)
        nn.init.zeros_(self.norm_bn.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; B >= 2 in training."""
        if self.training and type(self.norm_bn) is not nn.BatchNorm2d:
            return self._in_parts(features)
        assert self.sc_conv.bias is not None  # nn.Conv2d has one by default
        out = ops.distribution_adapter(
            features,
            self.sc_conv.weight,
            self.sc_conv.bias,
            self.ca_conv.weight,
            self.ca_bn.weight,
            self.ca_bn.bias,
            self.norm_bn.weight,
            self.norm_bn.bias,
            ca_running_mean=self.ca_bn.running_mean,
            ca_running_var=self.ca_bn.running_var,
            norm_running_mean=self.norm_bn.running_mean,
            norm_running_var=self.norm_bn.running_var,
            training=self.training,
            momentum=self.norm_bn.momentum or 0.0,
            eps=self.norm_bn.eps,
        )
        if self.training:
            for norm in (self.ca_bn, self.norm_bn):
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.add_(1)
        return out

    def _in_parts(self, features: Tensor) -> Tensor:
        """The same by PyTorch's modules: norms that other processes take part in are not fused."""
        attention = self.sc_conv(features).flatten(2).softmax(dim=-1)  # [B, M, S]
        context = features.flatten(2) @ attention.transpose(1, 2)  # [B, C, M]
        gate = self.ca_bn(self.ca_conv(context).squeeze(-1)).sigmoid()  # [B, C]
        out: Tensor = features + self.norm_bn(gate[:, :, None, None] * features)
        return out


class CMAlign(nn.Module):
    """LbA's cross-modality feature alignment; see `ops.dense_alignment`. No parameters.

    Args:
        temperature: factor of the cosine before the softmax over positions.
        margin: of the dense triplet loss.
        weighting: "sample" is the paper's, "batch" what the released code computes.
    """

    def __init__(
        self, temperature: float = 50.0, margin: float = 0.3, weighting: Weighting = "sample"
    ) -> None:
        super().__init__()
        self.temperature, self.margin = temperature, margin
        self.weighting: Weighting = weighting

    def forward(self, features: Tensor, positive: Tensor, negative: Tensor) -> ops.DenseAlignment:
        """[B, C, H, W] and two index vectors [B] -> `DenseAlignment(aligned, loss, comask)`."""
        return ops.dense_alignment(
            features,
            positive,
            negative,
            temperature=self.temperature,
            margin=self.margin,
            weighting=self.weighting,
        )

    def extra_repr(self) -> str:
        """Options."""
        return f"temperature={self.temperature}, margin={self.margin}, weighting={self.weighting!r}"
