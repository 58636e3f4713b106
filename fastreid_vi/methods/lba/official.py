"""The official LbA checkpoint in and out: the state dict `net` inside the released files.

Spec: lba 2 (official checkpoint).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastreid_vi.methods.lba.model import LbA
from fastreid_vi.methods.lba.recipe import LbAOptions
from fastreid_vi.methods.official import agw_names as official_names
from fastreid_vi.methods.official import agw_size, agw_state, renamed

__all__ = ["from_official", "official_names", "to_official"]


def from_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from an official one, of any number of identities and any depth.

    Args:
        state: the official state dict, with or without the entries that nothing uses.
    Returns:
        Our state dict, the same tensors, and the official keys that carry nothing for us.
    Raises:
        OfficialKeyError: a key is missing or unknown.
        ValueError: a shape does not fit.
    """
    wanted = _network(state).state_dict()
    return renamed(state, wanted, official_names(wanted), "LbA checkpoint")


def to_official(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An official state dict from ours, complete.

    Args:
        state: of an `LbA` with the ResNet of its options.
        base: an official state dict, or torchvision's (the official code starts all three ResNets
            from it), for the entries that nothing uses; without it they repeat the trunk's and the
            visible stem's.
    Returns:
        The official state dict; entries share storage with `state` and `base`.
    Raises:
        OfficialKeyError: `state` is not of such a network, or `base` lacks an entry.
        ValueError: a shape does not fit.
    """
    result = agw_state(state, base)
    from_official(result)
    return result


def _network(state: Mapping[str, Tensor]) -> LbA:
    """The network that an official state dict seems to belong to, without storage."""
    num_ids, depth = agw_size(state)
    with torch.device("meta"):
        return LbA(num_ids, LbAOptions(depth=depth, weights="none"))
