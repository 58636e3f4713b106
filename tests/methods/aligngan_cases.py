"""Batches, networks and a small training loop that the AlignGAN tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastreid_vi.backbone import Trunk
from fastreid_vi.config import INFRARED, VISIBLE, Batch, OptimConfig
from fastreid_vi.methods.aligngan import AlignGAN, AlignGANOptions
from fastreid_vi.methods.base import Losses

WARMUP = ("generators_warmup", "d_rgb_warmup", "d_ir_warmup")
JOINT = ("feature", "generators", "d_rgb", "d_ir")
STAGES = (("feature_warmup",), WARMUP, JOINT)
OWN = {
    "feature_warmup": {"backbone", "embedder"},
    "generators_warmup": {"visible_to_infrared", "infrared_to_visible"},
    "d_rgb_warmup": {"visible_warmup_discriminator"},
    "d_ir_warmup": {"infrared_warmup_discriminator"},
    "feature": {"backbone", "embedder"},
    "generators": {"visible_to_infrared", "infrared_to_visible"},
    "d_rgb": {"visible_discriminator"},
    "d_ir": {"infrared_discriminator"},
}


class NormedConv(Trunk):
    """Convolution of stride 8, batch norm, ReLU."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 8, stride=8)
        self.bn = nn.BatchNorm2d(channels)
        self.out_channels = channels

    def forward(self, images: Tensor, modality: Tensor | None = None) -> Tensor:
        return self.bn(self.conv(images)).relu()


SMALL = {"conv_dim": 4, "residual_blocks": 1, "embedding": 8, "encoder_size": (48, 24)}


def small(num_ids: int = 4, **options: object) -> AlignGAN:
    """AlignGAN with tiny networks, seeded."""
    torch.manual_seed(0)
    chosen = AlignGANOptions(**{**SMALL, "pixel_images": 0, **options})  # type: ignore[arg-type]
    return AlignGAN(num_ids, chosen, backbone=NormedConv())


def paired_batch(
    ids: int = 4, k: int = 2, size: tuple[int, int] = (64, 64), seed: int = 3
) -> Batch:
    """Random images in [-1, 1]: [visible | infrared], identity-major."""
    generator = torch.Generator().manual_seed(seed)
    images = 2 * torch.rand(2 * ids * k, 3, *size, generator=generator) - 1
    labels = torch.arange(ids).repeat_interleave(k).repeat(2)
    modality = torch.tensor([VISIBLE, INFRARED]).repeat_interleave(ids * k)
    return Batch(images, labels, modality, torch.where(modality == INFRARED, 3, 1), k)


@contextmanager
def alone(network: AlignGAN, phase: str) -> Iterator[None]:
    """Only the phase's own parameters ask for gradients, as in the training loop."""
    own = {id(p) for p in network.phase_parameters(phase)}
    frozen = [p for p in network.parameters() if p.requires_grad and id(p) not in own]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def backward(network: AlignGAN, batch: Batch, phase: str) -> Losses:
    """Losses of a phase and the gradients they leave."""
    network.zero_grad()
    with alone(network, phase):
        losses = network(network.phase_batch(batch, phase), phase)
        losses.total.backward()
    return losses


def build(config: OptimConfig, network: AlignGAN, phase: str) -> torch.optim.Optimizer:
    """The optimiser of a phase's player."""
    trained = {id(p): p for p in network.phase_parameters(phase) if p.requires_grad}
    backbone = {id(p) for p in network.backbone.parameters()}
    groups = [
        {"params": [p for i, p in trained.items() if i not in backbone], "lr": config.lr},
        {
            "params": [p for i, p in trained.items() if i in backbone],
            "lr": config.lr * config.backbone_lr_scale,
        },
    ]
    groups = [g for g in groups if g["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, momentum=config.momentum, nesterov=True, weight_decay=config.weight_decay
        )
    return torch.optim.Adam(groups, betas=config.betas, weight_decay=config.weight_decay)


def values(network: AlignGAN, batch: Batch, phase: str) -> dict[str, float]:
    losses = network(batch, phase)
    named = {**losses.terms, "total": losses.total}
    return {name: float(value.detach()) for name, value in named.items()}


def buffers(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def moved(before: dict[str, Tensor], network: torch.nn.Module) -> set[str]:
    """First parts of the names of buffers that changed."""
    after = dict(network.named_buffers())
    return {n.partition(".")[0] for n, b in before.items() if not torch.equal(b, after[n])}


def names_of(network: AlignGAN, phase: str) -> set[str]:
    own = {id(p) for p in network.phase_parameters(phase)}
    return {n for n, p in network.named_parameters() if id(p) in own}


def untrained(network: AlignGAN) -> set[str]:
    return {n for n, p in network.named_parameters() if not p.requires_grad}
