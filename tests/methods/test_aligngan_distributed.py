"""AlignGAN in two processes: losses and gradients of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastreid_vi.certify.networks import PooledConv
from fastreid_vi.config import Batch
from fastreid_vi.methods.aligngan import AlignGAN, AlignGANOptions
from tests.methods.aligngan_cases import SMALL, STAGES, backward, paired_batch
from tests.processes import run_together

WORLD = 2
Found = dict[str, Tensor]


def network() -> AlignGAN:
    """In double, without batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    options = AlignGANOptions(**{**SMALL, "pixel_images": 0, "dropout": 0.0})  # type: ignore[arg-type]
    built = AlignGAN(4, options, backbone=PooledConv(16)).double()
    built.embedder.classifier0.bottle[1] = nn.Identity()
    return built


def share(rank: int, world: int) -> Batch:
    """Identities of one process, in both halves."""
    batch = paired_batch(ids=4, k=2)
    rows = torch.arange(16).reshape(2, 4, 2)[:, 4 * rank // world : 4 * (rank + 1) // world]
    images, labels, modality, cams = (t[rows.reshape(-1)] for t in batch[:4])
    return Batch(images.double(), labels, modality, cams, 2)


def found(rank: int, world: int) -> Found:
    """Totals and gradients of every phase, averaged over the processes."""
    built, batch, results = network(), share(rank, world), {}
    for stage in STAGES:
        for phase in stage:
            losses = backward(built, batch, phase)
            results[phase] = losses.total.detach()
            own = {n: p.grad for n, p in built.named_parameters() if p.grad is not None}
            results |= {f"{phase} {name}": gradient for name, gradient in own.items()}
    if world > 1:
        for value in results.values():
            torch.distributed.all_reduce(value)
            value /= world
    return results


def work(rank: int, folder: Path) -> None:
    """What each process does."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    results = found(rank, WORLD)
    if rank == 0:
        torch.save(results, folder / "found.pt")
    torch.distributed.barrier()


def test_two_processes_are_one(tmp_path: Path) -> None:
    run_together("tests.methods.test_aligngan_distributed", tmp_path, WORLD)
    together = torch.load(tmp_path / "found.pt", weights_only=True)
    alone = found(0, 1)
    assert alone.keys() == together.keys()
    for name, expected in alone.items():
        assert together[name] is not None
        torch.testing.assert_close(together[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_the_pixel_batch_is_shared_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid_vi.methods.aligngan import batches

    monkeypatch.setattr(batches, "world_size", lambda: 2)
    assert batches.pixel_rows(share(0, 1), 16) == 8
    with pytest.raises(ValueError, match=r"a multiple of 8 .4 rows of a person times 2 processes"):
        batches.pixel_rows(share(0, 1), 12)
