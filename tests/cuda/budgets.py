"""What each CUDA kernel may cost, for every type and architecture it is compiled for.

A budget is a promise about occupancy and memory width, read off the compiler's output with a little
room; raise one only with a measurement that shows the kernel is not slower for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    registers: int  # per thread; 64 lets 1024 threads share an SM, 40 lets 1536
    shared: int = (
        0  # static bytes per block, without the 1 KiB that the system takes on sm_90 and later
    )
    wide_loads: bool = True  # 128-bit loads from global memory
    wide_stores: bool = False  # 128-bit stores
    products: bool = False  # on tensor cores
    clusters: bool = False  # of blocks, which sm_80 has not: the kernel is never launched there


BUDGETS = {
    # csrc/cuda/pool.cu
    "gem_pool_channels_last_kernel": Budget(registers=48, shared=8192),
    "gem_pool_positions_kernel": Budget(registers=48),
    "gem_pool_backward_channels_last_kernel": Budget(registers=48, shared=1024, wide_stores=True),
    "gem_pool_backward_positions_kernel": Budget(registers=48, wide_stores=True),
    # csrc/cuda/pattern_pool.cu
    "pattern_scores_kernel": Budget(registers=144),  # narrower than double 128
    "pattern_softmax_kernel": Budget(registers=48, shared=1024, wide_loads=False),
    "pattern_sums_kernel": Budget(registers=128, shared=8192),
    "pattern_logit_gradient_kernel": Budget(registers=144, shared=512),  # likewise
    "pattern_softmax_gradient_kernel": Budget(registers=40, shared=512, wide_loads=False),
    "pattern_weight_gradient_kernel": Budget(registers=40, shared=512, wide_loads=False),
    # Two blocks share an SM: 111 KiB of dynamic shared memory at 2048 x 24 x 8.
    "pattern_cluster_kernel": Budget(registers=96, shared=512, products=True, clusters=True),
    # All it reads passes through shared memory, transposed.
    "pattern_features_gradient_kernel": Budget(
        registers=128, shared=20480, wide_loads=False, wide_stores=True
    ),
    # csrc/cuda/softrank.cu
    "soft_rank_warp_kernel": Budget(registers=64, wide_stores=True),
    "soft_rank_block_kernel": Budget(registers=64, shared=784, wide_stores=True),
    "soft_rank_backward_warp_kernel": Budget(registers=64, wide_stores=True),
    "soft_rank_backward_block_kernel": Budget(registers=64, shared=512, wide_stores=True),
    # csrc/cuda/cmr.cu
    "cmr_batch_kernel": Budget(registers=48, shared=512),
    "cmr_columns_kernel": Budget(registers=96, shared=9632),
    "cmr_loss_kernel": Budget(registers=88, shared=784),
    "cmr_slopes_kernel": Budget(registers=96, shared=784),
    "cmr_gradient_kernel": Budget(registers=112, shared=256, wide_stores=True),
    # csrc/cuda/pairs.cuh, in every file of a pair loss
    "pair_partials_kernel": Budget(registers=232, shared=33792),  # float 128, double 232
    # csrc/cuda/triplet.cu
    "batch_hard_rows_kernel": Budget(registers=64, shared=768),
    "batch_hard_coefficients_kernel": Budget(registers=48, shared=256),
    "batch_hard_gather_kernel": Budget(registers=48, shared=640, wide_stores=True),
    # csrc/cuda/weighted.cu
    "weighted_rows_kernel": Budget(registers=72, shared=768, wide_loads=False),
    "weighted_backward_kernel": Budget(registers=128, shared=2048, wide_stores=True),
    # csrc/cuda/cluster.cu
    "cluster_first_kernel": Budget(registers=32, wide_loads=False),
    # One block of it runs on an SM: it has no more than about a hundred.
    "cluster_centres_kernel": Budget(registers=208, shared=39424, wide_stores=True),
    "cluster_finish_kernel": Budget(registers=64, shared=512, wide_loads=False),
    "cluster_backward_kernel": Budget(registers=80, shared=1792, wide_stores=True),
    # csrc/cuda/ranking.cu; rows are read where a gallery's columns are
    "rank_rows_kernel": Budget(registers=48, shared=256, wide_loads=False),
    "nan_column_kernel": Budget(registers=40, shared=256),
    # csrc/cuda/topk.cu
    "merge_top_k_kernel": Budget(registers=48, shared=128),
    "pair_scores_kernel": Budget(registers=48, wide_loads=False),
    "row_norms_kernel": Budget(registers=40, wide_loads=False),
    # csrc/cuda/rerank.cu; lists and sparse rows are short and start anywhere
    "rerank_ranks_kernel": Budget(registers=32, wide_loads=False),
    "rerank_neighbors_kernel": Budget(registers=56, shared=256, wide_loads=False),
    "rerank_average_kernel": Budget(registers=48, shared=1280, wide_loads=False),
    "rerank_fuse_kernel": Budget(registers=64, wide_loads=False),
}
