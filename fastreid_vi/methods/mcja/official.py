"""The official MCJA checkpoint in and out: a bare state dict.

The official network keeps the adapters beside the backbone and, inside it, an ImageNet classifier
that nothing uses.

Spec: mcja 2. Golden: mcja/state_dict_layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastreid_vi.backbone import depth_of
from fastreid_vi.methods.base import OfficialKeyError
from fastreid_vi.methods.mcja.model import MCJA
from fastreid_vi.methods.mcja.recipe import MCJAOptions

_OURS = re.compile(r"backbone\.(MDA_[1-4]\..*)")
_IMAGENET_CLASSES = 1000


def from_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from an official one, of any number of identities and adapters.

    Args:
        state: the official state dict.
    Returns:
        Our state dict, the same tensors, and the official keys that carry nothing for us.
    Raises:
        OfficialKeyError: a key is missing or unknown.
        ValueError: a shape does not fit.
    """
    network = _network(state)
    unused = [name for name in ("backbone.fc.weight", "backbone.fc.bias") if name in state]
    official = {_official(name): name for name in network.state_dict()}
    found = set(state) - set(unused)
    if missing := [name for name in official if name not in found]:
        raise OfficialKeyError(missing, sorted(found - set(official)), "MCJA checkpoint")
    if unknown := sorted(found - set(official)):
        raise OfficialKeyError((), unknown, "MCJA checkpoint")
    ours = {name: state[theirs] for theirs, name in official.items()}
    for name, wanted in network.state_dict().items():
        if ours[name].shape != wanted.shape:
            expected, got = list(wanted.shape), list(ours[name].shape)
            raise ValueError(f"{_official(name)}: expected shape {expected}, got {got}")
    return ours, unused


def to_official(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An official state dict from ours, in the official order.

    Args:
        state: of an `MCJA` with the ResNet of its options.
        base: an official state dict, or torchvision's, for the unused ImageNet classifier; zeros
            without.
    Returns:
        The official state dict; entries share storage with `state`.
    Raises:
        OfficialKeyError: `state` is not of such a network.
    """
    adapters = {_official(name): t for name, t in state.items() if _OURS.fullmatch(name)}
    others = {name: t for name, t in state.items() if not _OURS.fullmatch(name)}
    trunk = {name: t for name, t in others.items() if name.startswith("backbone.")}
    head = {name: t for name, t in others.items() if not name.startswith("backbone.")}
    width = state["bn_neck.weight"].shape[0] if "bn_neck.weight" in state else 0
    for entry, shape in (("weight", (_IMAGENET_CLASSES, width)), ("bias", (_IMAGENET_CLASSES,))):
        given = _given(base, f"fc.{entry}")
        trunk[f"backbone.fc.{entry}"] = torch.zeros(shape) if given is None else given
    result = {**trunk, **head, **adapters}
    from_official(result)
    return result


def _given(base: Mapping[str, Tensor] | None, name: str) -> Tensor | None:
    if base is None:
        return None
    return base.get(f"backbone.{name}", base.get(name))


def _official(name: str) -> str:
    return _OURS.sub(r"\1", name)


def _network(state: Mapping[str, Tensor]) -> MCJA:
    """The network that a state dict seems to belong to, without storage."""
    adapters = [_count(state, f"MDA_{layer}.") for layer in range(1, 5)]
    maps = next((len(t) for n, t in state.items() if n.endswith("sc_conv.bias")), 1)
    num_ids = len(state["classifier.weight"]) if "classifier.weight" in state else 1
    options = MCJAOptions(
        depth=depth_of(name.removeprefix("backbone.") for name in state),
        mda_layers=(adapters[0], adapters[1], adapters[2], adapters[3]),
        mda_m=maps,
        weights="none",
    )
    with torch.device("meta"):
        return MCJA(num_ids, options)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many modules a list has."""
    return len(
        {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    )
