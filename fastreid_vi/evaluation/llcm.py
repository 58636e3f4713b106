"""LLCM: ten galleries of one image for each person and camera of the other modality."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise
from typing import Literal

import numpy as np

from fastreid_vi.evaluation.arrays import Int, at_least_one, choice, to_numpy
from fastreid_vi.evaluation.directions import Direction, check_direction
from fastreid_vi.evaluation.galleries import Embeddings, ids_and_cams
from fastreid_vi.evaluation.positions import CameraRule
from fastreid_vi.evaluation.products import Metric
from fastreid_vi.evaluation.protocols import (
    Evaluation,
    Options,
    evaluate_galleries,
    make_options,
    over_trials,
    rank_galleries,
)
from fastreid_vi.evaluation.ranking import CmcBy, summarize
from fastreid_vi.evaluation.reranked import Rerank, check_rerank, turned

VisToIr = Literal["paper", "released"]


def evaluate_llcm(
    query: Embeddings,
    gallery: Embeddings,
    *,
    trials: int = 10,
    vis_to_ir: VisToIr = "paper",
    direction: Direction | None = None,
    rerank: Rerank | None = None,
    normalize: bool = True,
    metric: Metric = "cosine",
    cmc_by: CmcBy | None = None,
    camera_rule: CameraRule | None = None,
    max_rank: int | None = None,
    per_query: bool = False,
    threads: int | None = None,
) -> Evaluation:
    """One direction of LLCM: all queries search ten drawn galleries.

    Args:
        query, gallery: all test images of one modality and of the other, with cameras. A gallery's
            draw goes over the files of a person and camera by name: give `paths`, or rows in the
            order of the names.
        trials: galleries, drawn with the seeds 0, 1, ...
        vis_to_ir: for visible queries, "paper" is what the paper describes; "released" what the
            released code computes, one image of each person and camera of the infrared `gallery`
            searching all visible `query` images. A published figure must say which it is. Infrared
            queries do not feel it.
        direction: "vis_to_ir" or "ir_to_vis" to have it checked against the folders in the paths;
            None takes the one they tell. Where neither is known "released" exchanges the sides.
        rerank: as for `evaluate_sysu`. With "released" every trial's infrared images are queries by
            themselves.
        normalize: divide features by their L2 norm first.
        metric: as for `evaluate_sysu`.
        cmc_by, camera_rule, max_rank, per_query, threads: as for `rank_metrics`.
    Returns:
        `Evaluation(mean, std, trials)`; with "released", `valid` of a trial is about the images
        drawn, by (pid, camera).
    Raises:
        TypeError, ValueError: the argument that does not fit, by name.
    Spec: evaluation, 2.3. Golden: eval/eval_llcm. Backends: retrieval.
    """
    choice("vis_to_ir", vis_to_ir, VisToIr)
    options = make_options(
        "llcm", normalize, metric, cmc_by, camera_rule, max_rank, per_query, threads, rerank
    )
    found = check_direction(query, gallery, direction)
    check_rerank(rerank, found)
    drawn = llcm_galleries(gallery, trials)
    if vis_to_ir == "paper" or found == "ir_to_vis":
        return evaluate_galleries(query, gallery, {"llcm": drawn}, options)["llcm"]
    options = dataclasses.replace(options, rerank=turned(rerank, "ir_to_vis"))
    return _released(gallery, query, drawn, options)


def llcm_table(
    infrared: Embeddings,
    visible: Embeddings,
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
    """Both directions and the released form of the second; arguments as for `evaluate_llcm`.

    A `MultiSpectral` takes the direction of each search.

    Returns:
        "ir_to_vis", "vis_to_ir" and "vis_to_ir/released" -> evaluation.
    """

    def one(direction: Direction, vis_to_ir: VisToIr) -> Evaluation:
        return evaluate_llcm(
            *((visible, infrared) if direction == "vis_to_ir" else (infrared, visible)),
            trials=trials,
            vis_to_ir=vis_to_ir,
            direction=direction,
            rerank=turned(rerank, direction),
            normalize=normalize,
            metric=metric,
            cmc_by=cmc_by,
            camera_rule=camera_rule,
            max_rank=max_rank,
            per_query=per_query,
            threads=threads,
        )

    return {
        "ir_to_vis": one("ir_to_vis", "paper"),
        "vis_to_ir": one("vis_to_ir", "paper"),
        "vis_to_ir/released": one("vis_to_ir", "released"),
    }


def llcm_galleries(gallery: Embeddings, trials: int = 10) -> list[Int]:
    """Rows of `gallery` that each trial searches, by (pid, camera).

    Returns:
        One int64 vector per trial: `random.seed(trial)`, then one `random.choice` among the images
        of every person and camera, both ascending.
    Raises:
        TypeError, ValueError: the argument that does not fit, by name.
    Spec: evaluation, 2.3.
    """
    at_least_one("trials", trials)
    folders = _folders(gallery)
    galleries = []
    for trial in range(trials):
        draw = random.Random(trial)
        galleries.append(np.array([draw.choice(rows) for rows in folders], np.int64))
    return galleries


def _folders(gallery: Embeddings) -> list[list[int]]:
    """Rows of each (pid, camera), ascending; inside by path, or as they come without paths."""
    ids, cams = ids_and_cams("gallery", gallery)
    names = np.arange(len(ids))
    if gallery.paths is not None:
        names = np.array([str(path) for path in gallery.paths])
    order = np.lexsort((names, cams, ids))
    new = (np.diff(ids[order]) != 0) | (np.diff(cams[order]) != 0)
    limits = [0, *(np.flatnonzero(new) + 1).tolist(), len(order)]
    return [order[a:b].tolist() for a, b in pairwise(limits)]


def _released(
    query: Embeddings, gallery: Embeddings, drawn: list[Int], options: Options
) -> Evaluation:
    """The rows `drawn` of `query` search the whole gallery."""
    everything = [np.arange(len(gallery.ids))]
    searched = f"the {len(gallery.ids)} gallery images of llcm, as released"
    if options.rerank is None:  # every row is ranked once
        ranks = rank_galleries(query, gallery, everything, options).gallery(0)
        trials = [ranks.queries(rows) for rows in drawn]
    else:
        trials = [
            rank_galleries(_some(query, rows), gallery, everything, options).gallery(0)
            for rows in drawn
        ]
    return over_trials(
        [
            summarize(ranks, options.cmc_by, options.max_rank, options.per_query, searched)
            for ranks in trials
        ]
    )


def _some(images: Embeddings, rows: Int) -> Embeddings:
    """Features, identities and cameras of some images."""
    features = to_numpy("query.features", images.features)
    ids, cams = ids_and_cams("query", images)
    return Embeddings(features[rows], ids[rows], cams[rows])
