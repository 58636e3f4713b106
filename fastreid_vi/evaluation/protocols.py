"""All trials of all settings of a protocol from one matrix product; SYSU-MM01's own settings."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from fastreid_vi.evaluation.arrays import Int, Mask, choice
from fastreid_vi.evaluation.features import Features
from fastreid_vi.evaluation.galleries import (
    Embeddings,
    Mode,
    PermutationTable,
    galleries_of,
    ids_and_cams,
)
from fastreid_vi.evaluation.positions import CameraRule, Ranks, make_labels, stays_on_device
from fastreid_vi.evaluation.products import Metric, rank_product
from fastreid_vi.evaluation.ranking import (
    PROTOCOLS,
    CmcBy,
    ProtocolName,
    RankMetrics,
    check_options,
    summarize,
)
from fastreid_vi.evaluation.reranked import Rerank, check_rerank, rank_reranked

QUERY_CAMERAS: Final = (3, 6)
SETTINGS: Final[tuple[tuple[Mode, int], ...]] = (
    ("all", 1),
    ("all", 10),
    ("indoor", 1),
    ("indoor", 10),
)


class Evaluation(NamedTuple):
    """A protocol's result."""

    mean: RankMetrics
    """Mean over the trials; `valid` holds in every trial."""
    std: RankMetrics
    """Standard deviation over the trials (divided by their number)."""
    trials: list[RankMetrics]
    """One per gallery."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a protocol does with features and ranks."""

    normalize: bool
    metric: Metric
    cmc_by: CmcBy
    camera_rule: CameraRule
    max_rank: int
    per_query: bool
    threads: int | None
    rerank: Rerank | None = None


def evaluate_sysu(
    query: Embeddings,
    gallery: Embeddings,
    permutations: PermutationTable,
    *,
    mode: Mode = "all",
    shots: int = 1,
    trials: int = 10,
    rerank: Rerank | None = None,
    normalize: bool = True,
    metric: Metric = "cosine",
    cmc_by: CmcBy | None = None,
    camera_rule: CameraRule | None = None,
    max_rank: int | None = None,
    per_query: bool = False,
    threads: int | None = None,
) -> Evaluation:
    """One setting of the SYSU-MM01 protocol: infrared queries search visible galleries.

    The inputs are left as they are.

    Args:
        query: images of cameras 3 and 6; `paths` are not needed. With features on a CUDA device the
            products and the ranking are made there.
        gallery: the whole pool of cameras 1, 2, 4, 5, with `paths`.
        permutations: (camera, pid) -> [`trials` or more, m] image numbers, of which a trial takes
            the first `shots`; or "random", single-shot: one image of each person and camera drawn
            with `random.seed(trial)`, in AGW's order.
        mode: "all" searches cameras 1, 2, 4, 5; "indoor" searches 1 and 2.
        shots: images of each person and camera in a gallery, or all if there are fewer.
        trials: galleries.
        rerank: `KReciprocal`, `MultiSpectral`, or a function that takes one trial's query and
            gallery features, normalised if they are to be, and gives distances [Q, G]. A query's
            result then depends on the other queries: publish it beside the plain one. `metric`
            then may not be "inner" on features that are not normalised.
        normalize: divide features by their L2 norm first.
        metric: "cosine" (normalises anyway), "inner" (negative dot product), "euclidean" or
            "sqeuclidean" (the same order).
        cmc_by, camera_rule, max_rank, per_query, threads: as for `rank_metrics`.
    Returns:
        `Evaluation(mean, std, trials)`.
    Raises:
        TypeError, ValueError: the argument, image, folder or trial that does not fit, by name.
    Spec: evaluation, 2.1 and 3.2. Golden: eval/sysu_protocol. Backends: retrieval.
    """
    check_rerank(rerank, "ir_to_vis")
    galleries = galleries_of(gallery, permutations, [(mode, shots)], trials)
    options = make_options(
        "sysu", normalize, metric, cmc_by, camera_rule, max_rank, per_query, threads, rerank
    )
    return _evaluate(query, gallery, {f"{mode}/{shots}": galleries[0]}, options)[f"{mode}/{shots}"]


def sysu_table(
    query: Embeddings,
    gallery: Embeddings,
    permutations: PermutationTable,
    *,
    trials: int = 10,
    rerank: Rerank | None = None,
    normalize: bool = True,
    metric: Metric = "cosine",
    cmc_by: CmcBy | None = None,
    camera_rule: CameraRule | None = None,
    max_rank: int | None = None,
    per_query: bool = False,
    threads: int | None = None,
) -> dict[str, Evaluation]:
    """All four settings from one product of queries x pool; arguments as for `evaluate_sysu`.

    Returns:
        "all/1", "all/10", "indoor/1", "indoor/10" -> evaluation; only the single-shot ones when
        `permutations` is "random".
    Spec: evaluation, 2.1 and 4.
    """
    check_rerank(rerank, "ir_to_vis")
    options = make_options(
        "sysu", normalize, metric, cmc_by, camera_rule, max_rank, per_query, threads, rerank
    )
    settings = [s for s in SETTINGS if s[1] == 1 or not isinstance(permutations, str)]
    galleries = galleries_of(gallery, permutations, settings, trials)
    names = [f"{mode}/{shots}" for mode, shots in settings]
    return _evaluate(query, gallery, dict(zip(names, galleries, strict=True)), options)


def make_options(
    protocol: ProtocolName,
    normalize: bool,
    metric: Metric,
    cmc_by: CmcBy | None,
    camera_rule: CameraRule | None,
    max_rank: int | None,
    per_query: bool,
    threads: int | None,
    rerank: Rerank | None = None,
) -> Options:
    """Checked options, with the protocol's defaults for None."""
    rule, by, length = PROTOCOLS[choice("protocol", protocol, ProtocolName)]
    choice("metric", metric, Metric)
    if rerank is not None and metric == "inner" and not normalize:
        raise ValueError(
            "metric: re-ranking is about Euclidean distances; got 'inner' on features that are not "
            "normalised"
        )
    options = Options(
        normalize=normalize or metric == "cosine",
        metric=metric,
        cmc_by=by if cmc_by is None else cmc_by,
        camera_rule=rule if camera_rule is None else camera_rule,
        max_rank=length if max_rank is None else max_rank,
        per_query=per_query,
        threads=threads,
        rerank=rerank,
    )
    check_options(options.camera_rule, options.cmc_by, options.max_rank, threads)
    return options


def _evaluate(
    query: Embeddings, gallery: Embeddings, settings: dict[str, list[Int]], options: Options
) -> dict[str, Evaluation]:
    _, cams = ids_and_cams("query", query)
    if not np.isin(cams, QUERY_CAMERAS).all():
        raise ValueError(
            f"query.cams: expected infrared cameras {list(QUERY_CAMERAS)}, got "
            f"{np.unique(cams).tolist()}; are query and gallery swapped?"
        )
    return evaluate_galleries(query, gallery, settings, options)


def evaluate_galleries(
    query: Embeddings, gallery: Embeddings, settings: dict[str, list[Int]], options: Options
) -> dict[str, Evaluation]:
    """Rank all galleries of all settings, then average over each setting's trials.

    Args:
        query, gallery: all queries, the whole pool.
        settings: name -> rows of the pool that each trial searches.
        options: from `make_options`.
    """
    galleries = [rows for trials in settings.values() for rows in trials]
    ranks = rank_galleries(query, gallery, galleries, options)
    evaluations, first = {}, 0
    for name, trials in settings.items():
        results = [
            summarize(
                ranks.gallery(first + t),
                options.cmc_by,
                options.max_rank,
                options.per_query,
                f"the {len(rows)} gallery images of {name}, trial {t}",
            )
            for t, rows in enumerate(trials)
        ]
        evaluations[name] = over_trials(results)
        first += len(trials)
    return evaluations


def rank_galleries(
    query: Embeddings, gallery: Embeddings, galleries: Sequence[Int], options: Options
) -> Ranks:
    """Positions of the matches of every query in every gallery, [T, Q]."""
    ids, cams = _ids_and_cams("query", query, options.camera_rule)
    pool_ids, pool_cams = _ids_and_cams("gallery", gallery, options.camera_rule)
    if options.rerank is not None:
        return rank_reranked(
            options.rerank,
            query._replace(ids=ids, cams=cams),
            gallery._replace(ids=pool_ids, cams=pool_cams),
            galleries,
            options.camera_rule,
            options.normalize,
            options.threads,
        )
    used = np.unique(np.concatenate(galleries))
    labels = make_labels(ids, cams, pool_ids[used], pool_cams[used], options.camera_rule)
    if stays_on_device(query.features):
        device = importlib.import_module("fastreid_vi.evaluation.device_products")
        ranks: Ranks = device.rank_product(
            query, gallery, used, labels, galleries, options.metric, normalize=options.normalize
        )
        return ranks
    return rank_product(
        Features("query", query, normalize=options.normalize),
        Features("gallery", gallery, normalize=options.normalize),
        used,
        labels,
        galleries,
        options.metric,
        options.threads,
    )


def _ids_and_cams(name: str, images: Embeddings, rule: CameraRule) -> tuple[Int, Int]:
    """Zeros for cameras where the rule looks at none and none came."""
    if images.cams is None and rule == "none":
        images = images._replace(cams=np.zeros(len(images.ids), np.int64))
    return ids_and_cams(name, images)


def over_trials(trials: list[RankMetrics], valid: Mask | None = None) -> Evaluation:
    """Mean and deviation of the galleries' metrics; `valid` of all where queries differ."""
    cmc = np.stack([trial.cmc for trial in trials])
    precision = np.array([trial.mAP for trial in trials])
    penalty = np.array([trial.mINP for trial in trials])
    if valid is None:
        valid = np.logical_and.reduce([trial.valid for trial in trials])
    return Evaluation(
        RankMetrics(cmc.mean(axis=0), float(precision.mean()), float(penalty.mean()), valid),
        RankMetrics(cmc.std(axis=0), float(precision.std()), float(penalty.std()), valid),
        trials,
    )


def average_evaluations(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Mean and deviation over separately trained models, each evaluated by itself.

    RegDB's result is this over its ten splits; so is a mean over seeds.

    Args:
        evaluations: one per model, of the same protocol and setting.
    Returns:
        `Evaluation(mean, std, trials)` whose trials are the models, each by its mean; `valid` of
        `mean` and `std` is theirs one after the other, since their queries differ.
    Raises:
        TypeError, ValueError: none, something else, or CMCs of different lengths.
    Spec: evaluation, 2.2.
    """
    trials = []
    for index, evaluation in enumerate(evaluations):
        if not isinstance(evaluation, Evaluation):
            raise TypeError(f"evaluations: expected Evaluation, got {type(evaluation).__name__}")
        # A single trial is its own mean and may know every query.
        trials.append(evaluation.trials[0] if len(evaluation.trials) == 1 else evaluation.mean)
        if len(trials[-1].cmc) != len(trials[0].cmc):
            raise ValueError(
                f"evaluations: cmc of number {index} has {len(trials[-1].cmc)} ranks, the first "
                f"has {len(trials[0].cmc)}"
            )
    if not trials:
        raise ValueError("evaluations: expected one at least, got none")
    return over_trials(trials, np.concatenate([trial.valid for trial in trials]))
