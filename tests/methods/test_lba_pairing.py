"""Partners: properties of every draw, row orders, errors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreid_vi.methods.lba.pairing import (
    Arrangement,
    arrange,
    check_paired,
    draw_pairs,
    paired_arrangement,
)
from tests.methods.lba_cases import miniature, paired_batch, shuffled


@pytest.fixture(autouse=True)
def _python_state() -> Iterator[None]:
    state = random.getstate()
    yield
    random.setstate(state)


@settings(max_examples=40, deadline=None)
@given(
    identities=st.integers(2, 7),
    images=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    rng=st.sampled_from(["own", "python"]),
    pairing=st.sampled_from(["cross", "same"]),
    mixed=st.booleans(),
)
def test_partners(
    identities: int, images: int, seed: int, rng: Any, pairing: Any, mixed: bool
) -> None:
    images = min(images, identities - 1)
    generator = torch.Generator().manual_seed(seed)
    random.seed(seed)
    count = identities * images
    labels = torch.randperm(50, generator=generator)[:identities].repeat_interleave(images)
    labels, modality = labels.repeat(2), torch.arange(2 * count) // count
    arrangement = paired_arrangement(2 * count, images)
    assert (arrangement.identities, arrangement.images) == (identities, images)
    if mixed:
        order = torch.randperm(2 * count, generator=generator)
        labels, modality = labels[order], modality[order]
        arrangement = arrange(labels, modality)
    positive, negative = draw_pairs(arrangement, pairing=pairing, rng=rng, generator=generator)
    assert positive.dtype == negative.dtype == torch.int64
    # Everybody is somebody's positive partner once; identities and modalities are right.
    assert sorted(positive.tolist()) == list(range(2 * count))
    assert torch.equal(labels[positive], labels)
    wanted = modality if pairing == "same" else 1 - modality
    assert torch.equal(modality[positive], wanted)
    assert torch.equal(modality[negative], wanted)
    assert bool((labels[negative] != labels).all())
    for identity in set(labels.tolist()):
        for side in (0, 1):
            rows = (labels == identity) & (modality == side)
            assert len(set(labels[negative[rows]].tolist())) == images


@pytest.mark.parametrize("rng", ["own", "python"])
def test_negative_images_of_an_identity_have_all_numbers(rng: Any) -> None:
    for _ in range(20):
        _, negative = draw_pairs(Arrangement(5, 3), rng=rng)
        numbers = (negative % 3).reshape(2, 5, 3).sort(2).values
        assert torch.equal(numbers, torch.arange(3).expand(2, 5, 3))


@pytest.mark.parametrize("rng", ["own", "python"])
def test_every_partner_is_equally_likely(rng: Any) -> None:
    random.seed(0)
    generator = torch.Generator().manual_seed(0)
    draws = [draw_pairs(Arrangement(3, 2), rng=rng, generator=generator) for _ in range(3000)]
    positive = torch.bincount(torch.stack([d.positive[2] for d in draws]), minlength=12)
    negative = torch.bincount(torch.stack([d.negative[2] for d in draws]), minlength=12)
    assert positive[[8, 9]].sum() == 3000
    assert negative[[6, 7, 10, 11]].sum() == 3000
    assert int((positive[[8, 9]] - 1500).abs().max()) < 150  # 5 deviations
    assert int((negative[[6, 7, 10, 11]] - 750).abs().max()) < 120


def test_draws_come_from_the_generator_alone() -> None:
    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(draw_pairs(Arrangement(6, 4), generator=generator)).tolist()

    before = torch.get_rng_state()
    assert drawn(3) == drawn(3) != drawn(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    one = draw_pairs(Arrangement(6, 4))
    torch.manual_seed(9)
    two = draw_pairs(Arrangement(6, 4))
    assert torch.equal(one.negative, two.negative)
    assert not torch.equal(draw_pairs(Arrangement(6, 4)).negative, two.negative)


@pytest.mark.parametrize("rng", ["own", "python"])
def test_too_few_identities(rng: Any) -> None:
    with pytest.raises(ValueError, match=r"identities: expected at least 5 in a batch .* got 4"):
        draw_pairs(Arrangement(4, 4), rng=rng)
    with pytest.raises(ValueError, match=r"identities: expected at least 1 in a batch .* got 0"):
        draw_pairs(arrange(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)))


def test_arrange_names_who_cannot_be_paired() -> None:
    labels, modality = torch.tensor([3, 3, 5, 5, 5]), torch.tensor([0, 1, 0, 1, 1])
    with pytest.raises(ValueError, match="got 1 visible and 2 infrared of label 5"):
        arrange(labels, modality)
    labels, modality = torch.tensor([3, 3, 5, 5, 5, 5]), torch.tensor([0, 1, 0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"2 infrared of label 5, 1 visible of label 3"):
        arrange(labels, modality)
    with pytest.raises(ValueError, match="got 2 visible and 0 infrared of label 3"):
        arrange(torch.tensor([3, 3]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="labels: expected an identity of every image"):
        arrange(torch.tensor([-1, 3]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="modality: expected 0 or 1, got other values"):
        arrange(torch.tensor([3, 3]), torch.tensor([0, 2]))


def test_a_broken_promise_is_named() -> None:
    batch = paired_batch()
    labels, modality = batch.labels, batch.modality
    check_paired(labels, modality, 2)
    swapped = labels.clone()
    swapped[[8, 10]] = labels[[10, 8]]
    repeated = labels.clone()
    repeated[[0, 1, 8, 9]] = labels[2]
    for broken in ((swapped, modality), (repeated, modality), (labels, 1 - modality)):
        with pytest.raises(ValueError, match="paired=2 expects rows"):
            check_paired(*broken, 2)
    with pytest.raises(ValueError, match="paired=3 expects a multiple of 6 rows, got 16"):
        check_paired(labels, modality, 3)
    network = miniature()
    with pytest.raises(ValueError, match="paired=2 expects rows"):
        network.training_step(batch._replace(labels=swapped))
    mixed, _ = shuffled(batch)
    with pytest.raises(ValueError, match="paired=2 expects rows"):
        miniature(align="none").training_step(mixed._replace(paired=2))
