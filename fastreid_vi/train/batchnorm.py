"""Batch norm with the statistics of all processes (`--bn sync`).

On CUDA that is `nn.SyncBatchNorm`, which refuses CPU tensors; here is one that takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastreid_vi._distributed import world_size


class _Joined(torch.autograd.Function):
    """Normalises by the mean and variance over the rows of all processes.

    The gradient of the input is that of the sum of all processes' losses; weight and bias get their
    own rows' share, as every other parameter does before gradients are averaged.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        axes = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(wide, axes, correction=0)  # [C]
        rows = x.numel() // x.shape[1]
        # Sums in float64: the square of the mean is subtracted again.
        mean, variance = mean.double(), variance.double()
        sums = torch.cat([mean.new_tensor([1.0]), mean, variance + mean.square()]) * rows
        dist.all_reduce(sums)
        count = sums[0]
        mean, square = (sums[1:] / count).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        narrow = mean.to(wide.dtype), variance.to(wide.dtype)
        ctx.save_for_backward(x, weight, *narrow, count)
        ctx.eps, ctx.axes = eps, axes
        y = F.batch_norm(x, *narrow, weight, bias, False, 0.0, eps)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = (variance + ctx.eps).rsqrt()
        wide = grad.to(mean.dtype)
        hat = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        bias_grad, weight_grad = wide.sum(ctx.axes), (wide * hat).sum(ctx.axes)
        both = torch.stack([bias_grad, weight_grad])
        dist.all_reduce(both)
        first, second = (both / count).to(mean.dtype)
        slope = scale if weight is None else scale * weight
        inner = wide - first.view(shape) - hat * second.view(shape)
        x_grad = (inner * slope.view(shape)).to(x.dtype)
        if weight is None:
            return x_grad, None, None, None
        needed = ctx.needs_input_grad
        return x_grad, weight_grad if needed[1] else None, bias_grad if needed[2] else None, None


class JoinedBatchNorm(_BatchNorm):
    """`nn.BatchNorm1d`, `2d` or `3d` over the rows of all processes; takes any device."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input: expected [B, C, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]; evaluation as in the class it stands for."""
        self._check_input_dim(input)
        if not self.training or world_size() == 1:
            return super().forward(input)
        join: Callable[..., tuple[Tensor, ...]] = _Joined.apply
        y, mean, variance, count = join(input, self.weight, self.bias, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                rate = self._rate()
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)
        return y

    def _rate(self) -> float:
        if self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum


def synchronise(module: nn.Module, device: torch.device) -> None:
    """Let every batch norm inside `module` use the rows of all processes.

    Parameters, buffers and their names stay. Norms are replaced where they stand, before an
    optimiser is built.

    Args:
        module: changed in place.
        device: CUDA takes `nn.SyncBatchNorm`, others `JoinedBatchNorm`.
    """
    if device.type == "cuda":
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        convert(module)
        return
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, JoinedBatchNorm):
                setattr(parent, name, _joined_form(child))


def _joined_form(norm: _BatchNorm) -> JoinedBatchNorm:
    new = JoinedBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(new, name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(new, name, buffer)
    return new.train(norm.training)
