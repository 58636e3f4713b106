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
from fastreid_vi.methods.mcja.model import MCJA
from fastreid_vi.methods.mcja.recipe import MCJAOptions
from fastreid_vi.methods.official import renamed

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
    wanted = _network(state).state_dict()
    names: dict[str, str | None] = {_official(name): name for name in wanted}
    unused = dict.fromkeys(f"backbone.fc.{entry}" for entry in ("weight", "bias"))
    return renamed(state, wanted, {**names, **unused}, "MCJA checkpoint")


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
    sizes = {name: len(tensor) for name, tensor in state.items() if tensor.dim()}
    maps = next((size for name, size in sizes.items() if name.endswith("sc_conv.bias")), 1)
    options = MCJAOptions(
        depth=depth_of(name.removeprefix("backbone.") for name in state),
        mda_layers=(adapters[0], adapters[1], adapters[2], adapters[3]),
        mda_m=max(maps, 1),
        weights="none",
    )
    with torch.device("meta"):
        return MCJA(max(sizes.get("classifier.weight", 1), 1), options)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many modules a list has."""
    return len(
        {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    )
