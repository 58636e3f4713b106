"""Protocols whose features are on a device: the product there, and the emulated kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastreid_vi
from fastreid_vi.evaluation import (
    Embeddings,
    device_products,
    evaluate_llcm,
    evaluate_regdb,
    evaluate_sysu,
)
from tests.cuda.conftest import Emulated
from tests.cuda.test_ranking_kernels import on_emulated_device


@pytest.mark.parametrize("name", ["sysu", "llcm", "regdb"])
def test_protocols_on_a_device(emulated: Emulated, monkeypatch: pytest.MonkeyPatch, name: str):
    """Features of small integers: every product is exact, so every bit is the host's."""
    generator = np.random.default_rng(5)

    def side(count: int, cams: list[int]) -> Embeddings:
        features = generator.integers(-3, 4, (count, 12)).astype(np.float32)
        ids, chosen = generator.integers(1, 9, count), generator.choice(cams, count)
        paths = [
            f"cam{c}/{i:04d}/{n:04d}.jpg" for n, (c, i) in enumerate(zip(chosen, ids, strict=True))
        ]
        return Embeddings(features, ids, chosen, paths)

    query, gallery = side(30, [3, 6]), side(90, [1, 2, 4, 5])
    evaluate: Any = {
        "sysu": lambda q, g: evaluate_sysu(
            q, g, "random", trials=3, normalize=False, metric="sqeuclidean"
        ),
        "llcm": lambda q, g: evaluate_llcm(q, g, trials=2, normalize=False, metric="inner"),
        "regdb": lambda q, g: evaluate_regdb(q, g, normalize=False, metric="euclidean"),
    }[name]
    expected = evaluate(query, gallery)
    on_emulated_device(emulated, monkeypatch)
    launches = emulated.emulation.launches

    def there(images: Embeddings) -> Embeddings:
        return images._replace(features=torch.from_numpy(images.features))

    with fastreid_vi.backend("cuda"):
        for pool in (there(gallery), gallery):
            found = evaluate(there(query), pool)
            for got, want in zip(found.trials, expected.trials, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
        bad = there(query)
        bad.features[7, 2] = torch.inf
        with pytest.raises(ValueError, match=r"query\.features: row 7 is not finite"):
            evaluate(bad, gallery)
        with pytest.raises(ValueError, match=r"expected equal lengths, got 11 and 12"):
            evaluate(bad._replace(features=bad.features[:, 3:].repeat(1, 2)[:, :11]), gallery)
    assert emulated.emulation.launches > launches


def test_unit_vectors_on_a_device():
    """Rows of any scale, zero among them."""
    features = torch.randn((5, 7), generator=torch.Generator().manual_seed(1))
    scaled = features * torch.tensor([1e-30, 1.0, 0.0, 1e18, 3.0])[:, None]
    found = device_products._ready("query", scaled, np.arange(5), torch.float32, True)
    expected = torch.nn.functional.normalize(features.double())
    expected[2] = 0
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=0)
