// Launch and registration of the weighted triplet loss.
#include <tuple>

#include "pairs.h"
#include "weighted.cuh"

namespace {

using fastreid_vi::Accumulator;
using fastreid_vi::input;
using fastreid_vi::kMiningThreads;
using fastreid_vi::kWeightedRows;
using fastreid_vi::kWeightedThreads;
using fastreid_vi::output;
using fastreid_vi::PairPanel;
using fastreid_vi::PairPlan;
using fastreid_vi::Rows;
using fastreid_vi::WeightedStats;
using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::Tensor;

constexpr const char* kOp = "weighted_triplet_loss";

struct Forward {
  Tensor loss, correct, positive, negative, slope, stats;
};

template <typename T>
void forward(const Rows& x, const Tensor& labels, bool stable, const Forward& out,
             cudaStream_t stream) {
  using A = Accumulator<T>;
  const PairPlan plan(x.shape, x.shape, true);
  const Tensor partial = new_empty(out.slope, {plan.scratch()});
  const Tensor terms = new_empty(out.slope, {plan.rows});
  const Tensor counters = new_empty(out.slope, {2}, ScalarType::Int);
  for (int first = 0; first < plan.rows; first += plan.panel) {
    const PairPanel panel = plan.at(first);
    fastreid_vi::launch_pairs<T, false>(plan, panel, input<T>(x.tensor), input<T>(x.tensor),
                                        x.shape, x.shape, fastreid_vi::fits_vectors<T>(x),
                                        output<A>(partial), nullptr, output<unsigned>(counters),
                                        nullptr, stream);
    fastreid_vi::launch(
        fastreid_vi::weighted_rows_kernel<A>, fastreid_vi::blocks(panel.rows), dim3(kMiningThreads),
        0, stream, input<A>(partial), input<int64_t>(labels), output<A>(terms),
        output<unsigned>(counters), output<A>(out.loss), output<int64_t>(out.correct),
        output<int64_t>(out.positive), output<int64_t>(out.negative), output<A>(out.slope),
        reinterpret_cast<WeightedStats<A>*>(output<A>(out.stats)), panel, x.shape.rows, stable);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> weighted_triplet_loss(
    const Tensor& embeddings, const Tensor& labels, bool stable) {
  const Rows x = fastreid_vi::rows_of(embeddings, kOp);
  const int64_t n = x.shape.rows;
  const Tensor own = fastreid_vi::labels_of(labels, n, kOp);
  const ScalarType wide = fastreid_vi::accumulate_type(embeddings.scalar_type());
  const fastreid_vi::OnDevice device(embeddings);
  Forward out{new_empty(embeddings, {}, wide),  new_empty(labels, {}),
              new_empty(labels, {n}),           new_empty(labels, {n}),
              new_empty(embeddings, {n}, wide), new_empty(embeddings, {n, 6}, wide)};
  if (n == 0) {
    torch::stable::fill_(out.loss, 0.0);
    torch::stable::fill_(out.correct, 0.0);
  } else {
    fastreid_vi::for_device_floating(embeddings.scalar_type(), [&]<typename T>() {
      forward<T>(x, own, stable, out, device.stream());
    });
    fastreid_vi::check_launch();
  }
  return {out.loss, out.correct, out.positive, out.negative, out.slope, out.stats};
}

struct Saved {
  Tensor grad, labels, positive, negative, slope, stats;
};

template <typename T>
void backward(const Rows& x, const Saved& saved, bool stable, const Tensor& dx,
              cudaStream_t stream) {
  using A = Accumulator<T>;
  constexpr int64_t chunk = kWeightedThreads * fastreid_vi::Vector<T>::size;
  const bool wide = fastreid_vi::fits_vectors<T>(x);
  const PairPlan plan(x.shape, x.shape, true);
  const Tensor partial = new_empty(saved.slope, {plan.scratch()});
  for (int first = 0; first < plan.rows; first += plan.panel) {
    const PairPanel panel = plan.at(first);
    fastreid_vi::launch_pairs<T, false>(plan, panel, input<T>(x.tensor), input<T>(x.tensor),
                                        x.shape, x.shape, wide, output<A>(partial), nullptr,
                                        nullptr, nullptr, stream);
    dim3 grid = fastreid_vi::blocks((panel.rows + kWeightedRows<T> - 1) / kWeightedRows<T>);
    grid.y = static_cast<unsigned>((x.shape.columns + chunk - 1) / chunk);
    fastreid_vi::launch(fastreid_vi::weighted_backward_kernel<T>, grid, dim3(kWeightedThreads), 0,
                        stream, input<A>(saved.grad), input<T>(x.tensor), input<A>(partial),
                        input<int64_t>(saved.labels), input<int64_t>(saved.positive),
                        input<int64_t>(saved.negative), input<A>(saved.slope),
                        reinterpret_cast<const WeightedStats<A>*>(input<A>(saved.stats)),
                        output<T>(dx), x.shape, panel, stable, wide);
  }
}

Tensor weighted_triplet_loss_backward(const Tensor& grad, const Tensor& embeddings,
                                      const Tensor& labels, const Tensor& positive,
                                      const Tensor& negative, const Tensor& slope,
                                      const Tensor& stats, bool stable) {
  const Rows x = fastreid_vi::rows_of(embeddings, kOp);
  const int64_t n = x.shape.rows;
  const Saved saved{fastreid_vi::values_of(grad, embeddings, 1, kOp),
                    fastreid_vi::labels_of(labels, n, kOp),
                    fastreid_vi::labels_of(positive, n, kOp),
                    fastreid_vi::labels_of(negative, n, kOp),
                    fastreid_vi::values_of(slope, embeddings, n, kOp),
                    fastreid_vi::values_of(stats, embeddings, 6 * n, kOp)};
  const fastreid_vi::OnDevice device(embeddings);
  const Tensor dx = new_empty(embeddings, {n, x.shape.columns});
  if (n == 0) return dx;
  fastreid_vi::for_device_floating(embeddings.scalar_type(), [&]<typename T>() {
    backward<T>(x, saved, stable, dx, device.stream());
  });
  fastreid_vi::check_launch();
  return dx;
}

}  // namespace

FASTREID_VI_CUDA_ROOM(m) {
  m.impl("weighted_triplet_loss", TORCH_BOX(&weighted_triplet_loss));
  m.impl("weighted_triplet_loss_backward", TORCH_BOX(&weighted_triplet_loss_backward));
}
