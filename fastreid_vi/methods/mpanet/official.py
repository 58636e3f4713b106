"""The official MPANet checkpoint in and out: a bare state dict, whose names are ours.

Spec: mpanet 2 (official checkpoint).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fastreid_vi.backbone import depth_of
from fastreid_vi.methods.mpanet.model import MPANet
from fastreid_vi.methods.mpanet.recipe import MPANetOptions
from fastreid_vi.methods.official import renamed


def from_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from an official one, of any number of identities and parts.

    Args:
        state: the official state dict.
    Returns:
        Our state dict, the same tensors, and an empty list: every entry is used.
    Raises:
        OfficialKeyError: a key is missing or unknown.
        ValueError: a shape does not fit.
    """
    wanted = _network(state).state_dict()
    return renamed(state, wanted, {name: name for name in wanted}, "MPANet checkpoint")


def to_official(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An official state dict from ours, in the official order.

    Args:
        state: of an `MPANet` with the ResNet of its options.
        base: not needed: the official network has no entry that nothing uses.
    Returns:
        The official state dict; entries share storage with `state`.
    Raises:
        OfficialKeyError: `state` is not of such a network.
        ValueError: a shape does not fit.
    """
    return from_official(state)[0]


def _network(state: Mapping[str, Tensor]) -> MPANet:
    """The network that a state dict seems to belong to, without storage."""
    attention: Literal[0, 1, 2] = 0
    if any(name.startswith("backbone.MAM3.") for name in state):
        attention = 2
    elif any(name.startswith("backbone.MAM4.") for name in state):
        attention = 1
    sizes = {name: len(tensor) for name, tensor in state.items() if tensor.dim()}
    options = MPANetOptions(
        depth=depth_of(name.removeprefix("backbone.") for name in state),
        modality_attention=attention,
        parts=max(sizes.get("spatial_attention.bias", 6), 1),
        weights="none",
    )
    with torch.device("meta"):
        return MPANet(max(sizes.get("classifier.weight", 1), 1), options)
