// Launch and registration of the pattern kernels.
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "pattern_cluster.cuh"
#include "pattern_gradient.cuh"
#include "pattern_pool.cuh"
#include "stream.h"

namespace {

using fastreid_vi::Accumulator;
using fastreid_vi::FeatureMap;
using fastreid_vi::input;
using fastreid_vi::kMapGroup;
using fastreid_vi::kPatternColumns;
using fastreid_vi::kPatternThreads;
using fastreid_vi::output;
using fastreid_vi::PatternShape;
using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::Tensor;

constexpr int64_t kProgramBlocks = 512;  // that share the weight gradient: little is left to add

int64_t quotient(int64_t n, int64_t d) { return (n + d - 1) / d; }

// The features with unit stride along channels; others are copied, once.
FeatureMap channel_rows(const Tensor& x) {
  const int64_t h = x.size(2), w = x.size(3);
  const bool collapse = h == 1 || w == 1 || x.stride(2) == w * x.stride(3);
  if (collapse && (x.size(1) == 1 || x.stride(1) == 1)) return fastreid_vi::map_in_layout(x, true);
  Tensor copy = fastreid_vi::empty_map(x, true);
  torch::stable::copy_(copy, x);
  return fastreid_vi::map_in_layout(copy, true);
}

// Whether 16-byte vectors can run along the channels of all these.
bool fits_vectors(const FeatureMap& x, std::initializer_list<Tensor> others) {
  const int64_t size = fastreid_vi::kVectorBytes / x.tensor.element_size();
  const auto aligned = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % fastreid_vi::kVectorBytes == 0;
  };
  return x.channels % size == 0 && (x.positions == 1 || x.position % size == 0) &&
         (x.batches == 1 || x.batch % size == 0) && aligned(x.tensor) &&
         std::all_of(others.begin(), others.end(), aligned);
}

// A call's sizes.
struct Problem {
  FeatureMap x;
  PatternShape shape;
  bool sigmoid;
  int64_t samples, groups, tiles;

  Problem(const char* op, const Tensor& features, const Tensor& weight,
          const std::string& activation)
      : x(checked(op, features, weight)),
        shape{x.batch, x.position, static_cast<int>(x.channels), static_cast<int>(x.positions),
              static_cast<int>(weight.size(0))},
        sigmoid(activation == "sigmoid"),
        samples(x.batches),
        groups(quotient(shape.maps, kMapGroup)),
        tiles(quotient(shape.positions, fastreid_vi::kScoreTile)) {
    STD_TORCH_CHECK(sigmoid || activation == "softmax", op,
                    ": expected activation sigmoid or softmax, got ", activation);
  }

  dim3 grid(int64_t count) const {
    dim3 grid = fastreid_vi::blocks(count);
    grid.y = static_cast<unsigned>(groups);
    return grid;
  }
  Tensor grouped(const Tensor& like) const {
    return new_empty(like, {samples, groups, x.positions, kMapGroup},
                     fastreid_vi::accumulate_type(like.scalar_type()));
  }

 private:
  static FeatureMap checked(const char* op, const Tensor& features, const Tensor& weight) {
    constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 16;
    STD_TORCH_CHECK(features.dim() == 4, op, ": expected features of rank 4, got ", features.dim());
    const int64_t channels = features.size(1), positions = features.size(2) * features.size(3);
    STD_TORCH_CHECK(channels > 0 && channels <= limit && positions > 0 && positions <= limit, op,
                    ": expected 1 to ", limit, " channels and positions");
    STD_TORCH_CHECK(weight.scalar_type() == features.scalar_type() && weight.dim() > 0 &&
                        weight.size(0) > 0 && weight.size(0) <= 65535 * kMapGroup &&
                        weight.numel() == weight.size(0) * channels,
                    op, ": expected a weight [P, C, 1, 1], P >= 1, in the dtype of the features");
    return channel_rows(features);
  }
};

// A contiguous tensor of `count` elements in the features' dtype.
Tensor dense(const char* op, const char* name, const Tensor& x, ScalarType dtype, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.numel() == count, op, ": expected ", name, " of ",
                  count, " elements in the dtype of the features");
  return torch::stable::contiguous(x);
}

// Sums of scores x over all positions of every `each` samples.
template <typename T, typename Out>
void launch_sums(const Problem& problem, const Tensor& scores, const Tensor& out, int64_t each,
                 double divisor, cudaStream_t stream) {
  using A = Accumulator<T>;
  const int64_t chunks = quotient(problem.x.channels, kPatternColumns<T>);
  fastreid_vi::launch(fastreid_vi::pattern_sums_kernel<T, Out>,
                      problem.grid(quotient(problem.samples, each) * chunks), dim3(kPatternThreads),
                      0, stream, input<T>(problem.x.tensor), input<A>(scores), output<Out>(out),
                      problem.shape, problem.samples, each, static_cast<A>(divisor),
                      fits_vectors(problem.x, {}));
}

// Whether a cluster of blocks may take each sample; FASTREID_VI_CLUSTERS=0 says no.
template <typename T>
bool fits_clusters(const Problem& problem, const Tensor& weight) {
  constexpr int64_t channels = fastreid_vi::kClusterBlocks * fastreid_vi::kMatrixRows;
  if (problem.x.channels % channels || problem.shape.maps > kMapGroup) return false;
  if (problem.x.channels > 1 << 16 || problem.x.positions > 1 << 12) return false;  // no overflow
  const char* const wanted = std::getenv("FASTREID_VI_CLUSTERS");
  if (wanted != nullptr && std::string_view(wanted) == "0") return false;
  const fastreid_vi::ClusterLayout layout(problem.shape.channels, problem.shape.positions);
  const int64_t others = fastreid_vi::kPatternWarps * kMapGroup * 2 * sizeof(float);  // reductions
  return layout.bytes() + others <= fastreid_vi::shared_memory_limit() &&
         fits_vectors(problem.x, {weight}) &&
         fastreid_vi::runs_clusters(fastreid_vi::pattern_cluster_kernel<T>,
                                    fastreid_vi::kClusterBlocks, dim3(kPatternThreads),
                                    static_cast<size_t>(layout.bytes()));
}

// One pass over x.
template <typename T>
void forward_clusters(const Problem& problem, const Tensor& weight, const T* bias,
                      const Tensor& pooled, const Tensor& maps, cudaStream_t stream) {
  const fastreid_vi::ClusterLayout layout(problem.shape.channels, problem.shape.positions);
  fastreid_vi::launch_clusters(fastreid_vi::pattern_cluster_kernel<T>, fastreid_vi::kClusterBlocks,
                               fastreid_vi::blocks(problem.samples * fastreid_vi::kClusterBlocks),
                               dim3(kPatternThreads), static_cast<size_t>(layout.bytes()), stream,
                               input<T>(problem.x.tensor), input<T>(weight), bias,
                               output<T>(pooled), output<T>(maps), problem.shape, problem.sigmoid);
}

template <typename T>
void forward(const Problem& problem, const Tensor& weight, const T* bias, const Tensor& pooled,
             const Tensor& maps, cudaStream_t stream) {
  using A = Accumulator<T>;
  if constexpr (sizeof(T) == 2) {
    if (fits_clusters<T>(problem, weight)) {
      return forward_clusters<T>(problem, weight, bias, pooled, maps, stream);
    }
  }
  const Tensor scores = problem.grouped(maps);
  fastreid_vi::launch(fastreid_vi::pattern_scores_kernel<T>,
                      problem.grid(problem.samples * problem.tiles), dim3(kPatternThreads), 0,
                      stream, input<T>(problem.x.tensor), input<T>(weight), bias, output<A>(scores),
                      output<T>(maps), problem.shape, problem.sigmoid,
                      fits_vectors(problem.x, {weight}));
  if (!problem.sigmoid) {
    fastreid_vi::launch(fastreid_vi::pattern_softmax_kernel<T>, problem.grid(problem.samples),
                        dim3(kPatternThreads), 0, stream, output<A>(scores), output<T>(maps),
                        problem.shape);
  }
  launch_sums<T, T>(problem, scores, pooled, 1, problem.sigmoid ? problem.shape.positions : 1,
                    stream);
}

std::tuple<Tensor, Tensor> pattern_pool(const Tensor& features, const Tensor& weight,
                                        const std::optional<Tensor>& bias,
                                        const std::string& activation) {
  constexpr const char* op = "pattern_pool";
  const fastreid_vi::OnDevice device(features);
  const auto dtype = features.scalar_type();
  const Problem problem(op, features, weight, activation);
  const int64_t count = problem.shape.maps;
  Tensor pooled = new_empty(features, {problem.samples, count, problem.x.channels});
  Tensor maps = new_empty(features, {problem.samples, count, features.size(2), features.size(3)});
  const Tensor w = torch::stable::contiguous(weight);
  const Tensor b = bias ? dense(op, "a bias", *bias, dtype, count) : w;
  if (problem.samples == 0) return {pooled, maps};
  fastreid_vi::for_device_floating(dtype, [&]<typename T>() {
    forward<T>(problem, w, bias ? input<T>(b) : nullptr, pooled, maps, device.stream());
  });
  fastreid_vi::check_launch();
  return {pooled, maps};
}

// What the backward pass reads, contiguous, and writes.
struct Gradients {
  Tensor grad_pooled, grad_maps, weight, maps;
  Tensor dx, dw, db;
};

// dx, from dz.
template <typename T>
void features_gradient(const Problem& problem, const Gradients& g, const Tensor& dz,
                       cudaStream_t stream) {
  using A = Accumulator<T>;
  const bool last = fastreid_vi::feature_map(g.dx).channels_last();
  const int64_t rows = last ? problem.x.positions : problem.x.channels;
  const int64_t columns = last ? problem.x.channels : problem.x.positions;
  const int64_t tiles =
      quotient(rows, fastreid_vi::kRowTile) * quotient(columns, kPatternColumns<T>);
  fastreid_vi::launch(last ? fastreid_vi::pattern_features_gradient_kernel<T, true>
                           : fastreid_vi::pattern_features_gradient_kernel<T, false>,
                      fastreid_vi::blocks(problem.samples * tiles), dim3(kPatternThreads), 0,
                      stream, input<T>(g.grad_pooled), input<T>(g.weight), input<T>(g.maps),
                      input<A>(dz), output<T>(g.dx), problem.shape,
                      static_cast<A>(problem.sigmoid ? problem.x.positions : 1),
                      columns % fastreid_vi::Vector<T>::size == 0);
}

template <typename T>
void backward(const Problem& problem, const Gradients& g, cudaStream_t stream) {
  using A = Accumulator<T>;
  const int64_t rows = problem.samples * problem.tiles, elements = g.weight.numel();
  const int64_t chunks = quotient(problem.x.channels, kPatternColumns<T>);
  const int64_t each =
      std::max<int64_t>(1, quotient(problem.samples * chunks * problem.groups, kProgramBlocks));
  const int64_t units = quotient(problem.samples, each);
  const Tensor dz = problem.grouped(g.maps);
  const Tensor weight_parts = new_empty(dz, {units, elements});
  const Tensor bias_parts = new_empty(dz, {rows, problem.groups * kMapGroup}, ScalarType::Double);
  if (problem.samples > 0) {
    fastreid_vi::launch(fastreid_vi::pattern_logit_gradient_kernel<T>, problem.grid(rows),
                        dim3(kPatternThreads), 0, stream, input<T>(problem.x.tensor),
                        input<T>(g.grad_pooled), input<T>(g.grad_maps), input<T>(g.maps),
                        output<A>(dz), output<double>(bias_parts), problem.shape, problem.sigmoid,
                        fits_vectors(problem.x, {g.grad_pooled}));
    if (!problem.sigmoid) {
      fastreid_vi::launch(fastreid_vi::pattern_softmax_gradient_kernel<T>,
                          problem.grid(problem.samples), dim3(kPatternThreads), 0, stream,
                          input<T>(g.maps), output<A>(dz), problem.shape);
    }
    launch_sums<T, A>(problem, dz, weight_parts, each, 1, stream);
    features_gradient<T>(problem, g, dz, stream);
  }
  fastreid_vi::launch(fastreid_vi::pattern_weight_gradient_kernel<T>,
                      fastreid_vi::blocks(quotient(elements, kPatternThreads) + 1),
                      dim3(kPatternThreads), 0, stream, input<A>(weight_parts),
                      input<double>(bias_parts), output<T>(g.dw), output<T>(g.db), elements,
                      problem.shape.maps, units, problem.sigmoid ? rows : 0);
}

std::tuple<Tensor, Tensor, Tensor> pattern_pool_backward(const Tensor& grad_pooled,
                                                         const Tensor& grad_maps,
                                                         const Tensor& features,
                                                         const Tensor& weight, const Tensor& maps,
                                                         const std::string& activation) {
  constexpr const char* op = "pattern_pool_backward";
  const fastreid_vi::OnDevice device(features);
  const auto dtype = features.scalar_type();
  const Problem problem(op, features, weight, activation);
  const int64_t rows = problem.samples * problem.shape.maps;
  const Gradients g{dense(op, "grad_pooled", grad_pooled, dtype, rows * problem.x.channels),
                    dense(op, "grad_maps", grad_maps, dtype, rows * problem.x.positions),
                    torch::stable::contiguous(weight),
                    dense(op, "maps", maps, dtype, rows * problem.x.positions),
                    fastreid_vi::empty_map(features, fastreid_vi::is_channels_last(features)),
                    new_empty(weight, weight.sizes()),
                    new_empty(weight, {problem.shape.maps})};
  fastreid_vi::for_device_floating(dtype,
                                   [&]<typename T>() { backward<T>(problem, g, device.stream()); });
  fastreid_vi::check_launch();
  return {g.dx, g.dw, g.db};
}

}  // namespace

FASTREID_VI_CUDA_ROOM(m) {
  m.impl("pattern_pool", TORCH_BOX(&pattern_pool));
  m.impl("pattern_pool_backward", TORCH_BOX(&pattern_pool_backward));
}
