"""Alignment within a batch: the kernels are those of correspondences."""

from fastreid_vi.kernels.correspondence import align_features, align_features_backward

__all__ = ["align_features", "align_features_backward"]
