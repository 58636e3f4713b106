"""The official AlignGAN checkpoint in and out: eight state dicts, one of each network.

The released files are `model-<index>_<step>.pkl`, state dicts of data-parallel wrappers; here their
keys are joined under the index: "0/module.model.0.weight".

Spec: aligngan 2 (checkpoints). Golden: aligngan/state_dict_layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from fastreid_vi.methods.aligngan.model import AlignGAN
from fastreid_vi.methods.aligngan.recipe import AlignGANOptions
from fastreid_vi.methods.base import OfficialKeyError

NETWORKS: Final = (
    "visible_to_infrared",
    "infrared_to_visible",
    "visible_discriminator",
    "infrared_discriminator",
    "visible_warmup_discriminator",
    "infrared_warmup_discriminator",
    "backbone",
    "embedder",
)
"""Our name of each official file's network, by index."""
# The official encoder is a sequence of the ResNet's children.
ENCODER: Final = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(i + 3) for i in range(1, 5)}}


def official_name(name: str) -> str:
    """The official key of one of our entries."""
    network, _, entry = name.partition(".")
    if network == "backbone":
        child, _, rest = entry.partition(".")
        entry = f"resnet_conv.{ENCODER.get(child, child)}.{rest}"
    return f"{NETWORKS.index(network)}/module.{entry}"


def from_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict from the official ones, of any number of identities.

    Args:
        state: all eight, keys after "<index>/".
    Returns:
        Our state dict, the same tensors, and no unused keys.
    Raises:
        OfficialKeyError: a key is missing or unknown.
        ValueError: a shape does not fit.
    """
    wanted = _network(state).state_dict()
    theirs = {name: official_name(name) for name in wanted}
    missing = [key for key in theirs.values() if key not in state]
    unknown = sorted(set(state) - set(theirs.values()))
    if missing or unknown:
        raise OfficialKeyError(missing, unknown, "AlignGAN checkpoint")
    for name, tensor in wanted.items():
        found = state[theirs[name]]
        if found.shape != tensor.shape:
            expected, got = list(tensor.shape), list(found.shape)
            raise ValueError(f"{theirs[name]}: expected shape {expected}, got {got}")
    return {name: state[key] for name, key in theirs.items()}, []


def to_official(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The eight official state dicts from ours, in the official order, keys after "<index>/".

    Args:
        state: of an `AlignGAN` with the networks of its options.
        base: not needed: every official entry is one of ours.
    Returns:
        The official state dict; entries share storage with `state`.
    Raises:
        OfficialKeyError: `state` is not of such a network.
        ValueError: a shape does not fit.
    """
    unknown = [name for name in state if name.partition(".")[0] not in NETWORKS]
    if unknown:
        raise OfficialKeyError((), unknown, "AlignGAN")
    named = {official_name(name): tensor for name, tensor in state.items()}
    from_official(named)
    return dict(sorted(named.items(), key=lambda entry: int(entry[0].partition("/")[0])))


def _network(state: Mapping[str, Tensor]) -> AlignGAN:
    """The network that an official state dict seems to belong to, without storage."""
    first = state.get("0/module.model.0.weight")
    last = state.get("7/module.classifier0.classifier.0.bias")
    blocks = {key.split(".")[2] for key in state if key.startswith("0/") and key.count(".") == 5}
    names = [key for key in state if key.startswith("6/module.resnet_conv.")]
    depth = 50
    if names and not any(".conv3." in name for name in names):
        depth = 34 if any(".6.5." in name for name in names) else 18
    layers = sum(key.startswith("2/module.model.") and key.endswith(".bias") for key in state) - 1
    embedding = state.get("7/module.embedder0.bias")
    options = AlignGANOptions(
        depth=depth,  # type: ignore[arg-type]
        weights="none",
        conv_dim=64 if first is None else len(first),
        residual_blocks=len(blocks) or 4,
        discriminator_layers=layers if layers > 0 else 4,
        embedding=256 if embedding is None else len(embedding),
    )
    with torch.device("meta"):
        return AlignGAN(1 if last is None else len(last), options)
