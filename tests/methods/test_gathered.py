"""Losses that mine or rank, in two processes: averaged gradients are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastreid_vi.methods.base import Losses
from fastreid_vi.methods.baseline import BaselineOptions
from fastreid_vi.methods.baseline.losses import baseline_losses
from fastreid_vi.methods.mcja import MCJAOptions
from fastreid_vi.methods.mcja.losses import mcja_losses
from fastreid_vi.methods.mpanet import MPANetOptions
from fastreid_vi.methods.mpanet.losses import Outputs, mpanet_losses
from tests.processes import run_together

WORLD, ROWS, IDS, WIDTH = 2, 24, 6, 5


class Head(nn.Module):
    """Embeddings and logits from inputs: the parameters whose gradients are averaged."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(7, WIDTH, dtype=torch.float64)
        self.classify = nn.Linear(WIDTH, IDS, dtype=torch.float64)


Case = Callable[[Head, Tensor, Tensor, Tensor], Losses]


def _baseline(head: Head, x: Tensor, labels: Tensor, modality: Tensor) -> Losses:
    embeddings = head.embed(x)
    return baseline_losses(embeddings, head.classify(embeddings), labels, BaselineOptions())


def _mcja(**options: str | float) -> Case:
    def case(head: Head, x: Tensor, labels: Tensor, modality: Tensor) -> Losses:
        embeddings, chosen = head.embed(x), MCJAOptions(**options)  # type: ignore[arg-type]
        return mcja_losses(embeddings, head.classify(embeddings), labels, modality, chosen)

    return case


def _mpanet(**options: str | float) -> Case:
    def case(head: Head, x: Tensor, labels: Tensor, modality: Tensor) -> Losses:
        embeddings = head.embed(x)
        maps = embeddings.sigmoid()[..., None, None].expand(-1, -1, 2, 1)
        logits = head.classify(embeddings)
        outputs = Outputs(maps, embeddings, logits, logits, logits, 2 * logits, 3 * logits)
        return mpanet_losses(outputs, labels, modality, MPANetOptions(**options))  # type: ignore[arg-type]

    return case


CASES: dict[str, Case] = {
    "baseline": _baseline,
    "mcja": _mcja(),
    "mcja bent": _mcja(cmr_strength=0.01),
    "mcja pav": _mcja(cmr_path="pav", cmr_strength=0.05),
    "mpanet": _mpanet(margin=3.0),
    "mpanet rows": _mpanet(cc_mode="rows", margin=3.0),
}
# What each process knows of its own rows alone; the other terms are those of all rows.
LOCAL = {
    "identity",
    "accuracy",
    "visible_identity",
    "infrared_identity",
    "separation",
    "divergence",
}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Four rows of each identity, two of each modality; three identities for each process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 7, generator=generator, dtype=torch.float64)
    return x, torch.arange(ROWS) // (ROWS // IDS), torch.arange(ROWS) % 2


def run(case: Case, rows: slice) -> tuple[dict[str, float], list[Tensor]]:
    head = Head()
    losses = case(head, *(tensor[rows] for tensor in batch()))
    losses.total.backward()
    terms = {name: value.item() for name, value in losses.terms.items()}
    return terms, [p.grad for p in head.parameters() if p.grad is not None]


def work(rank: int, folder: Path) -> None:
    """What each process does: the engine's averaging after its own rows."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    results = {}
    share = ROWS // WORLD
    for name, case in CASES.items():
        terms, gradients = run(case, slice(rank * share, (rank + 1) * share))
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= WORLD
        results[name] = (terms, gradients)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple]]:  # type: ignore[type-arg]
    folder = tmp_path_factory.mktemp("processes")
    run_together("tests.methods.test_gathered", folder, WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", list(CASES))
def test_equals_one_process(results: list[dict[str, tuple]], name: str) -> None:  # type: ignore[type-arg]
    terms, gradients = run(CASES[name], slice(None))
    found = [r[name] for r in results]
    for term, value in terms.items():
        each = [pair[0][term] for pair in found]
        if term in LOCAL:
            tolerance = 1e-6 if term == "accuracy" else 1e-12  # the former is in float32
            assert sum(each) / WORLD == pytest.approx(value, rel=tolerance, abs=1e-14)
        else:
            assert each == pytest.approx([value] * WORLD, rel=1e-12)
    for _, own in found:
        torch.testing.assert_close(own, gradients, rtol=1e-10, atol=1e-13)
