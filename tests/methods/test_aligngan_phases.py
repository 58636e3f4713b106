"""AlignGAN: phases and the fakes they hand on, batches, quirks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastreid_vi.config import INFRARED, Batch
from fastreid_vi.methods import base
from tests.methods.aligngan_cases import (
    JOINT,
    OWN,
    STAGES,
    backward,
    buffers,
    moved,
    names_of,
    paired_batch,
    small,
    untrained,
    values,
)


def shuffled(batch: Batch, seed: int = 1) -> Batch:
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(seed))
    return Batch(*(tensor[order] for tensor in batch[:4]))


# Phases.


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s[0])
def test_gradients_reach_the_networks_of_the_phase(stage: tuple[str, ...]) -> None:
    network, batch = small(), paired_batch()
    for phase in stage:
        assert {p.partition(".")[0] for p in names_of(network, phase)} == OWN[phase]
        backward(network, batch, phase)
        given = {n for n, p in network.named_parameters() if p.grad is not None}
        assert given == {n for n in names_of(network, phase) if n not in untrained(network)}
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())


def test_running_statistics_that_a_phase_moves() -> None:
    network, batch = small(), paired_batch()
    expected = {
        "feature_warmup": {"backbone", "embedder"},
        "feature": {"visible_to_infrared", "backbone", "embedder"},
        "generators": {"visible_to_infrared", "infrared_to_visible", "backbone", "embedder"},
        "d_rgb": set(),
        "d_ir": set(),
    }
    for phase, names in expected.items():
        before = buffers(network)
        network(batch, phase)
        assert moved(before, network) == names, phase
    assert int(network.visible_to_infrared.model[1].num_batches_tracked) == 0


def test_discriminators_need_the_generators_first() -> None:
    network, batch = small(), paired_batch()
    for phase in ("d_rgb", "d_ir", "d_rgb_warmup", "d_ir_warmup"):
        generators = "generators_warmup" if phase.endswith("warmup") else "generators"
        message = f"phase '{phase}': expected the phase '{generators}' on"
        with pytest.raises(RuntimeError, match=message):
            network(batch, phase)
    network(batch, "generators")
    with pytest.raises(RuntimeError, match="phase 'd_rgb_warmup': expected"):
        network(batch, "d_rgb_warmup")  # of another stage
    with pytest.raises(RuntimeError, match="'generators' on the same batch"):
        network(paired_batch(seed=9), "d_rgb")
    network(batch, "d_rgb")
    with pytest.raises(RuntimeError, match="phase 'd_rgb'"):
        network(batch, "d_rgb")
    network(batch, "d_ir")
    with pytest.raises(RuntimeError, match="phase 'd_ir'"):
        network(batch, "d_ir")
    network(batch, "generators")
    network.begin_epoch(2)
    with pytest.raises(RuntimeError, match="phase 'd_rgb'"):
        network(batch, "d_rgb")


def test_discriminators_see_fakes_from_before_the_generators_step() -> None:
    network, batch = small(dropout=0.0), paired_batch()
    one = copy.deepcopy(network)
    for phase in JOINT[1:]:
        expected = values(one, batch, phase)
        assert values(network, batch, phase) == pytest.approx(expected), phase
        if phase == "generators":
            for generator in (network.visible_to_infrared, network.infrared_to_visible):
                with torch.no_grad():
                    for p in generator.parameters():
                        p.add_(0.1 * torch.randn_like(p))


def test_several_batches_may_be_under_way() -> None:
    network, batches = small(dropout=0.0), [paired_batch(seed=s) for s in (1, 2)]
    expected = []
    for batch in batches:
        one = copy.deepcopy(network)
        expected.append([values(one, batch, phase) for phase in JOINT[1:]][1:])
    for batch in batches:
        network(batch, "generators")
    for phase, column in zip(("d_rgb", "d_ir"), zip(*expected, strict=True), strict=True):
        for batch, value in zip(batches, column, strict=True):
            assert values(network, batch, phase) == pytest.approx(value)


def test_an_interrupted_iteration_leaves_nothing() -> None:
    network = small()
    first, second, third = (paired_batch(seed=s) for s in (1, 2, 3))
    network(first, "generators")
    network(second, "generators")
    network(second, "d_rgb")
    network(second, "d_ir")
    network(third, "generators")
    with pytest.raises(RuntimeError, match="phase 'd_rgb'"):
        network(first, "d_rgb")
    assert "_fakes" not in network.state_dict()


# Batches.


def test_phases_share_the_loaders_batch() -> None:
    network = small(num_ids=9, pixel_images=8)
    feature, pixel = paired_batch(ids=3), paired_batch(ids=2, seed=4)
    whole = Batch(*(torch.cat(pair) for pair in zip(feature[:4], pixel[:4], strict=True)), 2)
    for phase in network.phases:
        expected = feature if phase.startswith("feature") else pixel
        found = network.phase_batch(whole, phase)
        assert found.paired == 2
        assert all(torch.equal(a, b) for a, b in zip(found[:4], expected[:4], strict=True))
    unknown = whole._replace(paired=0)
    assert network.phase_batch(unknown, "generators") is unknown
    assert small(pixel_images=0).phase_batch(whole, "d_ir") is whole
    with pytest.raises(ValueError, match="pixel_images: expected fewer than the 8 rows"):
        network.phase_batch(pixel, "generators")
    with pytest.raises(ValueError, match="pixel_images: expected a multiple of 6"):
        network.phase_batch(whole._replace(paired=3), "generators")


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s[0])
def test_rows_may_come_in_any_order(stage: tuple[str, ...]) -> None:
    one = small(dropout=0.0).double()
    two = copy.deepcopy(one)
    batch = paired_batch(k=1)
    batch = batch._replace(images=batch.images.double())
    other = shuffled(batch)
    for phase in stage:
        assert values(one, batch, phase) == pytest.approx(values(two, other, phase)), phase


def test_batches_that_do_not_fit() -> None:
    network, batch = small(), paired_batch()
    infrared = Batch(*(tensor[batch.modality == INFRARED] for tensor in batch[:4]))
    network(infrared, "feature_warmup")
    with pytest.raises(
        ValueError, match="modality: expected images of both modalities, got no vis"
    ):
        network(infrared, "feature")
    with pytest.raises(ValueError, match="as many visible as infrared rows, got 8 and 7"):
        network(batch.rows(0, 15), "generators")
    with pytest.raises(ValueError, match=r"expected a multiple of 4 rows \(paired=2\), got 15"):
        network(batch.rows(0, 15, paired=2), "generators")
    with pytest.raises(ValueError, match=r"phase: expected one of feature_warmup, .*, got 'main'"):
        network(batch)
    with pytest.raises(ValueError, match="labels: expected values from -1 to 3, got 4"):
        network(batch._replace(labels=batch.labels + 1), "feature")
    with pytest.raises(ValueError, match="images: expected height and width divisible by 4"):
        network(paired_batch(size=(66, 64)), "generators")
    with pytest.raises(ValueError, match="images: expected more than one position after 5"):
        network(paired_batch(size=(32, 32)), "generators")
    alone = paired_batch(ids=1)
    network(alone, "generators")
    with pytest.raises(ValueError, match="wrong_pair: expected images of at least two persons"):
        network(alone, "d_ir")


def test_unknown_persons_are_left_out_of_the_identity_loss() -> None:
    network, batch = small(dropout=0.0), paired_batch()
    nobody = batch._replace(labels=torch.full_like(batch.labels, base.IGNORED))
    assert values(network, nobody, "feature")["identity_real"] == 0.0
    some = nobody._replace(labels=torch.where(torch.arange(16) == 8, 1, -1))
    losses = backward(network, some, "feature")
    assert float(losses.terms["identity_real"].detach()) > 0
    assert float(losses.terms["identity_fake"].detach()) == 0


# Quirks.


def test_pixel_bn() -> None:
    """A5."""
    for choice, expected in (("train", {"backbone", "embedder"}), ("eval", set())):
        network, batch = small(pixel_bn=choice), paired_batch()
        before = buffers(network)
        network(batch, "generators_warmup")
        generators = {"visible_to_infrared", "infrared_to_visible"}
        assert moved(before, network) == expected | generators
        assert all(m.training for m in network.modules())
        assert moved(buffers(network), network) == set()
        before = buffers(network)
        network(batch, "feature")
        assert {"backbone", "embedder"} <= moved(before, network)


def test_bn_split() -> None:
    """A6: every quarter by itself, running statistics of the first."""
    network, batch = small(bn_split=4, dropout=0.0).double(), paired_batch()
    one = small(dropout=0.0).double()
    images = batch.images.double()
    found = network.encode(images[8:])
    expected = torch.cat([one.encode(part) for part in images[8:].split(2)])
    torch.testing.assert_close(found, expected)
    one = small(dropout=0.0).double()
    one.encode(images[8:10])
    torch.testing.assert_close(network.backbone.bn.running_var, one.backbone.bn.running_var)
    assert int(network.backbone.bn.num_batches_tracked) == 1
    first, second = network.visible_to_infrared, copy.deepcopy(one.visible_to_infrared)
    network.translate(first, images)
    second(images[:4])
    torch.testing.assert_close(first.model[1].running_mean, second.model[1].running_mean)
    for stage in STAGES:
        for phase in stage:
            assert network(batch._replace(images=images), phase).total.isfinite()
    assert all(getattr(m, "track_running_stats", True) for m in first.modules())


def test_gan_pairs_and_wrong_pair() -> None:
    """A2."""
    batch, names = paired_batch(), {}
    for pairs in ("official", "own"):
        for wrong in (True, False):
            network = small(gan_pairs=pairs, wrong_pair=wrong)
            network(batch, "generators")
            terms = values(network, batch, "d_ir")
            names[pairs, wrong] = set(terms) - {"real", "total"}
            mean = sum(terms[n] for n in names[pairs, wrong]) / len(names[pairs, wrong])
            assert terms["total"] == pytest.approx((terms["real"] + mean) / 2)
    mixed = {"fake_feature", "fake_image", "fake"}
    assert names["official", True] == mixed | {"wrong_person"}
    assert names["official", False] == mixed
    assert names["own", True] == {"wrong_person", "fake"}
    assert names["own", False] == {"fake"}


def test_generators_are_judged_beside_the_feature_that_gan_pairs_names() -> None:
    seen = {}
    for pairs in ("official", "own"):
        network, batch = small(gan_pairs=pairs, dropout=0.0), paired_batch()
        shown: list[Tensor] = []
        network.infrared_discriminator.register_forward_pre_hook(
            lambda module, args, shown=shown: shown.append(args[1])
        )
        network(batch, "generators")
        (seen[pairs],) = shown
        assert not seen[pairs].requires_grad
    twin = small(dropout=0.0)
    torch.testing.assert_close(seen["official"], twin.encode(batch.images[8:]))
    fake = twin.visible_to_infrared(batch.images[:8])
    torch.testing.assert_close(seen["own"], twin.encode(fake))


def test_wrong_persons_are_the_next_ones() -> None:
    network, batch = small(), paired_batch(ids=3, k=2)
    d = network.infrared_discriminator
    network(batch, "generators")
    fakes = network._fakes.take(batch.images, "d_ir")
    network(batch, "generators")
    scores = d(batch.images[[8, 9, 10, 11, 6, 7]], fakes.real_map)
    assert values(network, batch, "d_ir")["wrong_person"] == pytest.approx(
        float(scores.detach().square().mean()), rel=1e-4
    )
