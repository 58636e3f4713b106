// Launch and registration of the batch-hard triplet loss.
#include <string>
#include <tuple>

#include "pairs.h"
#include "triplet.cuh"

namespace {

using fastreid_vi::Accumulator;
using fastreid_vi::input;
using fastreid_vi::kGradientThreads;
using fastreid_vi::kMiningThreads;
using fastreid_vi::output;
using fastreid_vi::PairPanel;
using fastreid_vi::PairPlan;
using fastreid_vi::PairSide;
using fastreid_vi::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "batch_hard_triplet_loss";

int metric_of(const std::string& name) {
  if (name == "euclidean") return fastreid_vi::kEuclidean;
  if (name == "sqeuclidean") return fastreid_vi::kSqeuclidean;
  STD_TORCH_CHECK(name == "cosine", kOp, ": expected a known metric, got ", name);
  return fastreid_vi::kCosine;
}

// The references' rows, the embeddings' own where there are none.
Rows references_of(const std::optional<Tensor>& references, const Rows& x) {
  if (!references) return x;
  const Rows r = fastreid_vi::rows_of(*references, kOp);
  STD_TORCH_CHECK(
      r.shape.columns == x.shape.columns && r.tensor.scalar_type() == x.tensor.scalar_type(), kOp,
      ": expected references with the columns and dtype of the embeddings");
  return r;
}

struct Forward {
  Tensor loss, correct, positive, negative, weight;
};

template <typename T>
void forward(const Rows& x, const Rows& r, const Tensor& labels, const Tensor& reference_labels,
             double margin, int metric, bool self, const Forward& out, cudaStream_t stream) {
  using A = Accumulator<T>;
  using torch::stable::new_empty;
  const bool wide = fastreid_vi::fits_vectors<T>(x) && fastreid_vi::fits_vectors<T>(r);
  const PairPlan plan(x.shape, r.shape, self);
  const Tensor partial = new_empty(out.weight, {plan.scratch()});
  const Tensor norms = new_empty(out.weight, {metric == fastreid_vi::kCosine ? plan.norms() : 0});
  const Tensor terms = new_empty(out.weight, {plan.rows});
  const Tensor counters = new_empty(out.weight, {2}, ScalarType::Int);
  for (int first = 0; first < plan.rows; first += plan.panel) {
    const PairPanel panel = plan.at(first);
    const auto pairs = metric == fastreid_vi::kCosine ? fastreid_vi::launch_pairs<T, true>
                                                      : fastreid_vi::launch_pairs<T, false>;
    pairs(plan, panel, input<T>(x.tensor), input<T>(r.tensor), x.shape, r.shape, wide,
          output<A>(partial), output<A>(norms), output<unsigned>(counters), nullptr, stream);
    fastreid_vi::launch(
        fastreid_vi::batch_hard_rows_kernel<T>, fastreid_vi::blocks(panel.rows),
        dim3(kMiningThreads), 0, stream, input<A>(partial), input<A>(norms), input<T>(x.tensor),
        input<T>(r.tensor), input<int64_t>(labels), input<int64_t>(reference_labels),
        output<A>(terms), output<unsigned>(counters), output<A>(out.loss),
        output<int64_t>(out.correct), output<int64_t>(out.positive), output<int64_t>(out.negative),
        output<A>(out.weight), x.shape, r.shape, panel, static_cast<A>(margin), metric, self, wide);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_hard_triplet_loss(
    const Tensor& embeddings, const Tensor& labels, const std::optional<Tensor>& references,
    const std::optional<Tensor>& reference_labels, double margin, const std::string& metric) {
  using torch::stable::new_empty;
  STD_TORCH_CHECK(references.has_value() == reference_labels.has_value(), kOp,
                  ": expected references and reference_labels, or neither");
  const int kind = metric_of(metric);
  const Rows x = fastreid_vi::rows_of(embeddings, kOp), r = references_of(references, x);
  const int64_t n = x.shape.rows, m = r.shape.rows;
  const Tensor own = fastreid_vi::labels_of(labels, n, kOp);
  const Tensor other = references ? fastreid_vi::labels_of(*reference_labels, m, kOp) : own;
  const ScalarType wide = fastreid_vi::accumulate_type(embeddings.scalar_type());
  const fastreid_vi::OnDevice device(embeddings);
  if (n == 0 || m == 0) {
    const auto zeros = [](const Tensor& like, std::initializer_list<int64_t> sizes,
                          ScalarType dtype) {
      return torch::stable::new_zeros(like, sizes, dtype);
    };
    constexpr ScalarType index = ScalarType::Long;
    return {zeros(embeddings, {}, wide), zeros(labels, {}, index), zeros(labels, {n}, index),
            zeros(labels, {n}, index), zeros(embeddings, {n}, wide)};
  }
  const Forward out{new_empty(embeddings, {}, wide), new_empty(labels, {}), new_empty(labels, {n}),
                    new_empty(labels, {n}), new_empty(embeddings, {n}, wide)};
  fastreid_vi::for_device_floating(embeddings.scalar_type(), [&]<typename T>() {
    forward<T>(x, r, own, other, margin, kind, !references, out, device.stream());
  });
  fastreid_vi::check_launch();
  return {out.loss, out.correct, out.positive, out.negative, out.weight};
}

template <typename T>
void backward(const Tensor& grad, const Rows& x, const Rows& r, const Tensor& positive,
              const Tensor& negative, const Tensor& weight, int metric, bool self, const Tensor& dx,
              const Tensor& dr, cudaStream_t stream) {
  using A = Accumulator<T>;
  const bool wide = fastreid_vi::fits_vectors<T>(x) && fastreid_vi::fits_vectors<T>(r);
  const int64_t n = x.shape.rows, rows = n + (self ? 0 : r.shape.rows);
  constexpr int64_t chunk = kGradientThreads * fastreid_vi::Vector<T>::size;
  const Tensor scratch = torch::stable::new_empty(weight, {2 * n * 3});
  auto* const sides = reinterpret_cast<PairSide<A>*>(output<A>(scratch));
  dim3 grid = fastreid_vi::blocks(rows);
  grid.y = static_cast<unsigned>((x.shape.columns + chunk - 1) / chunk);
  fastreid_vi::launch(fastreid_vi::batch_hard_coefficients_kernel<T>, fastreid_vi::blocks(2 * n),
                      dim3(kGradientThreads), 0, stream, input<A>(grad), input<T>(x.tensor),
                      input<T>(r.tensor), input<int64_t>(positive), input<int64_t>(negative),
                      input<A>(weight), sides, x.shape, r.shape, metric, self, wide);
  fastreid_vi::launch(fastreid_vi::batch_hard_gather_kernel<T>, grid, dim3(kGradientThreads), 0,
                      stream, input<T>(x.tensor), input<T>(r.tensor), input<int64_t>(positive),
                      input<int64_t>(negative), sides, output<T>(dx), output<T>(dr), x.shape,
                      r.shape, self, wide);
}

std::tuple<Tensor, Tensor> batch_hard_triplet_loss_backward(
    const Tensor& grad, const Tensor& embeddings, const std::optional<Tensor>& references,
    const Tensor& positive, const Tensor& negative, const Tensor& weight,
    const std::string& metric) {
  using torch::stable::new_empty;
  const int kind = metric_of(metric);
  const Rows x = fastreid_vi::rows_of(embeddings, kOp), r = references_of(references, x);
  const int64_t n = x.shape.rows, m = r.shape.rows, columns = x.shape.columns;
  const Tensor near = fastreid_vi::labels_of(positive, n, kOp);
  const Tensor far = fastreid_vi::labels_of(negative, n, kOp);
  const Tensor scale = fastreid_vi::values_of(weight, embeddings, n, kOp);
  const Tensor slope = fastreid_vi::values_of(grad, embeddings, 1, kOp);
  const fastreid_vi::OnDevice device(embeddings);
  if (n == 0 || m == 0) {
    const Tensor dx = torch::stable::new_zeros(embeddings, {n, columns});
    if (!references) return {dx, new_empty(embeddings, {0})};
    return {dx, torch::stable::new_zeros(embeddings, {m, columns})};
  }
  const Tensor dx = new_empty(embeddings, {n, columns});
  const Tensor dr = references ? new_empty(embeddings, {m, columns}) : new_empty(embeddings, {0});
  fastreid_vi::for_device_floating(embeddings.scalar_type(), [&]<typename T>() {
    backward<T>(slope, x, r, near, far, scale, kind, !references, dx, dr, device.stream());
  });
  fastreid_vi::check_launch();
  return {dx, dr};
}

}  // namespace

FASTREID_VI_CUDA_ROOM(m) {
  m.impl("batch_hard_triplet_loss", TORCH_BOX(&batch_hard_triplet_loss));
  m.impl("batch_hard_triplet_loss_backward", TORCH_BOX(&batch_hard_triplet_loss_backward));
}
