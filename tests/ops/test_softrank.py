from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastreid_vi
from fastreid_vi import ops
from fastreid_vi._checks import NonFiniteError
from fastreid_vi._dispatch import OPS
from tests.conftest import golden
from tests.contract import OpContract, device_of
from tests.ops.test_pool import seeded, tensor

SIZES, STRENGTHS = (5, 16, 64, 200), range(4)


class TestSoftRank(OpContract):
    op = "soft_rank"
    cases = (
        (3, 7, 1.0, False),
        (3, 7, 0.05, False),
        (2, 40, 0.02, True),
        (4, 33, 0.3, False),
        (0, 5, 1.0, False),
        (2, 1, 1.0, False),
        (1, 2, 0.01, True),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        rows, size, strength, descending = case
        return seeded(rows, size), strength, descending

    def call(self, *args: Any) -> Any:
        return ops.soft_rank(args[0], strength=args[1], descending=args[2])

    @pytest.mark.parametrize("strength", STRENGTHS)
    @pytest.mark.parametrize("size", SIZES)
    def test_golden(self, size: int, strength: int, room: str) -> None:
        v = golden("mcja/soft_rank")
        name, eps = f"n{size}__s{strength}", float(v["strengths"][strength])
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-6 * size)):
            x = tensor(v[f"n{size}__x"]).to(device_of(room), dtype).requires_grad_()
            with fastreid_vi.backend(room):
                ranks = ops.soft_rank(x, strength=eps)
                ranks.backward(tensor(v[f"n{size}__gout"]).to(x))
            error = np.abs(ranks.detach().cpu().double().numpy() - v[f"{name}__y64"]).max()
            assert error <= tolerance
            want = v[f"{name}__gx64"]
            # One pair of blocks that nearly touch may merge in float32.
            error = np.abs(x.grad.cpu().double().numpy() - want).max()
            assert error <= 1e3 * tolerance * np.abs(want).max()

    @pytest.mark.parametrize("descending", [False, True])
    def test_ties_share_a_rank_to_the_last_bit(self, descending: bool, room: str) -> None:
        x = torch.tensor([[3.0, 1.0, 3.0, 2.0, 1.0, 3.0, -7.0]] * 2)
        for strength in (1e-3, 0.4, 10.0):
            with fastreid_vi.backend(room):
                ranks = ops.soft_rank(
                    x.to(device_of(room)), strength=strength, descending=descending
                )[0].cpu()
            assert ranks[0] == ranks[2] == ranks[5]
            assert ranks[1] == ranks[4]
            assert ranks.sum().item() == pytest.approx(28.0, rel=1e-6)

    def test_rows_of_both_kinds_in_one_batch(self, room: str) -> None:
        x = torch.stack([seeded(50), 100 * seeded(50), torch.full((50,), 2.0).double()])
        x = torch.cat([x, 1000 + 40 * seeded(4, 50)]).to(device_of(room))
        with fastreid_vi.backend(room):
            together = ops.soft_rank(x, strength=0.5)
            apart = torch.cat([ops.soft_rank(row[None], strength=0.5) for row in x])
        assert torch.equal(together, apart)
        assert together[2].tolist() == [25.5] * 50
        with fastreid_vi.backend("reference"):
            want = ops.soft_rank(x, strength=0.5)
        torch.testing.assert_close(together, want)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.floats(0.01, 3.0), st.integers(0, 1000))
def test_properties(size: int, strength: float, seed: int) -> None:
    """Ranks sum to n(n+1)/2, keep the order, lie in the permutahedron and turn with the sign."""
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)).double()
    ranks = ops.soft_rank(x, strength=strength)
    total = torch.full((2,), size * (size + 1) / 2).double()
    torch.testing.assert_close(ranks.sum(1), total)
    order = x.argsort(1)
    assert (ranks.gather(1, order).diff(dim=1) >= -1e-9).all()
    ordered = ranks.sort(1, descending=True).values.cumsum(1)
    bound = torch.arange(size, 0, -1).double().cumsum(0)
    assert (ordered <= bound + 1e-8).all()
    torch.testing.assert_close(ops.soft_rank(-x, strength=strength, descending=True), ranks)
    torch.testing.assert_close(
        ops.soft_rank(x, strength=strength, descending=True), size + 1 - ranks
    )


def test_hard_ranks_in_the_limit() -> None:
    x = seeded(3, 20)
    ranks = ops.soft_rank(x, strength=1e-9)
    torch.testing.assert_close(ranks, x.argsort(1).argsort(1).double() + 1)
    torch.testing.assert_close(ops.soft_rank(x, strength=1e9), torch.full_like(x, 10.5))


def test_leading_axes() -> None:
    x = seeded(2, 3, 4)
    assert torch.equal(ops.soft_rank(x)[1, 2], ops.soft_rank(x[1, 2]))
    assert ops.soft_rank(seeded(2, 0)).shape == (2, 0)
    assert ops.soft_rank(seeded(0, 3, 4)).shape == (0, 3, 4)


def modalities_of(rows: int) -> Tensor:
    return torch.randint(2, (rows,), generator=torch.Generator().manual_seed(rows + 1))


class TestCrossModalityRetrievalLoss(OpContract):
    op = "cross_modality_retrieval_loss"
    cases = (
        (16, 6, 4, 0.5),
        (40, 37, 5, 0.5),
        (16, 6, 4, 0.03),
        (30, 9, 3, 0.12),  # one direction by each path
        (0, 5, 3, 0.5),
        (6, 3, 1, 0.5),  # every query matches the whole gallery
        (1, 3, 1, 0.5),
        (5, 4, 2, 0.5),
    )

    def inputs(self, case: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        rows, size, identities, strength = case
        labels = torch.arange(rows) % identities
        return seeded(rows, size), labels, modalities_of(rows), strength

    def call(self, *args: Any) -> Any:
        return ops.cross_modality_retrieval_loss(*args[:3], strength=args[3])

    @pytest.mark.parametrize(
        "name",
        ["p4k4", "p8k16", "p8k16rand", "removed", "onedir", "tiny_gallery", "strength008",
         "strength005", "strength002", "novalid"],
    )  # fmt: skip
    def test_golden(self, name: str, room: str) -> None:
        v = {
            k.split("__")[1]: a for k, a in golden("mcja/cmr").items() if k.startswith(f"{name}__")
        }
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            x = tensor(v["emb"]).to(device_of(room), dtype).requires_grad_()
            others = (tensor(v[k]).to(device_of(room)) for k in ("ids", "mods"))
            with fastreid_vi.backend(room):
                loss = ops.cross_modality_retrieval_loss(x, *others, strength=float(v["strength"]))
                (1.7 * loss).backward()
            assert loss.item() == pytest.approx(float(v["loss64"]), rel=tolerance / 10, abs=1e-12)
            error = np.abs(x.grad.cpu().double().numpy() - v["gemb64"]).max()
            assert error <= tolerance * max(np.abs(v["gemb64"]).max(), 1e-6)

    def test_zero_rows_have_finite_gradients(self, room: str) -> None:
        for strength in (0.5, 0.02):
            x = seeded(12, 5).float()
            x[3] = x[8] = 0
            x = x.to(device_of(room)).requires_grad_()
            labels, modality = torch.arange(12) % 3, torch.arange(12) // 6
            with fastreid_vi.backend(room):
                loss = ops.cross_modality_retrieval_loss(
                    x, labels.to(x.device), modality.to(x.device), strength=strength
                )
                loss.backward()
            assert loss.isfinite()
            assert x.grad is not None
            assert x.grad.isfinite().all()


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 24), st.integers(1, 5), st.sampled_from([0.5, 0.1, 0.02]), st.integers(0, 99))
def test_retrieval_equals_its_definition(
    rows: int, identities: int, strength: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator).double().requires_grad_()
    labels = torch.randint(identities, (rows,), generator=generator)
    modality = torch.randint(2, (rows,), generator=generator)
    losses = []
    for query in (0, 1):
        q, g = x[modality == query], x[modality != query]
        match = labels[modality == query][:, None] == labels[modality != query][None, :]
        kept = match.any(1) & ~match.all(1)
        if kept.any():
            cosine = torch.cosine_similarity(q[kept][:, None], g[None], dim=2)
            ranks = ops.soft_rank((1 - cosine) / 2, strength=strength)
            target = torch.where(match[kept], 1.0, float(len(g))).double()
            losses.append((ranks - target).abs().mean())
    want = torch.stack(losses).mean() if losses else x.sum() * 0
    got = ops.cross_modality_retrieval_loss(x, labels, modality, strength=strength)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


@pytest.mark.parametrize("infrared", [1, 7, -1])
def test_every_modality_but_zero_is_infrared(infrared: int) -> None:
    x, labels, modality = seeded(12, 5), torch.arange(12) % 3, torch.arange(12) // 6
    want = ops.cross_modality_retrieval_loss(x, labels, modality)
    got = ops.cross_modality_retrieval_loss(x, labels, modality * infrared)
    assert torch.equal(got, want)


@pytest.mark.parametrize("modality", [0, 1])
def test_a_single_modality_gives_zero_with_a_graph(modality: int) -> None:
    x = seeded(6, 5).requires_grad_()
    loss = ops.cross_modality_retrieval_loss(x, torch.arange(6) % 2, torch.full((6,), modality))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_nan_is_refused() -> None:
    x = seeded(6, 5)
    x[5, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="values: expected finite numbers, got nan in row 5"):
        ops.soft_rank(x)
    for strength in (0.5, 0.01):
        with pytest.raises(NonFiniteError, match=r"embeddings: expected finite .* nan in row 5"):
            ops.cross_modality_retrieval_loss(
                x, torch.arange(6) % 2, torch.arange(6) // 3, strength=strength
            )


def test_what_the_cuda_rooms_refuse() -> None:
    """Shared memory holds one row: longer ones fall to the next room."""
    ranks, loss = OPS["soft_rank"], OPS["cross_modality_retrieval_loss"]
    assert ranks.refuses("cuda", torch.empty(2, 8192), 1.0, False) is None
    assert "rows of 8193 entries" in (ranks.refuses("cuda", torch.empty(2, 8193), 1.0, False) or "")
    assert ranks.refuses("cpu", torch.empty(2, 8193), 1.0, False) is None
    index = torch.empty(5000, dtype=torch.int64)
    batch = (torch.empty(5000, 2), index, index)
    assert loss.refuses("cuda", *batch, 0.5) is None
    assert "at strength 0.0001" in (loss.refuses("cuda", *batch, 1e-4) or "")
    grad = torch.empty(())
    backward = OPS["cross_modality_retrieval_loss_backward"]
    assert backward.refuses("cuda", grad, *batch, 0.5) is None
    assert "at strength" in (backward.refuses("cuda", grad, *batch, 1e-4) or "")
    wide = (torch.empty(16385, 2), index, index)
    assert "16385 rows" in (loss.refuses("cuda", *wide, 0.5) or "")


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([1.0, 2.0],), TypeError, "values: expected a tensor"),
        ((torch.arange(3),), TypeError, "values: expected a floating tensor"),
        ((torch.tensor(1.0),), ValueError, r"values: expected shape \[..., n\]"),
        ((torch.ones(3), 0.0), ValueError, "strength: expected > 0"),
        ((torch.ones(3), float("nan")), ValueError, "strength: expected > 0"),
    ],
)
def test_bad_ranks(args: Any, error: type[Exception], message: str) -> None:
    strength = {"strength": args[1]} if len(args) > 1 else {}
    with pytest.raises(error, match=message):
        ops.soft_rank(args[0], **strength)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeddings": torch.ones(4, 0)}, ValueError, "embeddings: .* with D >= 1"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels: expected int64 of shape \[4\]"),
        ({"modalities": torch.zeros(4)}, TypeError, r"modalities: expected int64 of shape \[4\]"),
        ({"modalities": torch.zeros(4).long().to("meta")}, ValueError, "modalities: expected dev"),
        ({"strength": -1.0}, ValueError, "strength: expected > 0"),
    ],
)
def test_bad_retrieval(change: dict[str, Any], error: type[Exception], message: str) -> None:
    index = torch.zeros(4, dtype=torch.int64)
    good = {"embeddings": torch.ones(4, 3), "labels": index, "modalities": index}
    with pytest.raises(error, match=message):
        ops.cross_modality_retrieval_loss(**{**good, **change})
