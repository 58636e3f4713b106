"""Protocols with re-ranking whose features are on a device: all of it there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastreid_vi
from fastreid_vi.evaluation import (
    Embeddings,
    KReciprocal,
    MultiSpectral,
    evaluate_llcm,
    evaluate_regdb,
    evaluate_sysu,
    rerank_sparse,
)
from tests.cuda.conftest import Emulated
from tests.cuda.test_rerank_kernels import on_device


def side(count: int, cams: list[int]) -> Embeddings:
    """Small integers: every product is exact."""
    generator = np.random.default_rng(count)
    features = generator.integers(-3, 4, (count, 12)).astype(np.float32)
    ids, chosen = generator.integers(1, 9, count), generator.choice(cams, count)
    paths = [
        f"cam{c}/{i:04d}/{n:04d}.jpg" for n, (c, i) in enumerate(zip(chosen, ids, strict=True))
    ]
    return Embeddings(features, ids, chosen, paths)


def there(images: Embeddings) -> Embeddings:
    return images._replace(features=torch.tensor(images.features))


QUERY, GALLERY = side(30, [3, 6]), side(70, [1, 2, 4, 5])
SPECTRA = [side(70, [1]).features * k for k in (2, -1)]
RERANKS = {
    "masked": KReciprocal(k1=6, k2=3),
    "all": KReciprocal(k1=6, k2=3, neighbors="all"),
    "spectral": MultiSpectral(spectra=SPECTRA, k1=8, k2=4),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", RERANKS)
def test_as_on_the_host(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch, name: str, normalize: bool
):
    def evaluate(query: Embeddings, gallery: Embeddings, rerank: Any) -> Any:
        metric: Any = "cosine" if normalize else "sqeuclidean"
        options = {"rerank": rerank, "normalize": normalize, "metric": metric}
        yield evaluate_sysu(query, gallery, "random", trials=2, **options)
        if name == "masked":
            yield evaluate_llcm(query, gallery, trials=1, **options)
            yield evaluate_regdb(query, gallery, **options)

    rerank = RERANKS[name]
    expected = list(evaluate(QUERY, GALLERY, rerank))
    on_device(emulated, monkeypatch)
    monkeypatch.delattr(rerank_sparse, "SparseReranking")
    monkeypatch.setattr("fastreid_vi.evaluation.reranked.SparseReranking", None)
    launches = emulated.emulation.launches
    with fastreid_vi.backend("cuda"):
        found = list(evaluate(there(QUERY), there(GALLERY), rerank))
        bad = there(QUERY)
        bad.features[7, 2] = torch.inf
        with pytest.raises(ValueError, match=r"query\.features: row 7 is not finite"):
            list(evaluate(bad, GALLERY, rerank))
        with pytest.raises(ValueError, match=r"equal lengths, got 9 and 12"):
            list(evaluate(bad._replace(features=bad.features[:, 3:]), GALLERY, rerank))
    for got, want in zip(found, expected, strict=True):
        assert got.mean.mAP == pytest.approx(want.mean.mAP, abs=1e-3)
        for ours, theirs in zip(got.trials, want.trials, strict=True):
            np.testing.assert_allclose(ours.cmc, theirs.cmc, atol=0.04)  # one query, nearly tied
    assert emulated.emulation.launches > launches
