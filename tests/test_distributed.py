"""gather=True in two processes: loss and gradients of one process on the joined batch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastreid_vi import _distributed, losses
from tests.processes import run_together

WORLD = 2
SIZES = {"equal": (12, 12), "uneven": (9, 15), "empty": (24, 0)}


def modules(**gathering: Any) -> dict[str, nn.Module]:
    return {
        "batch_hard": losses.BatchHardTripletLoss(**gathering),
        "batch_hard_cosine": losses.BatchHardTripletLoss(1.0, "cosine", **gathering),
        "weighted": losses.WeightedRegularizedTripletLoss(stable=True, **gathering),
        "center_cluster": losses.CenterClusterLoss(3.0, **gathering),
        "retrieval": losses.CrossModalityRetrievalLoss(0.05, **gathering),
    }


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (24,), generator=generator), torch.arange(24) % 2


def called(module: nn.Module, name: str, x: Tensor, labels: Tensor, modality: Tensor) -> Tensor:
    loss: Tensor = module(x, labels, modality) if name == "retrieval" else module(x, labels)
    return loss


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 4, bias=False, dtype=torch.float64)


def work(rank: int, folder: Path) -> None:
    """What each process does: own rows in, loss and gradients out."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    results: dict[str, Any] = {}
    for split, sizes in SIZES.items():
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x, labels, modality = (t[own] for t in batch())
        for name, module in modules(gather=True, equal_sizes=split == "equal").items():
            leaf = x.clone().requires_grad_()
            loss = called(module, name, leaf, labels, modality)
            loss.backward()
            results[f"{split} {name}"] = (loss.detach(), leaf.grad)
    own = slice(12 * rank, 12 * (rank + 1))
    x, labels, modality = (t[own] for t in batch())
    for name, module in modules(gather=True, averaged=True).items():
        network = nn.parallel.DistributedDataParallel(linear())
        called(module, name, network(x), labels, modality).backward()
        results[f"ddp {name}"] = network.module.weight.grad
    anchors = x.clone().requires_grad_()
    references = (2 * x).requires_grad_()
    losses.BatchHardTripletLoss(gather=True)(anchors, labels, references, labels).backward()
    results["references"] = (anchors.grad, references.grad)
    exchanges: list[int] = []
    gather = torch.distributed.all_gather
    torch.distributed.all_gather = lambda *a, **k: (exchanges.append(1), gather(*a, **k))
    for promise in (contextlib.nullcontext(), _distributed.equal_shares()):
        with promise:
            before = len(exchanges)
            joined = _distributed.joined(x, labels)
            results[f"exchanges {type(promise).__name__}"] = len(exchanges) - before
        results[f"joined {type(promise).__name__}"] = joined
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    run_together("tests.test_distributed", folder, WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", list(modules()))
@pytest.mark.parametrize("split", list(SIZES))
def test_equals_one_process_on_the_joined_batch(
    results: list[dict[str, Any]], split: str, name: str
) -> None:
    x, labels, modality = batch()
    x.requires_grad_()
    want = called(modules()[name], name, x, labels, modality)
    want.backward()
    assert want.item() > 0
    pieces = [r[f"{split} {name}"] for r in results]
    for loss, _ in pieces:
        torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g in pieces]), x.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", list(modules()))
def test_averaged_suits_distributed_data_parallel(results: list[dict[str, Any]], name: str) -> None:
    x, labels, modality = batch()
    network = linear()
    called(modules()[name], name, network(x), labels, modality).backward()
    for piece in results:
        torch.testing.assert_close(piece[f"ddp {name}"], network.weight.grad, rtol=1e-9, atol=1e-12)


def test_a_promise_of_equal_shares_saves_the_exchange_of_sizes(
    results: list[dict[str, Any]],
) -> None:
    for piece in results:
        asked, promised = (
            name.removeprefix("exchanges ") for name in piece if name.startswith("exchanges ")
        )
        assert piece[f"exchanges {asked}"] == piece[f"exchanges {promised}"] + 1 == 3
        for one, other in zip(piece[f"joined {asked}"], piece[f"joined {promised}"], strict=True):
            assert torch.equal(one, other)


def test_references_are_gathered_too(results: list[dict[str, Any]]) -> None:
    x, labels, _ = batch()
    anchors, references = x.requires_grad_(), (2 * x.detach()).requires_grad_()
    losses.BatchHardTripletLoss()(anchors, labels, references, labels).backward()
    for k, leaf in enumerate((anchors, references)):
        got = torch.cat([piece["references"][k] for piece in results])
        torch.testing.assert_close(got, leaf.grad, rtol=1e-12, atol=1e-14)
