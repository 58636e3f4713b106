"""Re-ranking inside the protocols: what queries have in common is found once for all trials."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fastreid_vi.evaluation.arrays import Int, Real, real_matrix
from fastreid_vi.evaluation.directions import Direction
from fastreid_vi.evaluation.features import Features
from fastreid_vi.evaluation.galleries import Embeddings
from fastreid_vi.evaluation.positions import (
    CameraRule,
    Ranks,
    cores,
    make_labels,
    rank_rows,
    stays_on_device,
)
from fastreid_vi.evaluation.products import can_match
from fastreid_vi.evaluation.rerank import (
    Neighborhood,
    SpectralDirection,
    feature_sets,
    k_reciprocal_rerank,
    make_method,
    multi_spectral_rerank,
    rerank_sets,
    room_of,
)
from fastreid_vi.evaluation.rerank_reference import Method
from fastreid_vi.evaluation.rerank_sparse import Shape, SparseReranking, shareable


@dataclass(frozen=True, kw_only=True)
class KReciprocal:
    """`k_reciprocal_rerank` for the `rerank` of the protocols; the defaults are MPANet's on SYSU.

    With `neighbors="queries"` the neighbours of the queries are looked for once for all trials of
    all settings. It may also be called with (query, gallery) features.
    """

    k1: int = 20
    """Two images are neighbours when each is among the other's k1 nearest."""
    k2: int = 6
    """Lists of neighbours are averaged over the k2 nearest images."""
    weight: float = 0.3
    """Of the plain distance, from 0 to 1."""
    neighbors: Neighborhood = "queries"
    """Who may be a neighbour: "queries" or "all" images."""
    expand: bool = True
    """Add the neighbours of neighbours."""

    def __post_init__(self) -> None:
        self.method()

    def method(self) -> Method:
        """Checked parameters."""
        return make_method(self.k1, self.k2, self.weight, self.neighbors, self.expand)

    def __call__(self, query: Any, gallery: Any) -> Any:
        """Re-ranked distances [Q, G]."""
        return k_reciprocal_rerank(query, gallery, **dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True, eq=False)
class MultiSpectral:
    """`multi_spectral_rerank` for the `rerank` of the protocols; the defaults are MCJA's on SYSU.

    The query side is shared as by `KReciprocal`. Called with (query, gallery) features it takes
    `spectra` whole.
    """

    spectra: Sequence[Any]
    """Further feature sets of the visible side, [N, D] each, in the order of its `Embeddings`."""
    k1: int = 40
    """As for `KReciprocal`."""
    k2: int = 20
    """As for `KReciprocal`."""
    weight: float = 0.3
    """As for `KReciprocal`."""
    direction: SpectralDirection = "i2v"
    """ "i2v" for infrared queries, "v2i" for visible ones; tables of both set it themselves."""
    neighbors: Neighborhood = "queries"
    """As for `KReciprocal`."""
    expand: bool = False
    """As for `KReciprocal`."""

    def __post_init__(self) -> None:
        self.method()
        if self.direction not in ("i2v", "v2i"):
            raise ValueError(f"direction: expected 'i2v', 'v2i', got {self.direction!r}")
        if not hasattr(self.spectra, "__len__"):
            raise TypeError(
                f"spectra: expected feature sets [n, N, D], got {type(self.spectra).__name__}"
            )
        if not len(self.spectra):
            raise ValueError("spectra: expected further feature sets of the visible side, got none")

    def method(self) -> Method:
        """Checked parameters."""
        return make_method(self.k1, self.k2, self.weight, self.neighbors, self.expand)

    def __call__(self, query: Any, gallery: Any) -> Any:
        """Re-ranked distances [Q, G]; `spectra` belong to these very images."""
        i2v = self.direction == "i2v"
        return multi_spectral_rerank(
            query if i2v else [query, *self.spectra],
            [gallery, *self.spectra] if i2v else gallery,
            k1=self.k1,
            k2=self.k2,
            weight=self.weight,
            direction=self.direction,
            neighbors=self.neighbors,
            expand=self.expand,
        )


Rerank: TypeAlias = KReciprocal | MultiSpectral | Callable[[Any, Any], Any]


def check_rerank(rerank: Any, direction: Direction | None) -> None:
    """Refuse what is no re-ranking, or one of the other direction.

    Args:
        rerank: None, `KReciprocal`, `MultiSpectral` or a function.
        direction: of the search; None where it is not known.
    """
    if rerank is not None and not callable(rerank):
        raise ValueError(
            "rerank: expected None (plain distances), KReciprocal, MultiSpectral or a function of "
            f"(query, gallery) features, got {rerank!r}"
        )
    if isinstance(rerank, MultiSpectral) and direction is not None:
        expected = SPECTRAL_DIRECTIONS[direction]
        if rerank.direction != expected:
            raise ValueError(
                f"rerank.direction: expected {expected!r}, as {direction!r} queries are, got "
                f"{rerank.direction!r}"
            )


SPECTRAL_DIRECTIONS: dict[Direction, SpectralDirection] = {"ir_to_vis": "i2v", "vis_to_ir": "v2i"}


def turned(rerank: Rerank | None, direction: Direction) -> Rerank | None:
    """The same re-ranking for a search of this direction."""
    if isinstance(rerank, MultiSpectral):
        return dataclasses.replace(rerank, direction=SPECTRAL_DIRECTIONS[direction])
    return rerank


def rank_reranked(
    rerank: Rerank,
    query: Embeddings,
    gallery: Embeddings,
    galleries: Sequence[Int],
    rule: CameraRule,
    normalize: bool,
    threads: int | None,
) -> Ranks:
    """Positions of the matches of every query in every gallery, [T, Q].

    Args:
        rerank: what to rank by.
        query, gallery: all queries, which are one another's neighbours, and the whole pool, with
            identities and cameras checked.
        galleries: rows of the pool, T times.
        rule: which images a query does not see; they are re-ranked with the others.
        normalize: divide features by their L2 norm first.
        threads: of the C++ rooms.
    """
    used = np.unique(np.concatenate(galleries))
    labels = make_labels(query.ids, query.cams, gallery.ids[used], gallery.cams[used], rule)
    rows = np.flatnonzero(can_match(labels))
    ranks = Ranks.empty(len(galleries), len(query.ids))
    if not len(rows):
        return ranks
    if isinstance(rerank, KReciprocal | MultiSpectral) and stays_on_device(query.features):
        device = importlib.import_module("fastreid_vi.evaluation.device_reranked")
        sets = _named_sets(rerank, query, gallery)
        reranked: Ranks = device.rank_reranked(
            rerank.method(), *sets, used, rows, galleries, rule, normalize=normalize
        )
        return reranked
    left, right = _feature_sets(rerank, query, gallery, used, normalize)
    columns = [np.searchsorted(used, images) for images in galleries]
    for trial, distance in enumerate(_distances(rerank, left, right, columns, rows, threads)):
        seen = galleries[trial]
        labels = make_labels(
            query.ids[rows], query.cams[rows], gallery.ids[seen], gallery.cams[seen], rule
        )
        found = rank_rows(distance, labels, [np.arange(len(seen))], rows, threads)
        ranks.put(trial, rows, found)
    return ranks


def _feature_sets(
    rerank: Rerank, query: Embeddings, gallery: Embeddings, used: Int, normalize: bool
) -> tuple[list[Real], list[Real]]:
    """Checked copies: all queries, the rows `used` of the pool; further spectra of their side."""
    everyone = np.arange(len(query.ids))
    queries, pools = _named_sets(rerank, query, gallery)
    left = [_rows(name, images, everyone, normalize) for name, images in queries[:1]]
    right = [_rows(name, images, used, normalize) for name, images in pools[:1]]
    if left[0].shape[1] != right[0].shape[1]:
        raise ValueError(
            f"query.features, gallery.features: expected equal lengths, got {left[0].shape[1]} and "
            f"{right[0].shape[1]}"
        )
    left += [_rows(name, images, everyone, normalize) for name, images in queries[1:]]
    right += [_rows(name, images, used, normalize) for name, images in pools[1:]]
    return left, right


def _named_sets(
    rerank: Rerank, query: Embeddings, gallery: Embeddings
) -> tuple[list[tuple[str, Embeddings]], list[tuple[str, Embeddings]]]:
    """All sets of features of either side and their names in messages."""
    left, right = [("query", query)], [("gallery", gallery)]
    if isinstance(rerank, MultiSpectral):
        sets, images = (right, gallery) if rerank.direction == "i2v" else (left, query)
        sets += [
            (f"rerank.spectra[{number}]", images._replace(features=features))
            for number, features in enumerate(rerank.spectra)
        ]
    return left, right


def _rows(name: str, images: Embeddings, rows: Int, normalize: bool) -> Real:
    features = Features(name, images, normalize=normalize)
    features.check_others(rows)
    return features.rows(rows)


def _distances(
    rerank: Rerank,
    left: list[Real],
    right: list[Real],
    columns: Sequence[Int],
    rows: Int,
    threads: int | None,
) -> Iterator[Real]:
    """What each trial's gallery is ranked by, [rows, images]."""
    if not isinstance(rerank, KReciprocal | MultiSpectral):
        for trial, images in enumerate(columns):
            # A copy: what the caller's function does to it does not reach the next trial.
            result = rerank(left[0].copy(), right[0][images])
            expected = (len(left[0]), len(images))
            distance = real_matrix(f"rerank, trial {trial}", result, "[Q, G]")
            if distance.shape != expected:
                raise ValueError(
                    f"rerank, trial {trial}: expected distances {list(expected)}, got "
                    f"{list(distance.shape)}"
                )
            yield distance[rows]
        return
    names = [*(f"query, set {n}" for n in range(len(left)))]
    names += [f"gallery, set {n}" for n in range(len(right))]
    sets = feature_sets(list(zip(names, [*left, *right], strict=True)))
    count = len(left)
    del left[:], right[:]  # the caller's copies, where float32 needed others
    method = rerank.method()
    shape = Shape(len(sets[0]), count, len(sets[count]), len(sets) - count)
    if room_of("float32") == "retrieval" and shareable(shape, method):
        shared = SparseReranking(sets[:count], sets[count:], method, columns, threads or cores())
        for trial in range(len(columns)):
            yield shared.result(trial, rows)
        return
    for images in columns:
        gallery = [np.ascontiguousarray(part[images]) for part in sets[count:]]
        yield rerank_sets(sets[:count], gallery, method, threads)[rows]
