"""The SYSU-MM01 protocol: golden galleries and results, options, layouts, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastreid_vi
from fastreid_vi.data import Permutations, SysuMM01
from fastreid_vi.evaluation import (
    Embeddings,
    Evaluation,
    evaluate_sysu,
    products,
    rank_metrics,
    sysu_galleries,
    sysu_table,
)
from fastreid_vi.evaluation.chance import chance_sysu
from tests.conftest import golden
from tests.data.conftest import write_files, write_lists
from tests.evaluation.conftest import Data, cells, reordered

SETTINGS = [("all", 1), ("all", 10), ("indoor", 1), ("indoor", 10)]
RANKS = [0, 4, 9, 19]


def trials(evaluation: Evaluation) -> np.ndarray:
    rows = [[*t.cmc[RANKS], t.mAP, t.mINP, t.valid.sum()] for t in evaluation.trials]
    return np.array(rows)


def same(a: Evaluation, b: Evaluation) -> bool:
    parts = zip((a.mean, a.std, *a.trials), (b.mean, b.std, *b.trials), strict=True)
    return all(np.array_equal(x, y) for m, n in parts for x, y in zip(m, n, strict=True))


@pytest.mark.parametrize(("mode", "shots"), SETTINGS)
def test_golden_galleries(data: Data, vectors: dict[str, Any], mode: Any, shots: int) -> None:
    chosen = sysu_galleries(data[1], data[2], mode=mode, shots=shots)
    for rows, expected in zip(chosen, vectors[f"{mode}_{shots}_sel"], strict=True):
        assert np.array_equal(rows, expected[expected >= 0])


@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_golden_random_galleries(data: Data, vectors: dict[str, Any], mode: Any) -> None:
    chosen = sysu_galleries(data[1], "random", mode=mode)
    for rows, expected in zip(chosen, vectors[f"agw_{mode}_sel"], strict=True):
        assert np.array_equal(rows, expected[expected >= 0])


@pytest.mark.parametrize(("mode", "shots"), SETTINGS)
def test_golden_trials(
    room: str, data: Data, vectors: dict[str, Any], mode: Any, shots: int
) -> None:
    found = evaluate_sysu(*data, mode=mode, shots=shots)
    expected = vectors[f"{mode}_{shots}_trials"]
    np.testing.assert_allclose(trials(found), expected, rtol=0, atol=1e-12)
    mean = [*found.mean.cmc[RANKS], found.mean.mAP, found.mean.mINP]
    std = [*found.std.cmc[RANKS], found.std.mAP, found.std.mINP]
    np.testing.assert_allclose(mean, expected[:, :6].mean(axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(std, expected[:, :6].std(axis=0), rtol=0, atol=1e-12)
    mcja, mpanet = vectors[f"{mode}_{shots}_mcja"], vectors[f"{mode}_{shots}_mpanet"]
    np.testing.assert_allclose(100 * np.array(mean), mcja, rtol=0, atol=1e-10)
    printed = 100 * np.array([mean[4], *mean[:4]])
    np.testing.assert_allclose(printed, mpanet, rtol=0, atol=1e-10)
    assert found.mean.cmc.shape == (20,)
    assert found.mean.cmc.dtype == np.float64
    assert found.mean.valid.sum() == expected[0, 6]


@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_golden_random_trials(room: str, data: Data, vectors: dict[str, Any], mode: Any) -> None:
    found = evaluate_sysu(data[0], data[1], "random", mode=mode)
    # The released code adds its CMC up in float32.
    expected = vectors[f"agw_{mode}_trials"]
    np.testing.assert_allclose(trials(found)[:, :4], expected[:, :4], rtol=0, atol=1e-6)
    np.testing.assert_allclose(trials(found)[:, 4:6], expected[:, 4:], rtol=0, atol=1e-12)
    order = vectors["agw_query_order"]
    query = reordered(data[0], order)
    again = evaluate_sysu(query, data[1], "random", mode=mode)
    np.testing.assert_allclose(trials(again), trials(found), rtol=0, atol=1e-14)


def test_from_a_tree_on_disk(room: str, vectors: dict[str, Any], tmp_path: Path) -> None:
    """File names alone bring images, numbers and permutations together."""
    counts = {(c + 1, p + 1): int(n) for (c, p), n in np.ndenumerate(vectors["counts"])}
    write_files(tmp_path, counts, lambda *_: b"")
    ids = vectors["train_ids_order"].tolist()
    lists = {"train": ids[:10], "val": ids[10:], "test": vectors["test_ids"].tolist()}
    write_lists(tmp_path, lists)
    Permutations(cells(vectors), vectors["perm_cells_per_cam"].tolist()).to_mat(
        tmp_path / "exp" / "rand_perm_cam.mat"
    )
    tree = SysuMM01(tmp_path, image_order="identity")

    def embed(images: Any, side: str) -> Embeddings:
        keys = zip(*(vectors[f"{side}_{part}"].tolist() for part in ("cams", "ids", "img")))  # noqa: B905
        row = {key: i for i, key in enumerate(keys)}
        found = zip(*(part.tolist() for part in (images.cams, images.pids, images.numbers)))  # noqa: B905
        features = vectors[f"{side}_feat"][[row[key] for key in found]]
        return Embeddings(features.astype(np.float32), images.pids, images.cams, images.paths)

    query, gallery = embed(tree.query, "q"), embed(tree.gallery, "g")
    table = sysu_table(query, gallery, tree.permutations)
    for mode, shots in SETTINGS:
        expected = vectors[f"{mode}_{shots}_trials"]
        found = trials(table[f"{mode}/{shots}"])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_one_product_serves_all_settings(room: str, data: Data) -> None:
    table = sysu_table(*data)
    assert list(table) == ["all/1", "all/10", "indoor/1", "indoor/10"]
    for mode, shots in SETTINGS:
        alone = evaluate_sysu(*data, mode=mode, shots=shots)
        assert same(table[f"{mode}/{shots}"], alone)
    assert list(sysu_table(data[0], data[1], "random")) == ["all/1", "indoor/1"]


@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_trials_are_those_of_rank_metrics(data: Data, mode: Any) -> None:
    """Skipped queries, shared columns and blocks leave every query's figures alone."""
    query, gallery, permutations = data
    options: dict[str, Any] = {"normalize": False, "metric": "sqeuclidean"}
    found = evaluate_sysu(*data, mode=mode, shots=10, trials=3, per_query=True, **options)
    q, g = query.features.astype(float), gallery.features.astype(float)
    distance = ((q[:, None] - g) ** 2).sum(axis=2)
    galleries = sysu_galleries(gallery, permutations, mode=mode, shots=10, trials=3)
    for trial, rows in zip(found.trials, galleries, strict=True):
        labels = query.ids, gallery.ids[rows], query.cams, gallery.cams[rows]
        alone = rank_metrics(distance[:, rows], *labels, per_query=True)
        assert trial.per_query is not None
        assert alone.per_query is not None
        for a, b in zip((*trial, *trial.per_query), (*alone, *alone.per_query), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rule", ["none", "location", "same_id_and_camera"])
def test_camera_rules_and_cmc(room: str, data: Data, rule: Any) -> None:
    query, gallery, permutations = data
    options: dict[str, Any] = {"camera_rule": rule, "cmc_by": "image", "max_rank": 7}
    found = evaluate_sysu(*data, mode="indoor", trials=1, **options)
    q, g = (x.features / np.linalg.norm(x.features, axis=1)[:, None] for x in (query, gallery))
    rows = sysu_galleries(gallery, permutations, mode="indoor", trials=1)[0]
    labels = query.ids, gallery.ids[rows], query.cams, gallery.cams[rows]
    alone = rank_metrics(-q @ g[rows].T, *labels, **options)
    for a, b in zip(found.trials[0], alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_blocks_of_queries_change_nothing(
    room: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integer features make every product exact, whatever its shape."""
    options: dict[str, Any] = {"normalize": False, "metric": "inner", "mode": "indoor"}
    whole = evaluate_sysu(*data, **options)
    for size in (1, 5000, 2**14):
        monkeypatch.setattr(products, "BLOCK_BYTES", size)
        assert same(whole, evaluate_sysu(*data, **options))


def test_metrics(room: str, data: Data) -> None:
    cosine = evaluate_sysu(*data, trials=2)
    unit = [x._replace(features=x.features * 3.5) for x in data[:2]]
    for options in (
        {"metric": "cosine", "normalize": False},
        {"metric": "inner"},
        {"metric": "sqeuclidean"},
        {"metric": "euclidean"},
    ):
        found = evaluate_sysu(unit[0], unit[1], data[2], trials=2, **options)
        np.testing.assert_allclose(trials(found), trials(cosine), rtol=0, atol=1e-12)
    raw = [
        trials(evaluate_sysu(*data, trials=2, normalize=False, metric=metric))
        for metric in ("inner", "sqeuclidean", "euclidean")
    ]
    assert np.array_equal(raw[1], raw[2])
    assert not np.array_equal(raw[0], raw[1])


def test_extreme_features(data: Data) -> None:
    """Norms whose squares leave float32 are still divided out; a zero vector stays zero."""
    query, gallery, permutations = data
    plain = trials(evaluate_sysu(*data, trials=1))
    for scale in (1e-25, 1e30):
        scaled = [
            x._replace(features=x.features * np.float32(scale) / np.float32(10))
            for x in (query, gallery)
        ]
        found = trials(evaluate_sysu(*scaled, permutations, trials=1))
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-12)
    zero = np.zeros_like(query.features)
    assert np.isfinite(evaluate_sysu(query._replace(features=zero), gallery, permutations).mean.mAP)


@pytest.mark.parametrize("kind", ["float64", "int16", "torch", "bfloat16", "list", "dlpack"])
def test_kinds_of_features(data: Data, kind: str) -> None:
    import torch

    class Capsule:
        """Nothing but DLPack."""

        def __init__(self, array: np.ndarray) -> None:
            self._array = array

        def __dlpack__(self, **options: Any) -> Any:
            return self._array.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self._array.__dlpack_device__()

    convert = {
        "float64": lambda x: x.astype(np.float64),
        "int16": lambda x: x.astype(np.int16),
        "torch": lambda x: torch.from_numpy(x.copy()).requires_grad_(),
        "bfloat16": lambda x: torch.from_numpy(x.copy()).to(torch.bfloat16),
        "list": lambda x: x.tolist(),
        "dlpack": Capsule,
    }[kind]
    # Integers up to 256 are bfloat16 values, so all kinds hold the same features.
    small = [x._replace(features=np.clip(x.features, -256, 256)) for x in data[:2]]
    expected = trials(evaluate_sysu(small[0], small[1], data[2], trials=2))
    query, gallery = (x._replace(features=convert(x.features)) for x in small)
    if kind in ("torch", "bfloat16"):
        query = query._replace(
            ids=torch.from_numpy(query.ids.copy()), cams=torch.from_numpy(query.cams.copy())
        )
    found = evaluate_sysu(query, gallery, data[2], trials=2)
    np.testing.assert_allclose(trials(found), expected, rtol=0, atol=1e-12)


def test_inputs_are_left_alone(room: str, data: Data) -> None:
    """Modes follow each other on the same arrays; read-only arrays do."""
    before = [np.array(part) for side in data[:2] for part in side[:4]]
    frozen = []
    for side in data[:2]:
        parts = [np.array(part) for part in side[:4]]
        for part in parts:
            part.setflags(write=False)
        frozen.append(Embeddings(*parts))
    first = evaluate_sysu(frozen[0], frozen[1], data[2], mode="indoor", metric="sqeuclidean")
    evaluate_sysu(frozen[0], frozen[1], data[2], mode="all", normalize=False, metric="inner")
    sysu_table(frozen[0], frozen[1], "random")
    again = evaluate_sysu(frozen[0], frozen[1], data[2], mode="indoor", metric="sqeuclidean")
    assert same(first, again)
    after = [np.asarray(part) for side in frozen for part in side[:4]]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_order_of_the_pool(room: str, data: Data) -> None:
    query, gallery, permutations = data
    order = np.random.default_rng(3).permutation(len(gallery.ids))
    mixed = reordered(gallery, order)
    assert same(
        evaluate_sysu(*data, mode="indoor", shots=10),
        evaluate_sysu(query, mixed, permutations, mode="indoor", shots=10),
    )


def test_threads(data: Data) -> None:
    with fastreid_vi.backend("retrieval"):
        one = sysu_table(*data, threads=1)
        for threads in (2, 7):
            many = sysu_table(*data, threads=threads)
            assert all(same(one[name], many[name]) for name in one)


def test_real_counts() -> None:
    """Galleries and valid queries of the real data set, from its folder counts."""
    real = golden("eval/sysu_real_counts")
    count, test = real["counts"].astype(int), real["test_id"].astype(int)

    def side(cameras: tuple[int, ...]) -> Embeddings:
        rows = [
            (cam, pid, number)
            for cam in cameras
            for pid in test
            for number in range(1, count[cam - 1, pid - 1] + 1)
        ]
        paths = [f"cam{c}/{p:04d}/{n:04d}.jpg" for c, p, n in rows]
        cams, ids, _ = np.array(rows).T
        features = np.random.default_rng(len(rows)).standard_normal((len(rows), 4))
        return Embeddings(features.astype(np.float32), ids, cams, paths)

    query, gallery = side((3, 6)), side((1, 2, 4, 5))
    assert (len(query.ids), len(gallery.ids)) == (3803, 6775)
    generator = np.random.default_rng(0)
    permutations = {
        (int(cam), int(pid)): generator.permuted(
            np.tile(np.arange(1, count[cam - 1, pid - 1] + 1), (10, 1)), axis=1
        )
        for cam in (1, 2, 4, 5)
        for pid in test
    }
    table = sysu_table(query, gallery, permutations)
    sizes = {"all/1": 301, "all/10": 3010, "indoor/1": 112, "indoor/10": 1120}
    for (mode, shots), (name, size) in zip(SETTINGS, sizes.items(), strict=True):
        galleries = sysu_galleries(gallery, permutations, mode=mode, shots=shots)
        assert {len(rows) for rows in galleries} == {size}
        assert table[name].mean.valid.sum() == (3803 if mode == "all" else 2208)
        chance = chance_sysu(
            query.ids, query.cams, gallery.ids, gallery.cams, mode=mode, shots=shots
        )
        # Random features rank at random, though not independently from query to query.
        assert table[name].mean.mAP == pytest.approx(chance.mAP, rel=0.15)
        assert np.array_equal(table[name].mean.valid, chance.valid)
        place = np.where(gallery.cams == 3, 2, gallery.cams)
        share = []
        for i in np.flatnonzero(chance.valid):
            kept = galleries[0][place[galleries[0]] != (2 if query.cams[i] == 3 else query.cams[i])]
            share.append((gallery.ids[kept] == query.ids[i]).mean())
        assert chance.cmc[0] == pytest.approx(np.mean(share), abs=1e-12)
