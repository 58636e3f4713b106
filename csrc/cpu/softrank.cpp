// Soft ranks of the rows of a matrix, and their gradient.
#include "softrank.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace {

using fastreid_vi::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> soft_rank(const Tensor& values, double strength, bool descending) {
  const Tensor rows = fastreid_vi::with_unit_rows(values);
  const int64_t count = rows.size(0), n = rows.size(1);
  Tensor ranks = torch::stable::new_empty(rows, {count, n});
  Tensor blocks = torch::stable::new_empty(rows, {count, n}, ScalarType::Int);
  fastreid_vi::for_floating(values.scalar_type(), [&]<typename T>() {
    const T* x = rows.const_data_ptr<T>();
    T* y = ranks.mutable_data_ptr<T>();
    int32_t* starts = blocks.mutable_data_ptr<int32_t>();
    const int64_t stride = rows.stride(0);
    fastreid_vi::parallel(n > 0 ? count : 0, n, [&](int64_t from, int64_t to) {
      fastreid_vi::SoftRanker<T> ranker(n, strength, descending);
      for (int64_t r = from; r < to; ++r) ranker.row(x + r * stride, y + r * n, starts + r * n);
    });
  });
  return {ranks, blocks};
}

Tensor soft_rank_backward(const Tensor& grad, const Tensor& blocks, double strength,
                          bool descending) {
  const Tensor rows = fastreid_vi::with_unit_rows(grad),
               starts = fastreid_vi::with_unit_rows(blocks);
  const int64_t count = rows.size(0), n = rows.size(1);
  Tensor out = torch::stable::new_empty(rows, {count, n});
  fastreid_vi::for_floating(grad.scalar_type(), [&]<typename T>() {
    const T* g = rows.const_data_ptr<T>();
    const int32_t* block = starts.const_data_ptr<int32_t>();
    T* dx = out.mutable_data_ptr<T>();
    const int64_t stride = rows.stride(0), block_stride = starts.stride(0);
    const double scale = (descending ? -1.0 : 1.0) / strength;
    fastreid_vi::parallel(n > 0 ? count : 0, n, [&](int64_t from, int64_t to) {
      fastreid_vi::BlockCentring<T> centring(n);
      for (int64_t r = from; r < to; ++r) {
        centring.row(g + r * stride, block + r * block_stride, scale, dx + r * n);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("soft_rank", TORCH_BOX(&soft_rank));
  m.impl("soft_rank_backward", TORCH_BOX(&soft_rank_backward));
}
