// Launch and registration of the centre cluster loss.
#include <tuple>

#include "cluster.cuh"
#include "pairs.h"

namespace {

using fastreid_vi::Accumulator;
using fastreid_vi::input;
using fastreid_vi::kClusterColumns;
using fastreid_vi::kClusterFinishThreads;
using fastreid_vi::kClusterRows;
using fastreid_vi::kClusterThreads;
using fastreid_vi::output;
using fastreid_vi::PairPanel;
using fastreid_vi::PairPlan;
using fastreid_vi::RowMatrix;
using fastreid_vi::Rows;
using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::Tensor;

constexpr const char* kOp = "center_cluster_loss";
constexpr int64_t kGapScratch = 1 << 24;  // elements, for the parts of [N, N]

// The centres, what belongs to them, and where their gaps are.
struct Clusters {
  Tensor centres, integers, squares, gaps;
  int rows, depth, parts;
  bool whole;  // the first kernel does the gaps too
  PairPlan plan;

  Clusters(const Rows& x, const Tensor& like, int64_t chunk, bool radii)
      : rows(x.shape.rows),
        whole(rows <= kClusterRows),
        plan({x.shape.columns, rows, x.shape.columns}, {x.shape.columns, rows, x.shape.columns},
             true) {
    const int64_t n = rows, columns = x.shape.columns, chunks = (columns + chunk - 1) / chunk;
    const int64_t most = whole ? std::clamp<int64_t>(kGapScratch / (n * n), 1, chunks) : chunks;
    depth = static_cast<int>((chunks + most - 1) / most * chunk);
    parts = static_cast<int>((columns + depth - 1) / depth);
    centres = new_empty(like, {n, columns});
    integers = new_empty(like, {n + 3}, ScalarType::Int);
    squares = new_empty(like, {radii ? parts * n : 0});
    gaps = new_empty(like, {whole ? parts * n * n : plan.scratch()});
  }
  int* speakers() const { return output<int>(integers); }
  int* identities() const { return speakers() + rows; }
  unsigned* counters() const { return reinterpret_cast<unsigned*>(speakers() + rows + 1); }
};

// labels: null where `first` is known.
template <typename T>
void find_centres(const Clusters& clusters, const Rows& x, const int64_t* labels, int64_t* first,
                  cudaStream_t stream) {
  using A = Accumulator<T>;
  const bool whole = clusters.whole;
  const dim3 batches = fastreid_vi::blocks((clusters.rows + kClusterThreads - 1) / kClusterThreads);
  if (!whole && labels != nullptr) {
    fastreid_vi::launch(fastreid_vi::cluster_first_kernel<int64_t>, batches, dim3(kClusterThreads),
                        0, stream, labels, first, clusters.rows);
    labels = nullptr;
  }
  STD_TORCH_CHECK(batches.x <= 65535, kOp, ": expected fewer than 2^24 rows");
  const dim3 grid(static_cast<unsigned>(clusters.parts), whole ? 1 : batches.x);
  const bool radii = clusters.squares.numel() > 0;
  fastreid_vi::launch(fastreid_vi::cluster_centres_kernel<T>, grid, dim3(kClusterThreads), 0,
                      stream, input<T>(x.tensor), labels, first, output<A>(clusters.centres),
                      clusters.speakers(), clusters.identities(),
                      radii ? output<A>(clusters.squares) : nullptr,
                      whole ? output<A>(clusters.gaps) : nullptr, clusters.counters(), x.shape,
                      clusters.depth, fastreid_vi::fits_vectors<T>(x));
}

// Calls body(panel) when the gaps of the panel's centres to all others are known.
template <typename A, typename Body>
void for_gaps(const Clusters& clusters, cudaStream_t stream, Body&& body) {
  if (clusters.whole) return body(PairPanel{0, clusters.rows, clusters.parts});
  const int columns = static_cast<int>(clusters.centres.size(1));
  const RowMatrix shape{columns, clusters.rows, columns};
  const bool wide = columns % fastreid_vi::Vector<A>::size == 0;
  for (int from = 0; from < clusters.rows; from += clusters.plan.panel) {
    const PairPanel panel = clusters.plan.at(from);
    const A* const centres = input<A>(clusters.centres);
    fastreid_vi::launch_pairs<A, false>(clusters.plan, panel, centres, centres, shape, shape, wide,
                                        output<A>(clusters.gaps), nullptr, nullptr,
                                        clusters.identities(), stream);
    body(panel);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> center_cluster_loss(const Tensor& embeddings,
                                                                       const Tensor& labels,
                                                                       double margin) {
  const Rows x = fastreid_vi::rows_of(embeddings, kOp);
  const int64_t n = x.shape.rows;
  const Tensor own = fastreid_vi::labels_of(labels, n, kOp);
  const ScalarType wide = fastreid_vi::accumulate_type(embeddings.scalar_type());
  const fastreid_vi::OnDevice device(embeddings);
  Tensor loss = new_empty(embeddings, {}, wide), pull = new_empty(embeddings, {}, wide);
  Tensor push = new_empty(embeddings, {}, wide);
  const Tensor first = new_empty(own, {n}), radius = new_empty(embeddings, {n}, wide);
  if (n == 0) {
    for (Tensor* zero : {&loss, &pull, &push}) torch::stable::fill_(*zero, 0.0);
    return {loss, pull, push, first, radius};
  }
  fastreid_vi::for_device_floating(embeddings.scalar_type(), [&]<typename T>() {
    using A = Accumulator<T>;
    const Clusters clusters(x, radius, kClusterColumns<T>, true);
    const Tensor terms = new_empty(radius, {2 * n});
    find_centres<T>(clusters, x, input<int64_t>(own), output<int64_t>(first), device.stream());
    for_gaps<A>(clusters, device.stream(), [&](PairPanel panel) {
      fastreid_vi::launch(fastreid_vi::cluster_finish_kernel<A>, fastreid_vi::blocks(panel.rows),
                          dim3(kClusterFinishThreads), 0, device.stream(),
                          input<A>(clusters.squares), input<A>(clusters.gaps),
                          clusters.identities(), output<A>(terms), clusters.counters(),
                          output<A>(loss), output<A>(pull), output<A>(push), output<A>(radius),
                          panel, clusters.rows, clusters.parts, static_cast<A>(margin));
    });
  });
  fastreid_vi::check_launch();
  return {loss, pull, push, first, radius};
}

Tensor center_cluster_loss_backward(const Tensor& grad_pull, const Tensor& grad_push,
                                    const Tensor& embeddings, const Tensor& first,
                                    const Tensor& radius, double margin) {
  const Rows x = fastreid_vi::rows_of(embeddings, kOp);
  const int64_t n = x.shape.rows, columns = x.shape.columns;
  const Tensor pull = fastreid_vi::values_of(grad_pull, embeddings, 1, kOp);
  const Tensor push = fastreid_vi::values_of(grad_push, embeddings, 1, kOp);
  const Tensor speaker = fastreid_vi::labels_of(first, n, kOp);
  const Tensor length = fastreid_vi::values_of(radius, embeddings, n, kOp);
  const fastreid_vi::OnDevice device(embeddings);
  const Tensor dx = new_empty(embeddings, {n, columns});
  if (n == 0) return dx;
  fastreid_vi::for_device_floating(embeddings.scalar_type(), [&]<typename T>() {
    using A = Accumulator<T>;
    constexpr int64_t chunk = kClusterFinishThreads * fastreid_vi::Vector<T>::size;
    const Clusters clusters(x, length, kClusterColumns<T>, false);
    find_centres<T>(clusters, x, nullptr, output<int64_t>(speaker), device.stream());
    for_gaps<A>(clusters, device.stream(), [&](PairPanel panel) {
      dim3 grid = fastreid_vi::blocks(panel.rows);
      grid.y = static_cast<unsigned>((columns + chunk - 1) / chunk);
      fastreid_vi::launch(fastreid_vi::cluster_backward_kernel<T>, grid,
                          dim3(kClusterFinishThreads), 0, device.stream(), input<A>(pull),
                          input<A>(push), input<T>(x.tensor), input<int64_t>(speaker),
                          input<A>(length), input<A>(clusters.centres), clusters.speakers(),
                          clusters.identities(), input<A>(clusters.gaps), output<T>(dx), x.shape,
                          panel, static_cast<A>(margin), fastreid_vi::fits_vectors<T>(x));
    });
  });
  fastreid_vi::check_launch();
  return dx;
}

}  // namespace

FASTREID_VI_CUDA_ROOM(m) {
  m.impl("center_cluster_loss", TORCH_BOX(&center_cluster_loss));
  m.impl("center_cluster_loss_backward", TORCH_BOX(&center_cluster_loss_backward));
}
