"""MPANet: both sides of every quirk, bad batches, laws."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastreid_vi.config import Batch
from fastreid_vi.methods import base
from fastreid_vi.methods.mpanet import MPANet, MPANetOptions
from fastreid_vi.methods.mpanet.losses import Outputs, center_cluster, mutual_mean_learning
from tests.methods.mpanet_cases import losses_of, moved, small, small_batch

# Quirks: both sides of every option.


def test_total_is_the_weighted_sum() -> None:
    """Also M4 (sid_weight 1.0 or 0.5) and M20 (the YAML's weights)."""
    weights = {"sep_weight": 0.3, "cc_weight": 1.7, "sid_weight": 0.5, "kl_weight": 0.9}
    for options in ({}, weights, dict.fromkeys(weights, 0.0)):
        found = losses_of(small(**options).double(), small_batch())
        o = MPANetOptions(**options)
        expected = (
            o.sep_weight * found["separation"]
            + o.cc_weight * found["center_cluster"]
            + found["identity"]
            + o.sid_weight * (found["visible_identity"] + found["infrared_identity"])
            + o.kl_weight * found["divergence"]
        )
        assert found["total"] == pytest.approx(expected, rel=1e-12)
    default = MPANetOptions()
    assert (default.sep_weight, default.cc_weight) == (0.5, 1.0)
    assert (default.sid_weight, default.kl_weight, default.update_rate) == (1.0, 2.5, 0.2)


def test_sep_normalize_divides_by_positions() -> None:
    raw = losses_of(small().double(), small_batch())["separation"]
    normalised = losses_of(small(sep_normalize=True).double(), small_batch())["separation"]
    assert normalised == pytest.approx(raw / 12, rel=1e-12)


def test_kl_direction() -> None:
    shared = small().double()
    for classifier in (shared.visible_classifier_, shared.infrared_classifier_):
        torch.nn.init.normal_(classifier.weight)
    other = small(kl_direction="teacher_student").double()
    other.load_state_dict(shared.state_dict())
    batch = small_batch()
    one, two = (losses_of(copy.deepcopy(n), batch) for n in (shared, other))
    assert one["divergence"] != pytest.approx(two["divergence"], rel=1e-3)
    assert one["visible_identity"] == two["visible_identity"]
    patterns = shared.align(batch.images)
    shared.update_means()
    neck = shared.bn_neck(patterns.embeddings)
    total = {"student_teacher": 0.0, "teacher_student": 0.0}
    for row, infrared in enumerate(batch.modality.tolist()):
        sides = ("infrared", "visible") if infrared else ("visible", "infrared")
        student = shared.get_submodule(f"{sides[0]}_classifier")(neck[row]).softmax(0)
        teacher = shared.get_submodule(f"{sides[1]}_classifier_")(neck[row]).softmax(0)
        total["student_teacher"] += float((student * (student / teacher).log()).sum().detach())
        total["teacher_student"] += float((teacher * (teacher / student).log()).sum().detach())
    assert one["divergence"] == pytest.approx(total["student_teacher"] / 12, rel=1e-9)
    assert two["divergence"] == pytest.approx(total["teacher_student"] / 12, rel=1e-9)


def test_means_move_before_the_loss() -> None:
    network = small().double()
    before = moved(network)
    network.training_step(small_batch())
    for side in ("visible", "infrared"):
        student, mean = before[f"{side}_classifier.weight"], before[f"{side}_classifier_.weight"]
        now = network.get_parameter(f"{side}_classifier_.weight")
        torch.testing.assert_close(now.detach(), 0.8 * mean + 0.2 * student)
        network.after_step()
        torch.testing.assert_close(now.detach(), 0.8 * mean + 0.2 * student)


def test_means_move_after_the_step() -> None:
    network = small(ema_update="after_step").double()
    before = moved(network)
    network.training_step(small_batch())
    name = "visible_classifier_.weight"
    assert torch.equal(network.get_parameter(name), before[name])
    after = moved(network)
    network.after_step()
    expected = 0.8 * before[name] + 0.2 * after["visible_classifier.weight"]
    torch.testing.assert_close(network.get_parameter(name).detach(), expected)


def test_the_update_matters_to_the_same_batch() -> None:
    """M6: the teacher of this batch already holds the current students."""
    early, late = small().double(), small(ema_update="after_step").double()
    moved(early)
    late.load_state_dict(early.state_dict())
    batch = small_batch()
    one, two = losses_of(early, batch)["divergence"], losses_of(late, batch)["divergence"]
    assert one != pytest.approx(two, rel=1e-3)


def test_evaluation_mode_leaves_the_means_alone() -> None:
    network = small().double()
    before = moved(network)
    network.eval().training_step(small_batch())
    name = "infrared_classifier_.weight"
    assert torch.equal(network.get_parameter(name), before[name])


def test_update_rate_falls_after_epoch_99() -> None:
    network = small(update_rate=0.5)
    for epoch, rate in ((1, 0.5), (99, 0.5), (100, 50 / 101), (140, 50 / 141)):
        network.begin_epoch(epoch)
        assert network.update_rate == pytest.approx(rate)
    with pytest.raises(ValueError, match="epoch: expected >= 1, got 0"):
        network.begin_epoch(0)


def test_center_cluster_options_reach_the_loss() -> None:
    repeated_anchors = small_batch(labels=(2, 4, 0, 2, 2, 4, 2, 4, 0, 4, 0, 0))
    pairs = losses_of(small(margin=5.0).double(), repeated_anchors)["center_cluster"]
    rows = losses_of(small(margin=5.0, cc_mode="rows").double(), repeated_anchors)["center_cluster"]
    assert pairs != pytest.approx(rows, rel=1e-6)
    twin = small_batch(labels=(2, 2, 4, 4, 0, 0), modality=(1, 0, 1, 0, 1, 0))
    twin.images[1] = twin.images[0]
    for safe in (True, False):
        network = small(cc_safe=safe).double()
        images = twin.images.clone().requires_grad_()
        network.training_step(twin._replace(images=images)).total.backward()
        assert bool(images.grad.isfinite().all()) == safe


def test_expanded_distances_lose_digits_in_float32() -> None:
    """M3: two centres 0.5 apart with a norm of 70."""
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(1, 14336, generator=generator, dtype=torch.float64)
    away = torch.randn(1, 14336, generator=generator, dtype=torch.float64)
    x = torch.cat((center, center + 0.5 * away / away.norm())).float()
    labels = torch.tensor([0, 1])
    exact = float(center_cluster(x.double(), labels).push)
    near, far = (float(center_cluster(x, labels, expand=e).push) for e in (False, True))
    assert near == pytest.approx(exact, rel=1e-5)
    assert far == pytest.approx(exact, rel=0.05)
    assert abs(far - exact) > 100 * abs(near - exact)


def test_rows_need_a_rectangular_batch() -> None:
    with pytest.raises(ValueError, match="got 5 rows of 2 identities"):
        center_cluster(torch.rand(5, 3), torch.tensor([0, 0, 1, 1, 1]), mode="rows")


# Bad batches.


@pytest.mark.parametrize(("value", "absent"), [(0, "infrared"), (1, "visible")])
def test_a_missing_modality_is_an_error(value: int, absent: str) -> None:
    """M13."""
    batch = small_batch()
    one_sided = batch._replace(modality=torch.full_like(batch.modality, value))
    with pytest.raises(ValueError, match=f"expected images of both modalities, got no {absent}"):
        small().double().training_step(one_sided)


@pytest.mark.parametrize(("value", "absent"), [(0, "infrared"), (1, "visible")])
def test_a_missing_modality_adds_nothing_where_values_are_not_read(
    value: int, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_values_are_read", lambda tensor: False)  # as on CUDA
    batch = small_batch()
    one_sided = batch._replace(modality=torch.full_like(batch.modality, value))
    network = small().double()
    losses = network.training_step(one_sided)
    losses.total.backward()
    assert float(losses.terms[f"{absent}_identity"].detach()) == 0.0
    gradient = network.get_parameter(f"{absent}_classifier.weight").grad
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert bool(losses.total.isfinite())


def test_bad_batches_are_named() -> None:
    network, batch = small().double(), small_batch()
    with pytest.raises(ValueError, match="labels: expected values from -1 to 4, got 5"):
        network.training_step(batch._replace(labels=batch.labels + 1))
    with pytest.raises(ValueError, match="labels: expected values from -1 to 4, got -2"):
        network.training_step(batch._replace(labels=batch.labels - 2))
    with pytest.raises(TypeError, match=r"labels: expected int64 of shape \[12\], got float32"):
        network.training_step(batch._replace(labels=batch.labels.float()))
    with pytest.raises(ValueError, match="phase: expected one of main, got 'generator'"):
        network.training_step(batch, "generator")
    with pytest.raises(ValueError, match="modality: expected values from 0 to 1, got 2"):
        network.training_step(batch._replace(modality=batch.modality * 2))


def test_ignored_labels_are_left_out_of_identity_losses() -> None:
    network, batch = small().double().eval(), small_batch()
    labels = batch.labels.clone()
    labels[[1, 2]] = -1
    found = losses_of(network, batch._replace(labels=labels))
    neck = network.bn_neck(network.align(batch.images).embeddings)
    kept = labels >= 0
    for name, rows in (
        ("identity", kept),
        ("visible_identity", kept & (batch.modality == 0)),
        ("infrared_identity", kept & (batch.modality == 1)),
    ):
        classifier = name.replace("_identity", "_classifier").replace("identity", "classifier")
        logits = network.get_submodule(classifier)(neck[rows])
        expected = float(F.cross_entropy(logits, labels[rows]).detach())
        assert found[name] == pytest.approx(expected, rel=1e-9)


# Laws.


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), p=st.integers(2, 5), k=st.integers(1, 4))
def test_pairs_equal_rows_and_ignore_order(seed: int, p: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(p * k, 6, generator=generator, dtype=torch.float64)
    labels = torch.randperm(50, generator=generator)[:p].repeat_interleave(k)
    pairs = center_cluster(x, labels)
    for options in ({"mode": "rows"}, {"expand": True}, {"safe": k == 1}):
        torch.testing.assert_close(center_cluster(x, labels, **options), pairs)
    order = torch.randperm(p * k, generator=generator)
    torch.testing.assert_close(center_cluster(x[order], labels[order]), pairs)


def test_divergence_is_zero_when_all_classifiers_agree() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    outputs = Outputs(logits, logits, logits, logits, logits, logits, logits)
    labels, modality = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1] * 3)
    for direction in ("student_teacher", "teacher_student"):
        found = mutual_mean_learning(outputs, labels, modality, direction)
        assert float(found.divergence) == 0.0


def test_the_scheduled_rate_is_the_one_used() -> None:
    network = small().double()
    network.begin_epoch(140)
    before = moved(network)
    network.training_step(small_batch())
    u = 20 / 141
    for side in ("visible", "infrared"):
        student, mean = before[f"{side}_classifier.weight"], before[f"{side}_classifier_.weight"]
        now = network.get_parameter(f"{side}_classifier_.weight").detach()
        torch.testing.assert_close(now, (1 - u) * mean + u * student)


def test_rate_one_copies_the_students() -> None:
    network = small(update_rate=1.0)
    moved(network)
    network.update_means()
    assert torch.equal(network.visible_classifier_.weight, network.visible_classifier.weight)
    assert torch.equal(network.infrared_classifier_.weight, network.infrared_classifier.weight)


def test_full_maps_pool_to_the_mean_and_overlap_everywhere() -> None:
    network = small(parts=4).double()
    with torch.no_grad():
        network.spatial_attention.weight.zero_()
        network.spatial_attention.bias.fill_(60.0)  # sigmoid is 1 in double
    patterns = network.align(small_batch().images)
    blocks = patterns.embeddings.view(12, 5, 8)
    torch.testing.assert_close(blocks, blocks[:, 4:].expand_as(blocks))
    found = losses_of(network, small_batch())
    assert found["separation"] == pytest.approx(12.0)


def test_row_order_does_not_matter() -> None:
    batch = small_batch()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    mixed = Batch(*(tensor[order] for tensor in batch[:4]))
    one, two = losses_of(small().double(), batch), losses_of(small().double(), mixed)
    assert one == pytest.approx(two, rel=1e-10)


def test_options_are_checked() -> None:
    for options, message in (
        ({"cc_mode": "columns"}, "cc_mode: expected one of 'pairs', 'rows', got 'columns'"),
        ({"depth": 101}, "depth: expected one of 18, 34, 50, got 101"),
        ({"parts": 0}, "parts: expected >= 1, got 0"),
        ({"margin": 0.0}, "margin: expected > 0, got 0"),
        ({"kl_weight": -1.0}, "kl_weight: expected >= 0, got -1"),
        ({"update_rate": 1.5}, "update_rate: expected 0 to 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(MPANetOptions(), **options)
    with pytest.raises(ValueError, match="num_ids: expected >= 1, got 0"):
        MPANet(0)
