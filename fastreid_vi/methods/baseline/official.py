"""Checkpoints of AGW's base network in and out: the state dict `net` inside its files.

The baseline is AGW without non-local blocks; checkpoints that have such blocks are refused. AGW's
GeM has a fixed exponent and no entry.

Spec: lba 2 (official checkpoint; LbA builds on the same network).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastreid_vi.methods.base import OfficialKeyError
from fastreid_vi.methods.baseline.model import Baseline
from fastreid_vi.methods.baseline.recipe import BaselineOptions
from fastreid_vi.methods.official import agw_names, agw_size, agw_state, renamed

_NON_LOCAL = "NL_"


def from_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from an official one, of any number of identities and any depth.

    Args:
        state: the official state dict, with or without the entries that nothing uses.
    Returns:
        Our state dict, the same tensors, and the official keys that carry nothing for us.
    Raises:
        OfficialKeyError: a key is missing or unknown, or of a non-local block.
        ValueError: a shape does not fit.
    """
    if blocks := [name for name in state if name.startswith(_NON_LOCAL)]:
        what = "AGW checkpoint with non-local blocks, which the baseline does not have"
        raise OfficialKeyError((), blocks, what)
    wanted = _network(state).state_dict()
    return renamed(state, wanted, agw_names(wanted), "AGW checkpoint")


def to_official(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An official state dict from ours, complete.

    Args:
        state: of a `Baseline` with separate stems.
        base: an official state dict, or torchvision's, for the entries that nothing uses; without
            it they repeat the trunk's and the visible stem's.
    Returns:
        The official state dict; entries share storage with `state` and `base`.
    Raises:
        OfficialKeyError: `state` is not of such a network, or `base` lacks an entry.
        ValueError: a shape does not fit.
    """
    result = agw_state(state, base)
    from_official(result)
    return result


def _network(state: Mapping[str, Tensor]) -> Baseline:
    """The network that an official state dict seems to belong to, without storage."""
    num_ids, depth = agw_size(state)
    with torch.device("meta"):
        return Baseline(num_ids, BaselineOptions(depth=depth, weights="none"))
