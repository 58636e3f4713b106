"""Re-ranking inside the protocols: what trials share changes nothing, directions and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastreid_vi
from fastreid_vi.evaluation import (
    Embeddings,
    Evaluation,
    KReciprocal,
    MultiSpectral,
    evaluate_llcm,
    evaluate_regdb,
    evaluate_sysu,
    k_reciprocal_rerank,
    llcm_galleries,
    llcm_table,
    multi_spectral_rerank,
    rank_metrics,
    regdb_table,
    rerank_sparse,
    sysu_galleries,
    sysu_table,
)
from tests.conftest import golden
from tests.evaluation.conftest import Data

# As they are, integer features make every product exact, whatever its shape.
RAW: dict[str, Any] = {"normalize": False, "metric": "sqeuclidean"}


def same(a: Evaluation, b: Evaluation) -> bool:
    parts = zip((a.mean, a.std, *a.trials), (b.mean, b.std, *b.trials), strict=True)
    return all(np.array_equal(x, y) for m, n in parts for x, y in zip(m, n, strict=True))


def spectra_of(images: Embeddings) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    shape = np.shape(images.features)
    return [images.features + generator.integers(-3, 4, shape).astype(np.float32) for _ in "rgb"]


def spectral(images: Embeddings, **options: Any) -> MultiSpectral:
    return MultiSpectral(spectra=spectra_of(images), k1=12, k2=5, **options)


def unit(features: Any) -> Any:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize("neighbors", ["queries", "all"])
@pytest.mark.parametrize("kind", ["k-reciprocal", "spectral"])
def test_trials_are_those_of_single_calls(
    rerank_room: str, data: Data, kind: str, neighbors: Any
) -> None:
    query, gallery, permutations = data
    options: dict[str, Any] = {"mode": "indoor", "shots": 10, "trials": 2}
    if kind == "spectral":
        rerank: Any = spectral(gallery, neighbors=neighbors)
    else:
        rerank = KReciprocal(k1=9, k2=4, weight=0.2, neighbors=neighbors, expand=False)
    found = evaluate_sysu(*data, rerank=rerank, **options, **RAW)
    galleries = sysu_galleries(gallery, permutations, **options)
    for trial, rows in zip(found.trials, galleries, strict=True):
        if kind == "spectral":
            sets = [part[rows] for part in (gallery.features, *rerank.spectra)]
            chosen = {"k1": 12, "k2": 5, "neighbors": neighbors}
            distance = multi_spectral_rerank(query.features, sets, **chosen)
        else:
            distance = k_reciprocal_rerank(
                query.features,
                gallery.features[rows],
                k1=9,
                k2=4,
                weight=0.2,
                neighbors=neighbors,
                expand=False,
            )
        labels = query.ids, gallery.ids[rows], query.cams, gallery.cams[rows]
        alone = rank_metrics(distance, *labels)
        for a, b in zip(trial, alone, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not same(found, evaluate_sysu(*data, **options, **RAW))


def test_table_shares_one_query_side(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty galleries, one set of neighbours; the settings are those of single evaluations."""
    made = []
    from fastreid_vi.evaluation import reranked

    class Counted(rerank_sparse.SparseReranking):
        def __init__(self, *arguments: Any) -> None:
            made.append(len(arguments[3]))
            super().__init__(*arguments)

    monkeypatch.setattr(reranked, "SparseReranking", Counted)
    with fastreid_vi.backend("retrieval"):
        table = sysu_table(*data, rerank=KReciprocal(), **RAW)
        assert made == [40]
        for name, setting in table.items():
            mode, shots = name.split("/")
            alone = evaluate_sysu(
                *data,
                mode=mode,
                shots=int(shots),
                rerank=KReciprocal(),
                **RAW,  # type: ignore[arg-type]
            )
            assert same(setting, alone)
    assert made == [40, 10, 10, 10, 10]


def test_functions_get_normalised_features(data: Data) -> None:
    query, gallery, permutations = data
    rows = sysu_galleries(gallery, permutations, trials=2)
    seen = []

    def rerank(left: Any, right: Any) -> Any:
        np.testing.assert_allclose(left, unit(query.features), rtol=0, atol=1e-6)
        np.testing.assert_allclose(
            right, unit(gallery.features)[rows[len(seen)]], rtol=0, atol=1e-6
        )
        distance = -left @ right.T
        left[:], right[:] = 0, 0  # reaches neither the next trial nor the caller
        seen.append(distance)
        return distance

    before = query.features.copy(), gallery.features.copy()
    found = evaluate_sysu(*data, trials=2, rerank=rerank)
    np.testing.assert_array_equal(before[0], query.features)
    np.testing.assert_array_equal(before[1], gallery.features)
    assert len(seen) == 2
    plain = evaluate_sysu(*data, trials=2)
    for a, b in zip(found.trials, plain.trials, strict=True):
        np.testing.assert_allclose(a.mAP, b.mAP, rtol=0, atol=1e-12)


def test_a_function_may_answer_in_torch(data: Data) -> None:
    import torch

    def rerank(left: Any, right: Any) -> Any:
        return -(torch.from_numpy(left) @ torch.from_numpy(right).T)

    found = evaluate_sysu(*data, trials=1, rerank=rerank)
    assert found.mean.mAP == pytest.approx(evaluate_sysu(*data, trials=1).mean.mAP, abs=1e-12)


def test_re_ranking_helps(data: Data) -> None:
    plain, found = (sysu_table(*data, rerank=rerank) for rerank in (None, KReciprocal()))
    for name in plain:
        assert found[name].mean.mAP > plain[name].mean.mAP + 0.03


@pytest.mark.parametrize("kind", ["k-reciprocal", "spectral"])
def test_threads(data: Data, kind: str) -> None:
    rerank = KReciprocal() if kind == "k-reciprocal" else spectral(data[1])
    with fastreid_vi.backend("retrieval"):
        one = sysu_table(*data, rerank=rerank, threads=1)
        for threads in (2, 5):
            many = sysu_table(*data, rerank=rerank, threads=threads)
            assert all(same(one[name], many[name]) for name in one)


def test_few_queries_share_nothing(data: Data) -> None:
    """Lists longer than the queries are many run into each trial's own gallery."""
    query, gallery, permutations = data
    rows = np.flatnonzero(np.isin(query.ids, np.unique(query.ids)[:6]))[:12]
    few = Embeddings(query.features[rows], query.ids[rows], query.cams[rows])
    rerank = KReciprocal(k1=20)
    found = evaluate_sysu(few, gallery, permutations, trials=3, rerank=rerank, **RAW)
    alone = evaluate_sysu(
        few, gallery, permutations, trials=3, rerank=lambda q, g: rerank(q, g), **RAW
    )
    assert same(found, alone)


@pytest.fixture(scope="module")
def regdb() -> tuple[Embeddings, Embeddings]:
    d = golden("eval/eval_regdb")
    visible = Embeddings(d["v_feat"].astype(np.float32), d["v_ids"])
    return visible, Embeddings(d["t_feat"].astype(np.float32), d["t_ids"])


@pytest.mark.parametrize("neighbors", ["queries", "all"])
def test_regdb(rerank_room: str, regdb: Any, neighbors: Any) -> None:
    visible, infrared = regdb
    chosen = {"k1": 12, "k2": 5, "neighbors": neighbors}
    rerank = spectral(visible, neighbors=neighbors)
    table = regdb_table(infrared, visible, rerank=rerank)
    queries = [unit(part) for part in (visible.features, *rerank.spectra)]
    distance = multi_spectral_rerank(queries, unit(infrared.features), direction="v2i", **chosen)
    alone = rank_metrics(distance, visible.ids, infrared.ids, protocol="regdb")
    assert table["vis_to_ir"].mean.mAP == pytest.approx(alone.mAP, abs=1e-3)
    distance = multi_spectral_rerank(unit(infrared.features), queries, **chosen)
    alone = rank_metrics(distance, infrared.ids, visible.ids, protocol="regdb")
    assert table["ir_to_vis"].mean.mAP == pytest.approx(alone.mAP, abs=1e-3)
    single = evaluate_regdb(visible, infrared, rerank=KReciprocal(neighbors=neighbors))
    assert single.mean.mAP != evaluate_regdb(visible, infrared).mean.mAP


@pytest.fixture(scope="module")
def llcm() -> tuple[Embeddings, Embeddings]:
    d = golden("eval/eval_llcm")
    sides = (
        Embeddings(d[f"{s}_feat"].astype(np.float32), d[f"{s}_ids"], d[f"{s}_cams"]) for s in "vt"
    )
    visible, infrared = sides
    return visible, infrared


def test_llcm(rerank_room: str, llcm: Any) -> None:
    visible, infrared = llcm
    rerank = spectral(visible)
    table = llcm_table(infrared, visible, trials=2, rerank=rerank)
    drawn = llcm_galleries(infrared, 2)
    sets = [unit(part) for part in (visible.features, *rerank.spectra)]
    thermal = unit(infrared.features)
    for trial, rows in enumerate(drawn):
        labels = visible.ids, infrared.ids[rows], visible.cams, infrared.cams[rows]
        distance = multi_spectral_rerank(sets, thermal[rows], k1=12, k2=5, direction="v2i")
        alone = rank_metrics(distance, *labels, protocol="llcm")
        found = table["vis_to_ir"].trials[trial]
        assert found.mAP == pytest.approx(alone.mAP, abs=1e-3)
        labels = infrared.ids[rows], visible.ids, infrared.cams[rows], visible.cams
        distance = multi_spectral_rerank(thermal[rows], sets, k1=12, k2=5)
        alone = rank_metrics(distance, *labels, protocol="llcm")
        released = table["vis_to_ir/released"].trials[trial]
        assert released.mAP == pytest.approx(alone.mAP, abs=1e-3)
        np.testing.assert_array_equal(released.valid, alone.valid)


def test_objects_may_be_called(data: Data) -> None:
    query, gallery, _ = data
    found = KReciprocal(k1=9, neighbors="all")(query.features, gallery.features)
    expected = k_reciprocal_rerank(query.features, gallery.features, k1=9)
    np.testing.assert_array_equal(found, expected)
    sets = [gallery.features, *spectra_of(gallery)]
    found = spectral(gallery)(query.features, gallery.features)
    expected = multi_spectral_rerank(query.features, sets, k1=12, k2=5)
    np.testing.assert_array_equal(found, expected)
    back = MultiSpectral(spectra=sets[1:], direction="v2i", k1=5, k2=2)
    found = back(gallery.features, query.features)
    expected = multi_spectral_rerank(sets, query.features, k1=5, k2=2, direction="v2i")
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"galleries\[1\]: expected shape \[5, 16\]"):
        spectral(gallery)(query.features, gallery.features[:5])


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "name": ("mser", {}, r"rerank: expected None .*, KReciprocal, MultiSpectral .*'mser'"),
    "direction": (
        lambda g: MultiSpectral(spectra=[g.features], direction="v2i"),
        {},
        r"rerank.direction: expected 'i2v', as 'ir_to_vis' queries are, got 'v2i'",
    ),
    "rows": (
        lambda g: MultiSpectral(spectra=[g.features[1:]]),
        {},
        r"rerank.spectra\[0\].features: expected 1140 rows, got 1139",
    ),
    "lengths": (
        lambda g: MultiSpectral(spectra=[g.features, g.features[:, 1:]]),
        {},
        r"expected equal lengths, got 16 and 15",
    ),
    "NaN": (
        lambda g: MultiSpectral(spectra=[np.where(g.ids == 4, np.nan, g.features.T).T]),
        {},
        r"rerank.spectra\[0\].features: row \d+ is not finite",
    ),
    "inner": (
        lambda _: KReciprocal(),
        {"metric": "inner", "normalize": False},
        r"metric: re-ranking is about Euclidean distances",
    ),
    "shape": (
        lambda _: lambda q, g: q @ g.T[:, 1:],
        {},
        r"rerank, trial 0: expected distances \[360, 139\], got \[360, 138\]",
    ),
    "vector": (lambda _: lambda q, g: q[0], {}, r"rerank, trial 0: expected shape \[Q, G\]"),
    "function's NaN": (
        lambda _: lambda q, g: np.full((len(q), len(g)), np.nan),
        {},
        r"distance: NaN for query 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(data: Data, case: str) -> None:
    make, options, message = BAD[case]
    rerank = make(data[1]) if callable(make) else make
    with pytest.raises(ValueError, match=message):
        evaluate_sysu(*data, rerank=rerank, **options)
    with pytest.raises(ValueError, match=message):
        sysu_table(*data, rerank=rerank, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KReciprocal(k1=0), r"k1: expected >= 1, got 0"),
        (lambda: KReciprocal(weight=2), r"weight: expected 0 to 1, got 2"),
        (lambda: KReciprocal(neighbors="x"), r"neighbors: .*'x'"),  # type: ignore[arg-type]
        (lambda: MultiSpectral(spectra=[]), r"spectra: expected further feature sets"),
        (lambda: MultiSpectral(spectra=[0], k2=0), r"k2: expected >= 1"),
        (lambda: MultiSpectral(spectra=[0], direction="x"), r"direction: .*'x'"),  # type: ignore[arg-type]
    ],
)
def test_bad_parameters(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_direction_of_regdb_and_llcm(regdb: Any, llcm: Any) -> None:
    visible, infrared = regdb
    message = r"rerank.direction: expected 'v2i', as 'vis_to_ir' queries are, got 'i2v'"
    with pytest.raises(ValueError, match=message):
        evaluate_regdb(visible, infrared, direction="vis_to_ir", rerank=spectral(visible))
    with pytest.raises(ValueError, match=message):
        evaluate_llcm(*llcm, direction="vis_to_ir", rerank=spectral(llcm[0]))
    with pytest.raises(ValueError, match=r"rerank: expected None"):
        evaluate_regdb(visible, infrared, rerank=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rerank: expected None"):
        evaluate_llcm(*llcm, rerank="k")  # type: ignore[arg-type]
