"""What the methods' `official` modules share: renaming with a check, and the layout of AGW.

AGW's network, which LbA and the baseline build on, holds three whole ResNets and uses a part of
each: the stems of the first two, the trunk of the third. The rest is in its checkpoints but never
in a forward.

Spec: lba 2 (official checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from fastreid_vi.backbone import Depth, depth_of
from fastreid_vi.methods.base import OfficialKeyError

# Prefix of each ResNet of AGW, our prefix for the entries of its stem and of its layers (None:
# unused).
RESNETS: Final = (
    ("visible_module.visible.", "backbone.visible_stem.", None),
    ("thermal_module.thermal.", "backbone.infrared_stem.", None),
    ("base_resnet.base.", None, "backbone."),
)
_STEM: Final = re.compile(r"(conv1|bn1)\.")


def renamed(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    names: Mapping[str, str | None],
    what: str,
) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict out of an official one.

    Args:
        state: the official state dict; entries that nothing uses may be absent.
        wanted: our state dict, of which only names and shapes count.
        names: official name -> ours; None for entries that nothing uses.
        what: begins the message of an error, for example "LbA checkpoint".
    Returns:
        Our state dict, in the order of `wanted` and with the tensors of `state`, and the official
        keys that carry nothing for us.
    Raises:
        OfficialKeyError: a key is missing or unknown.
        ValueError: a shape does not fit.
    """
    missing = [name for name, ours in names.items() if ours is not None and name not in state]
    unknown = [name for name in state if name not in names]
    if missing or unknown:
        raise OfficialKeyError(missing, unknown, what)
    theirs = {ours: name for name, ours in names.items() if ours is not None}
    for name, tensor in wanted.items():
        found = state[theirs[name]]
        if found.shape != tensor.shape:
            expected, got = list(tensor.shape), list(found.shape)
            raise ValueError(f"{theirs[name]}: expected shape {expected}, got {got}")
    ours = {name: state[theirs[name]] for name in wanted}
    return ours, [name for name in state if names[name] is None]


def agw_names(state: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Every entry of AGW's state dict, and the entry of `state` that it takes.

    Args:
        state: state dict of ours with separate stems.
    Returns:
        Official names in the order of the official modules; None for entries that nothing uses.
    """
    stem = [n.removeprefix("backbone.visible_stem.") for n in state if ".visible_stem." in n]
    trunk = [n.removeprefix("backbone.") for n in state if n.startswith("backbone.layer")]
    names: dict[str, str | None] = {}
    for prefix, stem_prefix, trunk_prefix in RESNETS:
        for entries, ours in ((stem, stem_prefix), (trunk, trunk_prefix)):
            names.update({prefix + n: None if ours is None else ours + n for n in entries})
    names.update({n: n for n in state if not n.startswith("backbone.")})
    return names


def agw_size(state: Mapping[str, Tensor]) -> tuple[int, Depth]:
    """Identities and depth of the network that an AGW state dict seems to belong to."""
    prefix = RESNETS[-1][0]
    trunk = (name.removeprefix(prefix) for name in state if name.startswith(prefix))
    classes = state.get("classifier.weight")
    num_ids = max(len(classes), 1) if classes is not None and classes.dim() else 1
    return num_ids, depth_of(trunk)


def agw_state(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """AGW's state dict out of ours.

    Args:
        state: state dict of ours with separate stems.
        base: an official state dict, or torchvision's (the official code starts all three ResNets
            from it), for the entries that nothing uses; without it they repeat the trunk's and the
            visible stem's.
    Returns:
        The official state dict; entries share storage with `state` and `base`.
    Raises:
        OfficialKeyError: `base` lacks an entry.
        ValueError: a shape of `base` does not fit.
    """
    result: dict[str, Tensor] = {}
    absent: list[str] = []
    for name, ours in agw_names(state).items():
        source = _stand_in(name) if ours is None else ours
        if ours is None and base is not None:
            given = base.get(name, base.get(_torchvision(name)))
            if given is None and name.endswith("num_batches_tracked"):  # none in files before 2018
                given = torch.zeros((), dtype=torch.int64)
            if given is None:
                absent.append(name)
                continue
            if given.shape != state[source].shape:
                expected, got = list(state[source].shape), list(given.shape)
                raise ValueError(f"base: {name}: expected shape {expected}, got {got}")
            result[name] = given
        elif source in state:
            result[name] = state[source]
    if absent:
        raise OfficialKeyError(absent, (), "base")
    return result


def _torchvision(name: str) -> str:
    """The name without the ResNet that it belongs to."""
    for prefix, _, _ in RESNETS:
        name = name.removeprefix(prefix)
    return name


def _stand_in(name: str) -> str:
    """Our entry of the same shape as an unused official one."""
    rest = _torchvision(name)
    return ("backbone.visible_stem." if _STEM.match(rest) else "backbone.") + rest
