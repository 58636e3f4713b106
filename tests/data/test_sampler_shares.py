"""Each of several processes reads its share of every batch."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreid_vi.data import make_sampler
from fastreid_vi.data.sampler import SAMPLERS


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(SAMPLERS)),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from((2, 4, 6)),
    st.integers(0, 2),
)
def test_union_and_layout(name, world, each, images, pixels_each):
    p, pixels = each * world, pixels_each * world if name == "uniform" else 0
    labels, modality = np.repeat(np.arange(13), 6), np.tile([0, 1], 39)
    arguments = {"images": images, "seed": 3, "pixel_identities": pixels, "batches": 5}
    whole = make_sampler(name, labels, modality, identities=p, **arguments)
    parts = []
    for rank in range(world):
        part = make_sampler(name, labels, modality, identities=p, **arguments)
        part.shard(rank, world)
        parts.append(part)
    slots = np.concatenate([part.slots for part in parts])
    assert sorted(slots.tolist()) == list(range(whole.plan().shape[1]))
    k = images // 2
    for batch, *shares in zip(whole, *parts, strict=True):
        for rank, rows in enumerate(shares):
            found, one = np.array(rows), np.array(batch)
            # By hand: identities rank * each .. of every block.
            expected = []
            blocks = [(0, p), (2 * p * k, pixels)] if name == "uniform" else [(0, p)]
            for start, count in blocks:
                block = one[start : start + 2 * count * k]
                if name in ("norm_triplet", "identity_random"):
                    by_identity = block.reshape(count, images)
                    expected.append(by_identity[rank * each : (rank + 1) * each].ravel())
                else:
                    share = count // world
                    halves = block.reshape(2, count, k)
                    expected.append(halves[:, rank * share : (rank + 1) * share].ravel())
            np.testing.assert_array_equal(found, np.concatenate(expected))


def test_a_saved_cursor_fits_any_number_of_processes():
    labels, modality = np.repeat(np.arange(8), 6), np.tile([0, 1], 24)

    def sampler(rank, world):
        made = make_sampler("paired_identity", labels, modality, identities=4, images=2, seed=1)
        made.shard(rank, world)
        return made

    first = sampler(1, 4)
    next(batches := iter(first))
    next(batches)
    state = json.loads(json.dumps(first.state_dict()))
    alone = sampler(0, 1)
    alone.load_state_dict(state)
    assert alone.cursor == 2
    np.testing.assert_array_equal(list(alone), alone.plan()[2:])
    assert len(alone) == len(first)


def test_refusals():
    labels, modality = np.repeat(np.arange(8), 6), np.tile([0, 1], 24)
    arguments = {"images": 2, "seed": 1, "identities": 6}
    sampler = make_sampler("paired_identity", labels, modality, **arguments)
    with pytest.raises(
        ValueError, match="identities: expected a multiple of the 4 processes, got 6"
    ):
        sampler.shard(0, 4)
    for rank, world in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank: expected 0 to {world - 1}, got {rank}"):
            sampler.shard(rank, world)
    uniform = make_sampler("uniform", labels, modality, **arguments, pixel_identities=3)
    with pytest.raises(ValueError, match="pixel_identities: expected a multiple of the 2"):
        uniform.shard(0, 2)
