"""Samplers that replay the released draws, index by index."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from fastreid_vi.certify.cases import Check, Procedure, compare, exact
from fastreid_vi.certify.vectors import Array, Golden
from fastreid_vi.config import INFRARED, VISIBLE
from fastreid_vi.data import make_sampler
from fastreid_vi.data.plan import IdentitySampler
from fastreid_vi.data.sampler import Uniform
from fastreid_vi.data.streams import draw_images, shuffled

_SHARED = (  # method, our sampler, golden sequence of eval/samplers
    ("mpanet", "identity_random", "mpanet_identity_random"),
    ("mpanet", "norm_triplet", "mpanet_norm_triplet"),
    ("mpanet", "identity_uniform", "mpanet_identity_uniform"),
    ("mpanet", "random", "mpanet_random"),
    ("mcja", "identity_cross_modality", "mcja_identity_cross_modality"),
    ("mcja", "norm_triplet", "mcja_norm_triplet"),
    ("mcja", "cross_modality_identity", "mcja_cross_modality_identity"),
    ("mcja", "cross_modality_random", "mcja_cross_modality_random"),
)


def procedures() -> Iterator[Procedure]:
    """One procedure for every stored sequence."""
    runs: list[tuple[str, str, Any]] = [
        (owner, f"eval/samplers {stored}", partial(_shared, name, stored))
        for owner, name, stored in _SHARED
    ]
    runs += [("mpanet", "mpanet/sampler_schedule, sampler", _mpanet)]
    runs += [
        ("baseline", "eval/samplers agw", _agw),
        ("lba", "lba/sampler_schedule, sampler", _lba),
    ]
    runs += [
        ("mcja", f"mcja/sampler_metrics {case}", partial(_mcja, case)) for case in ("a", "short")
    ]
    runs += [("aligngan", "eval/samplers align", _uniform)]
    runs += [
        ("aligngan", f"aligngan/sampler_evaluation {side}", partial(_passes, side))
        for side in ("rgb", "ir")
    ]
    for owner, name, run in runs:
        yield Procedure(owner=owner, name=name, run=run, dtypes=("float64",), devices=("cpu",))


def _flat(sampler: IdentitySampler, epoch: int = 1) -> Array:
    sampler.set_epoch(epoch)
    return sampler.plan().ravel()


def _infrared(cams: Array) -> Array:
    found: Array = np.where(np.isin(cams, (3, 6)), INFRARED, VISIBLE)
    return found


def _same(name: str, got: Any, want: Any) -> Check:
    return compare(name, "forward", got, exact(want), torch.float64)


def _shared(
    name: str, stored: str, golden: Golden, dtype: torch.dtype, device: str
) -> Iterator[Check]:
    """Two epochs of one stream; the released loaders leave an incomplete last batch out."""
    v = golden.load("eval/samplers")
    p, k = int(v["P"]), int(v["K"])
    sampler = make_sampler(
        name,
        v["ids"],
        _infrared(v["cams"]),
        identities=p,
        images=k,
        seed=int(v["np_seed"]),
        replay=True,
    )
    for epoch, suffix in ((1, ""), (2, "_epoch2")):
        want = v[stored + suffix]
        whole = len(want) // (p * k) * (p * k)
        yield _same(f"epoch {epoch}", _flat(sampler, epoch), want[:whole])


def _mpanet(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("mpanet/sampler_schedule")
    p, k = int(v["p_size"]), int(v["k_size"])
    sampler = make_sampler(
        "identity_random",
        v["ids"],
        _infrared(v["cam_ids"]),
        identities=p,
        images=k,
        seed=int(v["numpy_seed"]),
        replay=True,
    )
    yield _same("indices", _flat(sampler), v["indices"])
    yield _same("length", len(sampler) * p * k, v["length_after"])


def _agw(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("eval/samplers")
    fields = ("color_labels", "thermal_labels", "batch", "num_pos", "index1", "index2")
    yield from _paired([v[f"agw_{field}"] for field in fields], int(v["np_seed"]))


def _lba(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.load("lba/sampler_schedule")
    fields = ("color_label", "thermal_label", "ids_per_batch", "num_pos", "index1", "index2")
    yield from _paired([v[field] for field in fields], int(v["numpy_seed"]))


def _paired(arrays: list[Array], seed: int) -> Iterator[Check]:
    visible, infrared, p, k, first, second = arrays
    sampler = make_sampler(
        "paired_identity",
        np.concatenate([visible, infrared]),
        np.repeat([VISIBLE, INFRARED], [len(visible), len(infrared)]),
        identities=int(p),
        images=2 * int(k),
        seed=seed,
        replay=True,
    )
    rows = _flat(sampler).reshape(-1, 2, int(p) * int(k))
    yield _same("visible", rows[:, 0].ravel(), first)
    yield _same("infrared", rows[:, 1].ravel() - len(visible), second)


def _mcja(case: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    v = golden.case("mcja/sampler_metrics", case)
    p, k = v["PK"].tolist()
    sampler = make_sampler(
        "norm_triplet",
        v["ids"],
        np.zeros_like(v["ids"]),  # it does not look at modalities
        identities=p,
        images=k,
        seed=int(v["seed"]),
        replay=True,
    )
    for epoch in (1, 2):
        yield _same(f"epoch {epoch}", _flat(sampler, epoch), v[f"epoch{epoch - 1}"])


def _uniform(golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    """One pass of both modalities, all identities in a batch."""
    v = golden.load("eval/samplers")
    visible, infrared = v["agw_color_labels"], v["agw_thermal_labels"]
    count = len(np.unique(visible))
    half = len(v["align_iter_rgb"]) // count
    sampler = Uniform(
        np.concatenate([visible, infrared]),
        np.repeat([VISIBLE, INFRARED], [len(visible), len(infrared)]),
        identities=count,
        images=2 * half,
        seed=int(v["np_seed"]),
        replay=True,
        seeds=v["align_seeds"].tolist(),
    )
    rows = _flat(sampler).reshape(-1, 2, count * half)
    yield _same("visible", rows[:, 0].ravel(), v["align_iter_rgb"])
    yield _same("infrared", rows[:, 1].ravel() - len(visible), v["align_iter_ir"])


def _passes(side: str, golden: Golden, dtype: torch.dtype, device: str) -> Iterator[Check]:
    """Two passes of one modality; a first one is drawn at construction."""
    v = golden.case("aligngan/sampler_evaluation", "a")
    labels, seeds = v[f"{side}_pids"], v["seeds"].tolist()
    members = {int(c): np.flatnonzero(labels == c) for c in np.unique(labels)}
    random = np.random.RandomState(int(v["np_seed"]))
    drawn = [
        draw_images(random, members, shuffled(members, seeds, number), int(v["k"]))
        for number in range(3)
    ]
    for number in (0, 1):
        yield _same(f"pass {number}", drawn[number + 1].ravel(), v[f"{side}_pass{number}"])
