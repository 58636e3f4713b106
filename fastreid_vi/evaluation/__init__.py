"""Exact evaluation on NumPy, torch, CuPy or DLPack arrays; loads no torch."""

from fastreid_vi.evaluation.bootstrap import Interval, Intervals, bootstrap_interval
from fastreid_vi.evaluation.cameras import CameraMatrix, camera_matrix
from fastreid_vi.evaluation.chance import chance_llcm, chance_regdb, chance_sysu
from fastreid_vi.evaluation.directions import DIRECTION_NAMES, Direction
from fastreid_vi.evaluation.embeddings import EmbeddingsError, load_embeddings, save_embeddings
from fastreid_vi.evaluation.exact_search import SearchResult, search
from fastreid_vi.evaluation.galleries import Embeddings, sysu_galleries
from fastreid_vi.evaluation.llcm import evaluate_llcm, llcm_galleries, llcm_table
from fastreid_vi.evaluation.protocols import (
    Evaluation,
    average_evaluations,
    evaluate_sysu,
    sysu_table,
)
from fastreid_vi.evaluation.ranking import PerQuery, RankMetrics, rank_metrics
from fastreid_vi.evaluation.regdb import evaluate_regdb, regdb_table
from fastreid_vi.evaluation.rerank import (
    k_reciprocal_rerank,
    multi_spectral_rerank,
    rerank_memory,
)
from fastreid_vi.evaluation.reranked import KReciprocal, MultiSpectral
from fastreid_vi.evaluation.sharded import sharded_search

__all__ = [
    "DIRECTION_NAMES",
    "CameraMatrix",
    "Direction",
    "Embeddings",
    "EmbeddingsError",
    "Evaluation",
    "Interval",
    "Intervals",
    "KReciprocal",
    "MultiSpectral",
    "PerQuery",
    "RankMetrics",
    "SearchResult",
    "average_evaluations",
    "bootstrap_interval",
    "camera_matrix",
    "chance_llcm",
    "chance_regdb",
    "chance_sysu",
    "evaluate_llcm",
    "evaluate_regdb",
    "evaluate_sysu",
    "k_reciprocal_rerank",
    "llcm_galleries",
    "llcm_table",
    "load_embeddings",
    "multi_spectral_rerank",
    "rank_metrics",
    "regdb_table",
    "rerank_memory",
    "save_embeddings",
    "search",
    "sharded_search",
    "sysu_galleries",
    "sysu_table",
]
