"""LbA: steps, ablations, mixed precision, no waiting for the device, resuming, overfitting."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastreid_vi import methods
from fastreid_vi.config import Batch
from fastreid_vi.methods import base
from fastreid_vi.methods.lba.pairing import Arrangement, Pairs
from fastreid_vi.train.state import random_states, restore_random_states
from tests.methods.lba_cases import losses_of, miniature, paired_batch, shuffled, tiny
from tests.processes import run_together

WORLD = 2
ROOT = Path(__file__).parents[2]


# The step.


def test_one_step_moves_every_trainable_parameter() -> None:
    network = tiny()
    before = {k: v.detach().clone() for k, v in network.named_parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = network(paired_batch(size=(64, 32)))
    losses.total.backward()
    optimizer.step()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == (name == "bottleneck.bias"), name
        assert bool(parameter.isfinite().all())


def test_total_is_the_weighted_sum() -> None:
    found = losses_of(miniature(dt_weight=0.7, ic_weight=1.5, triplet_weight=2.0), paired_batch())
    expected = (
        found["identity"]
        + 2.0 * found["triplet"]
        + 1.5 * (found["consistency3"] + found["consistency4"])
        + 0.7 * (found["dense3"] + found["dense4"])
    )
    assert found["total"] == pytest.approx(expected, rel=1e-6)
    assert 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize(
    ("align", "layer4_runs", "neck_runs", "terms"),
    [
        ("both", 2, 3, {"consistency3", "dense3", "consistency4", "dense4"}),
        ("layer3", 2, 2, {"consistency3", "dense3"}),
        ("layer4", 1, 2, {"consistency4", "dense4"}),
        ("none", 1, 1, set()),
    ],
)
def test_aligned_layers(align: str, layer4_runs: int, neck_runs: int, terms: set[str]) -> None:
    network = miniature(align=align)
    found = losses_of(network, paired_batch())
    assert set(found) - {"identity", "triplet", "accuracy", "total"} == terms
    assert int(network.get_buffer("backbone.layer4.1.num_batches_tracked")) == layer4_runs
    assert int(network.get_buffer("bottleneck.num_batches_tracked")) == neck_runs
    plain = losses_of(miniature(align="none"), paired_batch())
    # Order of the statistics: the plain map is the first that layer4 sees.
    assert found["triplet"] == plain["triplet"]


def test_baseline_is_the_identity_loss_on_any_batch() -> None:
    batch, _ = shuffled(paired_batch())
    part = Batch(*(tensor[:11] for tensor in batch[:4]))
    found = losses_of(miniature(align="none"), part)
    assert found["total"] == pytest.approx(found["identity"] + found["triplet"], rel=1e-6)
    with pytest.raises(ValueError, match="to pair them; got"):
        losses_of(miniature(), part)


def test_without_consistency_nothing_else_is_classified() -> None:
    network = miniature(ic_weight=0.0)
    found = losses_of(network, paired_batch())
    assert {"dense3", "dense4"} < set(found)
    assert not any(name.startswith("consistency") for name in found)
    assert int(network.get_buffer("backbone.layer4.1.num_batches_tracked")) == 1
    assert int(network.get_buffer("bottleneck.num_batches_tracked")) == 1


def test_partners_are_drawn_for_every_layer_and_call() -> None:
    network, seen = miniature(), []
    draw = network.draw

    def kept(arrangement: Arrangement) -> Pairs:
        seen.append(draw(arrangement))
        return seen[-1]

    network.draw = kept  # type: ignore[method-assign]
    for _ in range(2):
        network.training_step(paired_batch())
    assert len(seen) == 4
    assert len({tuple(torch.cat(pairs).tolist()) for pairs in seen}) == 4


def test_same_modality_pairs_reach_the_loss() -> None:
    cross, same = (losses_of(miniature(pairing=p), paired_batch()) for p in ("cross", "same"))
    assert cross["identity"] == same["identity"]
    assert cross["dense3"] != same["dense3"]


def test_row_order_does_not_matter() -> None:
    batch = paired_batch(dtype=torch.float64)
    mixed, order = shuffled(batch)
    one = miniature().double()
    pairs = [one.draw(Arrangement(4, 2)) for _ in range(2)]
    two = copy.deepcopy(one)
    back = torch.argsort(order)
    moved = [Pairs(back[p.positive[order]], back[p.negative[order]]) for p in pairs]
    for network, drawn in ((one, iter(pairs)), (two, iter(moved))):
        network.draw = lambda arrangement, drawn=drawn: next(drawn)  # type: ignore
    assert losses_of(one, batch) == pytest.approx(losses_of(two, mixed), rel=1e-10)


def test_ignored_labels_are_left_out_of_identity_losses() -> None:
    """-1 in the same places of both halves keeps the promise of a paired batch."""
    batch = paired_batch(dtype=torch.float64)
    labels = batch.labels.clone()
    labels[[0, 1, 8, 9]] = -1
    network = miniature().double()
    found = losses_of(network, batch._replace(labels=labels))
    logits: list[torch.Tensor] = []
    twin = miniature().double()
    twin.classifier.register_forward_hook(lambda module, args, out: logits.append(out))
    losses_of(twin, batch)
    for name, rows in zip(("consistency3", "consistency4", "identity"), logits, strict=True):
        kept = labels >= 0
        expected = torch.nn.functional.cross_entropy(rows[kept], labels[kept])
        assert found[name] == pytest.approx(float(expected.detach()), rel=1e-9)


def test_bad_batches_are_named() -> None:
    network, batch = miniature(), paired_batch()
    with pytest.raises(ValueError, match="phase: expected one of main, got 'generator'"):
        network.training_step(batch, "generator")
    with pytest.raises(ValueError, match="labels: expected values from -1 to 6, got 8"):
        network.training_step(batch._replace(labels=batch.labels + 5))
    with pytest.raises(ValueError, match="identities: expected at least 4 in a batch"):
        network.training_step(paired_batch(3, 3))


# No waiting, no loops.


def test_a_paired_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no data: reading a value, or a shape that depends on one, raises."""
    monkeypatch.setattr(base, "_values_are_read", lambda tensor: False)  # as on CUDA
    for options in ({}, {"renorm_comask": False, "dist_eps": 0.0, "dt_reduction": "sum"}):
        with FakeTensorMode():
            network = tiny(**options)
            images = torch.empty(16, 3, 64, 32)
            labels, modality, cams = torch.empty(3, 16, dtype=torch.int64)
            batch = Batch(images, labels, modality, cams, 2)
            network.training_step(batch).total.backward()
            network.after_step()
            with pytest.raises(DataDependentOutputException):  # the documented exception
                network.training_step(batch._replace(paired=0))


class Calls(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def dispatched(identities: int, images: int, **options: Any) -> int:
    network, batch = miniature(num_ids=20, **options), paired_batch(identities, images)
    with Calls() as calls:
        network.training_step(batch).total.backward()
    return calls.count


@pytest.mark.parametrize("options", [{}, {"renorm_comask": False}], ids=str)
def test_operations_do_not_depend_on_the_batch(options: dict[str, Any]) -> None:
    small, large = dispatched(3, 2, **options), dispatched(9, 4, **options)
    assert small == large
    assert small < 700


# Precision, formats, compilation, sizes.


def test_autocast_keeps_losses_in_float32() -> None:
    network, batch = tiny(), paired_batch(size=(64, 32))
    full = losses_of(copy.deepcopy(network), batch)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(batch)
        features = network.embed(batch.images, batch.modality)
    assert features.dtype == torch.float32
    for name, value in {**losses.terms, "total": losses.total}.items():
        assert value.dtype == torch.float32
        if name != "accuracy":
            assert float(value.detach()) == pytest.approx(full[name], rel=0.1), name
    losses.total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())


def test_channels_last_gives_the_same_losses() -> None:
    batch, network = paired_batch(size=(64, 32)), tiny()
    twin = copy.deepcopy(network).to(memory_format=torch.channels_last)
    images = batch.images.to(memory_format=torch.channels_last)
    one, two = losses_of(network, batch), losses_of(twin, batch._replace(images=images))
    assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_stems_and_layers_are_compiled_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    network = tiny()
    names = list(network.state_dict())
    network.compile_backbone()
    stems = [network.backbone.visible_stem, network.backbone.infrared_stem]
    layers = [network.backbone.get_submodule(f"layer{i}") for i in (1, 2, 3, 4)]
    assert compiled == [*stems, *layers]
    assert list(network.state_dict()) == names


def test_official_size() -> None:
    """ResNet-50, 288 x 144, two identities with one image of each modality."""
    torch.manual_seed(0)
    network = methods.create("lba", 395, weights="none", weighting="batch")
    losses = network.training_step(paired_batch(2, 1, size=(288, 144)))
    losses.total.backward()
    assert bool(losses.total.isfinite())
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


# Runs.


@pytest.mark.parametrize("rng", ["own", "python"])
def test_resuming_draws_the_same_partners(rng: str) -> None:
    network, batch = miniature(pairing_rng=rng), paired_batch()
    python = random.getstate()
    try:
        random.seed(4)
        torch.manual_seed(4)
        network.training_step(batch)
        saved = copy.deepcopy(network.state_dict())
        states = random_states(torch.device("cpu"))

        def step() -> list[float]:
            losses = network.training_step(batch)
            return [float(value.detach()) for value in (*losses.terms.values(), losses.total)]

        went_on = step()
        network.load_state_dict(saved)
        assert step() != went_on  # other partners
        network.load_state_dict(saved)
        restore_random_states(states, torch.device("cpu"))
        assert step() == went_on
    finally:
        random.setstate(python)


def test_overfits_eight_images() -> None:
    network = tiny(weighting="batch")
    batch = paired_batch(4, 1, size=(32, 32))
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    network.begin_epoch(1)
    totals = []
    for _ in range(20):
        losses = network.training_step(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        network.after_step()
        totals.append(float(losses.total.detach()))
    assert float(losses.terms["accuracy"]) == 1.0
    assert float(losses.terms["identity"].detach()) < 0.05
    assert totals[-1] < 0.3 * totals[0]
    features = network.embed(batch.images, batch.modality).detach()
    distance = torch.cdist(features, features) + torch.eye(8) * 1e9
    assert torch.equal(batch.labels[distance.argmin(1)], batch.labels)


# Several processes.


def work(rank: int, folder: Path) -> None:
    """One step on half of the identities."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    network = miniature().double().eval()  # running statistics: rows do not see each other
    losses = network.training_step(share(rank))
    losses.terms["triplet"].backward()
    gradient = network.backbone.layer4[0].weight.grad
    torch.save((losses.terms["triplet"].detach(), gradient), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def share(rank: int) -> Batch:
    batch = paired_batch(6, 2, dtype=torch.float64)
    rows = torch.arange(24).reshape(2, WORLD, 6)[:, rank].flatten()
    return Batch(*(tensor[rows] for tensor in batch[:4]), 2)


def test_triplets_are_mined_over_all_processes(tmp_path: Path) -> None:
    run_together("tests.methods.test_lba_training", tmp_path, WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    network = miniature().double().eval()
    expected = network.training_step(paired_batch(6, 2, dtype=torch.float64)).terms["triplet"]
    expected.backward()
    for loss, _ in found:
        torch.testing.assert_close(loss, expected.detach())
    mean = (found[0][1] + found[1][1]) / WORLD  # as the training loop averages
    torch.testing.assert_close(mean, network.backbone.layer4[0].weight.grad)
