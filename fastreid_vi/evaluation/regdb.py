"""RegDB: all images of one modality search all images of the other."""

from __future__ import annotations

import numpy as np

from fastreid_vi.evaluation.directions import Direction, check_direction
from fastreid_vi.evaluation.galleries import Embeddings
from fastreid_vi.evaluation.positions import CameraRule
from fastreid_vi.evaluation.products import Metric
from fastreid_vi.evaluation.protocols import Evaluation, evaluate_galleries, make_options
from fastreid_vi.evaluation.ranking import CmcBy
from fastreid_vi.evaluation.reranked import Rerank, check_rerank, turned


def evaluate_regdb(
    query: Embeddings,
    gallery: Embeddings,
    *,
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
    """One trial of RegDB, one direction: every query searches the whole gallery.

    The published result is the mean over the ten trials, each with its own trained model. MPANet's
    own figures: `cmc_by="identity", normalize=False, metric="sqeuclidean"`; MCJA's:
    `cmc_by="identity"`.

    Args:
        query, gallery: test images of one modality and of the other; neither cameras nor paths are
            needed.
        direction: "vis_to_ir" or "ir_to_vis" to have it checked against the folders in the paths;
            None only refuses query and gallery of one modality.
        rerank: as for `evaluate_sysu`. The published figures take `neighbors="all"`.
        normalize: divide features by their L2 norm first.
        metric: as for `evaluate_sysu`.
        cmc_by, camera_rule, max_rank, per_query, threads: as for `rank_metrics`.
    Returns:
        `Evaluation(mean, std, trials)` of this one trial.
    Raises:
        TypeError, ValueError: the argument that does not fit, by name.
    Spec: evaluation, 2.2. Golden: eval/eval_regdb. Backends: retrieval.
    """
    options = make_options(
        "regdb", normalize, metric, cmc_by, camera_rule, max_rank, per_query, threads, rerank
    )
    check_rerank(rerank, check_direction(query, gallery, direction))
    everything = {"regdb": [np.arange(len(gallery.ids))]}
    return evaluate_galleries(query, gallery, everything, options)["regdb"]


def regdb_table(
    infrared: Embeddings,
    visible: Embeddings,
    *,
    rerank: Rerank | None = None,
    normalize: bool = True,
    metric: Metric = "cosine",
    cmc_by: CmcBy | None = None,
    camera_rule: CameraRule | None = None,
    max_rank: int | None = None,
    per_query: bool = False,
    threads: int | None = None,
) -> dict[str, Evaluation]:
    """Both directions; arguments as for `evaluate_regdb`.

    A `MultiSpectral` takes the direction of each search.

    Returns:
        "vis_to_ir" and "ir_to_vis" -> evaluation.
    """
    directions: tuple[Direction, ...] = ("vis_to_ir", "ir_to_vis")
    return {
        direction: evaluate_regdb(
            *((visible, infrared) if direction == "vis_to_ir" else (infrared, visible)),
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
        for direction in directions
    }
