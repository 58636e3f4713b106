// Launch and registration of the soft-rank kernels.
#include <tuple>

#include "softrank.cuh"
#include "stream.h"

namespace {

using fastreid_vi::input;
using fastreid_vi::kSoftRankSlotBytes;
using fastreid_vi::kSoftRankThreads;
using fastreid_vi::kSoftRankWarpRow;
using fastreid_vi::kSoftRankWarps;
using fastreid_vi::kWarp;
using fastreid_vi::output;
using torch::stable::Tensor;

struct Plan {
  int64_t rows;
  int n, padded;
  bool warps;
  dim3 grid, block;
  size_t shared_bytes;
};

Plan plan_for(const char* op, int64_t rows, int64_t n) {
  const int64_t limit = fastreid_vi::shared_memory_limit() - 1024;  // the reductions take some
  const bool fits = n <= fastreid_vi::kSoftRankLongest &&
                    fastreid_vi::sort_padded(static_cast<int>(n)) * kSoftRankSlotBytes <= limit;
  STD_TORCH_CHECK(fits, op, ": rows of ", n,
                  " entries do not fit the shared memory of this device, ", limit, " bytes of ",
                  kSoftRankSlotBytes, " for each entry up to the next power of 2");
  const int padded = fastreid_vi::sort_padded(static_cast<int>(n));
  const bool warps = n <= kSoftRankWarpRow;
  const int64_t per_block = warps ? kSoftRankWarps : 1;
  return {rows,
          static_cast<int>(n),
          padded,
          warps,
          fastreid_vi::blocks((rows + per_block - 1) / per_block),
          dim3(warps ? kSoftRankWarps * kWarp : kSoftRankThreads),
          static_cast<size_t>(padded * kSoftRankSlotBytes * per_block)};
}

std::tuple<Tensor, Tensor> soft_rank(const Tensor& values, double strength, bool descending) {
  STD_TORCH_CHECK(values.dim() == 2, "soft_rank: expected values of rank 2, got ", values.dim());
  const fastreid_vi::OnDevice device(values);
  const int64_t rows = values.size(0), n = values.size(1);
  Tensor ranks = torch::stable::new_empty(values, {rows, n});
  Tensor blocks = torch::stable::new_empty(values, {rows, n}, torch::headeronly::ScalarType::Int);
  if (rows == 0 || n == 0) return {ranks, blocks};
  const Plan plan = plan_for("soft_rank", rows, n);
  const Tensor from = n == 1 || values.stride(1) == 1 ? values : torch::stable::contiguous(values);
  fastreid_vi::for_device_floating(values.scalar_type(), [&]<typename T>() {
    fastreid_vi::launch(
        plan.warps ? fastreid_vi::soft_rank_warp_kernel<T> : fastreid_vi::soft_rank_block_kernel<T>,
        plan.grid, plan.block, plan.shared_bytes, device.stream(), input<T>(from), output<T>(ranks),
        output<int>(blocks), rows, from.stride(0), plan.n, plan.padded,
        descending ? -strength : strength);
  });
  fastreid_vi::check_launch();
  return {ranks, blocks};
}

Tensor soft_rank_backward(const Tensor& grad, const Tensor& blocks, double strength,
                          bool descending) {
  STD_TORCH_CHECK(grad.dim() == 2 && blocks.dim() == 2 && grad.size(0) == blocks.size(0) &&
                      grad.size(1) == blocks.size(1),
                  "soft_rank_backward: expected grad and blocks of one shape [R, n]");
  STD_TORCH_CHECK(blocks.scalar_type() == torch::headeronly::ScalarType::Int,
                  "soft_rank_backward: expected int32 blocks");
  const fastreid_vi::OnDevice device(grad);
  const int64_t rows = grad.size(0), n = grad.size(1);
  Tensor dvalues = torch::stable::new_empty(grad, {rows, n});
  if (rows == 0 || n == 0) return dvalues;
  const Plan plan = plan_for("soft_rank_backward", rows, n);
  const Tensor from = torch::stable::contiguous(grad), block = torch::stable::contiguous(blocks);
  fastreid_vi::for_device_floating(grad.scalar_type(), [&]<typename T>() {
    fastreid_vi::launch(plan.warps ? fastreid_vi::soft_rank_backward_warp_kernel<T>
                                   : fastreid_vi::soft_rank_backward_block_kernel<T>,
                        plan.grid, plan.block, plan.shared_bytes, device.stream(), input<T>(from),
                        input<int>(block), output<T>(dvalues), rows, plan.n, plan.padded,
                        descending ? -strength : strength);
  });
  fastreid_vi::check_launch();
  return dvalues;
}

}  // namespace

FASTREID_VI_CUDA_ROOM(m) {
  m.impl("soft_rank", TORCH_BOX(&soft_rank));
  m.impl("soft_rank_backward", TORCH_BOX(&soft_rank_backward));
}
