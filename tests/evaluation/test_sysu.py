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
    protocols,
    rank_metrics,
    sysu_galleries,
    sysu_table,
)
from fastreid_vi.evaluation.chance import chance_sysu
from tests.conftest import golden
from tests.data.conftest import write_files, write_lists

SETTINGS = [("all", 1), ("all", 10), ("indoor", 1), ("indoor", 10)]
RANKS = [0, 4, 9, 19]
Data = tuple[Embeddings, Embeddings, dict[tuple[int, int], np.ndarray]]


def cells(vectors: dict[str, np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
    """The golden permutation file as a mapping."""
    values, offsets = vectors["perm_values"], vectors["perm_offsets"]
    folders = [
        (cam, pid)
        for cam, n in enumerate(vectors["perm_cells_per_cam"], 1)
        for pid in range(1, n + 1)
    ]
    return {
        folder: values[offsets[k] : offsets[k + 1]].reshape(10, -1)
        for k, folder in enumerate(folders)
    }


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    return golden("eval/sysu_protocol")


@pytest.fixture(scope="module")
def data(vectors: dict[str, np.ndarray]) -> Data:
    def side(s: str) -> Embeddings:
        ids, cams, numbers = (vectors[f"{s}_{part}"] for part in ("ids", "cams", "img"))
        paths = [f"cam{c}/{i:04d}/{n:04d}.jpg" for c, i, n in zip(cams, ids, numbers, strict=True)]
        return Embeddings(vectors[f"{s}_feat"].astype(np.float32), ids, cams, paths)

    return side("q"), side("g"), cells(vectors)


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
    query = Embeddings(*(np.asarray(part)[order] for part in data[0]))
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
        monkeypatch.setattr(protocols, "BLOCK_BYTES", size)
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
    before = [np.array(part) for side in data[:2] for part in side]
    frozen = []
    for side in data[:2]:
        parts = [np.array(part) for part in side]
        for part in parts:
            part.setflags(write=False)
        frozen.append(Embeddings(*parts))
    first = evaluate_sysu(frozen[0], frozen[1], data[2], mode="indoor", metric="sqeuclidean")
    evaluate_sysu(frozen[0], frozen[1], data[2], mode="all", normalize=False, metric="inner")
    sysu_table(frozen[0], frozen[1], "random")
    again = evaluate_sysu(frozen[0], frozen[1], data[2], mode="indoor", metric="sqeuclidean")
    assert same(first, again)
    after = [np.asarray(part) for side in frozen for part in side]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_order_of_the_pool(room: str, data: Data) -> None:
    query, gallery, permutations = data
    order = np.random.default_rng(3).permutation(len(gallery.ids))
    mixed = Embeddings(*(np.asarray(part)[order] for part in gallery))
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


def changed(images: Embeddings, **parts: Any) -> Embeddings:
    return images._replace(**parts)


def with_row(array: Any, row: int, value: Any) -> Any:
    copy = np.array(array, dtype=object if isinstance(value, str) else None)
    copy[row] = value
    return copy


BAD = {
    "mode": (lambda q, g, p: (q, g, p, {"mode": "outdoor"}), r"mode: .*'all', 'indoor'.*'outdoor'"),
    "shots": (lambda q, g, p: (q, g, p, {"shots": 0}), r"shots: expected >= 1, got 0"),
    "trials": (lambda q, g, p: (q, g, p, {"trials": 11}), r"trials: .* 10 rows, got 11"),
    "rerank": (lambda q, g, p: (q, g, p, {"rerank": "mser"}), r"rerank: expected None.*'mser'"),
    "metric": (lambda q, g, p: (q, g, p, {"metric": "hamming"}), r"metric: .*'hamming'"),
    "cmc_by": (lambda q, g, p: (q, g, p, {"cmc_by": "person"}), r"cmc_by: .*'person'"),
    "rule": (lambda q, g, p: (q, g, p, {"camera_rule": "x"}), r"camera_rule: .*'x'"),
    "max_rank": (lambda q, g, p: (q, g, p, {"max_rank": 0}), r"max_rank: expected >= 1, got 0"),
    "threads": (lambda q, g, p: (q, g, p, {"threads": 0}), r"threads: expected >= 1, got 0"),
    "random, 10 shots": (lambda q, g, p: (q, g, "random", {"shots": 10}), r"shots: .*single-shot"),
    "permutations": (lambda q, g, p: (q, g, "agw", {}), r'permutations: .*"random", got \'agw\''),
    "swapped": (lambda q, g, p: (g, q, p, {}), r"gallery.cams: none of 360 images"),
    "visible query": (
        lambda q, g, p: (changed(q, cams=with_row(q.cams, 5, 2)), g, p, {}),
        r"query.cams: expected infrared cameras \[3, 6\], got \[2, 3, 6\]",
    ),
    "no cameras": (lambda q, g, p: (changed(q, cams=None), g, p, {}), r"query.cams: .*None"),
    "no paths": (lambda q, g, p: (q, changed(g, paths=None), p, {}), r"gallery.paths: .*None"),
    "few paths": (
        lambda q, g, p: (q, changed(g, paths=g.paths[1:]), p, {}),
        r"gallery.paths: expected 1140 paths, got 1139",
    ),
    "file name": (
        lambda q, g, p: (q, changed(g, paths=with_row(g.paths, 3, "cam1/0002/a.jpg")), p, {}),
        r"gallery.paths: .*'cam1/0002/a.jpg'",
    ),
    "one image twice": (
        lambda q, g, p: (q, changed(g, paths=with_row(g.paths, 1, "cam1/0004/0001.jpg")), p, {}),
        r"gallery.paths: .* are one image of camera 1, pid 4",
    ),
    "ids": (
        lambda q, g, p: (q, changed(g, cams=g.cams[1:]), p, {}),
        r"gallery.cams: expected integers of shape \[1140\], got int64 \[1139\]",
    ),
    "rows": (
        lambda q, g, p: (q, changed(g, features=g.features[1:]), p, {}),
        r"gallery.features: expected 1140 rows, got 1139",
    ),
    "lengths": (
        lambda q, g, p: (q, changed(g, features=g.features[:, 1:]), p, {}),
        r"expected equal lengths, got 16 and 15",
    ),
    "rank": (
        lambda q, g, p: (q, changed(g, features=g.features[0]), p, {}),
        r"gallery.features: expected shape \[n, D\], got float32 \[16\]",
    ),
    "NaN": (
        lambda q, g, p: (changed(q, features=with_row(q.features, 7, np.nan)), g, p, {}),
        r"query.features: row 7 is not finite",
    ),
    "infinity": (
        lambda q, g, p: (q, changed(g, features=g.features + np.float32(np.inf)), p, {}),
        r"gallery.features: row \d+ is not finite",
    ),
    "empty query": (
        lambda q, g, p: (Embeddings(q.features[:0], [], [], []), g, p, {}),
        r"query: expected one image at least, got none",
    ),
    "empty gallery": (
        lambda q, g, p: (q, Embeddings(g.features[:0], [], [], []), p, {}),
        r"gallery: expected one image at least, got none",
    ),
    "no folder": (
        lambda q, g, p: (q, g, {k: v for k, v in p.items() if k != (4, 8)}, {}),
        r"permutations of camera 4, pid 8: missing",
    ),
    "empty folder": (
        lambda q, g, p: (q, g, {**p, (4, 8): np.zeros((10, 0), int)}, {}),
        r"permutations of camera 4, pid 8: empty",
    ),
    "unknown image": (
        lambda q, g, p: (q, g, {**p, (4, 8): np.full((10, 2), 99)}, {}),
        r"permutations of camera 4, pid 8: trial 0 takes image 99",
    ),
    "no match": (
        lambda q, g, p: (changed(q, ids=q.ids * 0 - 1), g, p, {"mode": "indoor"}),
        r"no valid query: 0 of 360 queries .* 54 gallery images of indoor/1, trial 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(data: Data, case: str) -> None:
    change, message = BAD[case]
    query, gallery, permutations, options = change(*data)
    with pytest.raises(ValueError, match=message):
        evaluate_sysu(query, gallery, permutations, **options)


def test_wrong_types(data: Data) -> None:
    query, gallery, permutations = data
    with pytest.raises(TypeError, match=r"query.ids: expected integers .* float64"):
        evaluate_sysu(query._replace(ids=query.ids * 1.0), gallery, permutations)
    with pytest.raises(TypeError, match=r"query.features: expected real numbers"):
        evaluate_sysu(query._replace(features=query.features * 1j), gallery, permutations)
    with pytest.raises(TypeError, match=r"shots: expected an integer, got float"):
        evaluate_sysu(*data, shots=1.0)  # type: ignore[arg-type]
