"""Exact evaluation on NumPy, torch, CuPy or DLPack arrays; loads no torch."""

from fastreid_vi.evaluation.chance import chance_sysu
from fastreid_vi.evaluation.galleries import Embeddings, sysu_galleries
from fastreid_vi.evaluation.protocols import Evaluation, evaluate_sysu, sysu_table
from fastreid_vi.evaluation.ranking import PerQuery, RankMetrics, rank_metrics

__all__ = [
    "Embeddings",
    "Evaluation",
    "PerQuery",
    "RankMetrics",
    "chance_sysu",
    "evaluate_sysu",
    "rank_metrics",
    "sysu_galleries",
    "sysu_table",
]
