"""Fused, differentiable ops for visible-infrared re-identification."""

from fastreid_vi.ops.adapter import distribution_adapter
from fastreid_vi.ops.alignment import Alignment, DenseAlignment, align_features, dense_alignment
from fastreid_vi.ops.cluster import CenterCluster, center_cluster_loss
from fastreid_vi.ops.correspondence import (
    Correspondence,
    correspondence_probability,
    correspondence_warp,
    feature_mask,
)
from fastreid_vi.ops.dense_triplet import dense_triplet_loss
from fastreid_vi.ops.distance import pairwise_distance
from fastreid_vi.ops.instance_norm import instance_norm_act
from fastreid_vi.ops.norm import modality_alleviation
from fastreid_vi.ops.pool import PatternPool, gem_pool, map_separation_loss, pattern_pool
from fastreid_vi.ops.resize import resize_normalize
from fastreid_vi.ops.softrank import cross_modality_retrieval_loss, soft_rank
from fastreid_vi.ops.triplet import TripletLoss, batch_hard_triplet_loss, weighted_triplet_loss

__all__ = [
    "Alignment",
    "CenterCluster",
    "Correspondence",
    "DenseAlignment",
    "PatternPool",
    "TripletLoss",
    "align_features",
    "batch_hard_triplet_loss",
    "center_cluster_loss",
    "correspondence_probability",
    "correspondence_warp",
    "cross_modality_retrieval_loss",
    "dense_alignment",
    "dense_triplet_loss",
    "distribution_adapter",
    "feature_mask",
    "gem_pool",
    "instance_norm_act",
    "map_separation_loss",
    "modality_alleviation",
    "pairwise_distance",
    "pattern_pool",
    "resize_normalize",
    "soft_rank",
    "weighted_triplet_loss",
]
