// What correspondences share: samples of maps as matrices [S, C], norms and masks, matching
// probabilities and their gradient, and which samples share a target.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common.h"
#include "cpu/elementary.h"
#include "cpu/matrix.h"

namespace fastreid_vi {

constexpr double kFloor = 1e-12;  // of norms, and of the range of a mask
// Squared distances that keep less than this share of their terms are taken from differences.
constexpr double kCancelled = 1e-3;

// Values in another type, rounded where it is narrower.
template <typename From, typename To>
FASTREID_VI_CLONES void convert(const From* __restrict from, int64_t count, To* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

// The samples of a map. Products read them where they lie; types narrower than the accumulation
// type are widened to a thread's scratch first, in the same order of axes.
template <typename T>
class Samples {
 public:
  using A = accumulate_t<T>;

  explicit Samples(const Tensor& x) : Samples(x, is_channels_last(x)) {}
  Samples(const Tensor& x, bool channels_last)
      : map_(map_in_layout(x, channels_last)), last_(channels_last) {}

  int64_t count() const { return map_.batches; }
  int64_t channels() const { return map_.channels; }
  int64_t positions() const { return map_.positions; }
  bool channels_last() const { return last_; }

  // Runs along the dense axis: positions of channels-last maps, channels of NCHW maps.
  int64_t runs() const { return last_ ? map_.positions : map_.channels; }
  int64_t width() const { return last_ ? map_.channels : map_.positions; }
  int64_t stride() const { return last_ ? map_.position : map_.channel; }
  const T* data(int64_t b) const { return map_.tensor.const_data_ptr<T>() + b * map_.batch; }

  int64_t scratch() const { return std::is_same_v<T, A> ? 0 : map_.channels * map_.positions; }
  Matrix<const A> matrix(int64_t b, A* scratch) const {
    if constexpr (std::is_same_v<T, A>) {
      return laid_out(data(b), stride());
    } else {
      for (int64_t r = 0; r < runs(); ++r) {
        convert(data(b) + r * stride(), width(), scratch + r * width());
      }
      return laid_out(static_cast<const A*>(scratch), width());
    }
  }

  // A sample of the same shape at `data`, its runs `stride` apart, as a matrix [S, C].
  template <typename E>
  Matrix<E> laid_out(E* data, int64_t stride) const {
    const int64_t row = last_ ? stride : 1, column = last_ ? 1 : stride;
    return {data, map_.positions, map_.channels, row, column};
  }

 private:
  FeatureMap map_;
  bool last_;
};

// A new map like `features`; its samples are dense.
template <typename T>
struct Result {
  using A = accumulate_t<T>;

  explicit Result(const Tensor& features)
      : tensor(empty_map(features, is_channels_last(features))),
        size(features.size(1) * features.size(2) * features.size(3)),
        data_(tensor.template mutable_data_ptr<T>()) {}
  T* data(int64_t b) const { return data_ + b * size; }

  // Where sample b is computed: in place, or in a thread's scratch that `finish` rounds.
  int64_t scratch() const { return std::is_same_v<T, A> ? 0 : size; }
  A* work(int64_t b, A* scratch) const {
    if constexpr (std::is_same_v<T, A>) {
      return data(b);
    } else {
      return scratch;
    }
  }
  void finish(int64_t b, const A* scratch) const {
    if constexpr (!std::is_same_v<T, A>) {
      convert(scratch, size, data(b));
    }
  }

  Tensor tensor;
  int64_t size;

 private:
  T* data_;
};

// Norm and sum of every position, [count, S]. All positions are summed in the same order: equal
// positions get equal norms, and a constant map a mask of zeros.
template <typename T, typename A>
FASTREID_VI_CLONES void norms_of_runs(const T* x, int64_t runs, int64_t width, int64_t stride,
                                      bool per_run, A* square, A* sum) {
  constexpr int64_t kLanes = 32;
  if (!per_run) std::fill(square, square + width, A(0)), std::fill(sum, sum + width, A(0));
  for (int64_t r = 0; r < runs; ++r) {
    const T* row = x + r * stride;
    if (per_run) {
      A squares[kLanes] = {}, sums[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        for (int64_t k = 0; k < kLanes; ++k) {
          const A value = static_cast<A>(row[i + k]);
          squares[k] += value * value;
          sums[k] += value;
        }
      }
      for (; i < width; ++i) {
        const A value = static_cast<A>(row[i]);
        squares[i % kLanes] += value * value;
        sums[i % kLanes] += value;
      }
      square[r] = sum[r] = 0;
      for (int64_t k = 0; k < kLanes; ++k) square[r] += squares[k], sum[r] += sums[k];
    } else {
      for (int64_t i = 0; i < width; ++i) {
        const A value = static_cast<A>(row[i]);
        square[i] += value * value;
        sum[i] += value;
      }
    }
  }
}

template <typename A>
struct Norms {
  template <typename T>
  explicit Norms(const Samples<T>& x)
      : positions(x.positions()),
        square(static_cast<size_t>(x.count() * positions)),
        sum(square.size()) {
    parallel(x.count(), x.channels() * positions, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) {
        norms_of_runs(x.data(b), x.runs(), x.width(), x.stride(), x.channels_last(),
                      square.data() + b * positions, sum.data() + b * positions);
      }
    });
  }
  const A* squares(int64_t b) const { return square.data() + b * positions; }
  const A* sums(int64_t b) const { return sum.data() + b * positions; }

  // 1 / norm: bounded for the forward pass, and zero in the backward pass where a position has no
  // direction to differentiate.
  void inverse(int64_t b, bool backward, double* to) const {
    for (int64_t s = 0; s < positions; ++s) {
      const double norm = std::sqrt(static_cast<double>(squares(b)[s]));
      to[s] = backward && norm < kFloor ? 0.0 : 1 / std::max(norm, kFloor);
    }
  }

  int64_t positions;
  std::vector<A> square, sum;
};

// out(s, c) += scale(s) x(s, c), run by run
template <typename T, typename A>
FASTREID_VI_CLONES void add_scaled(const T* x, int64_t runs, int64_t width, int64_t stride,
                                   bool per_run, const A* scale, A* out) {
  for (int64_t r = 0; r < runs; ++r) {
    const T* __restrict from = x + r * stride;
    A* __restrict to = out + r * width;
    if (per_run) {
      const A factor = scale[r];
      for (int64_t i = 0; i < width; ++i) to[i] += factor * static_cast<A>(from[i]);
    } else {
      for (int64_t i = 0; i < width; ++i) to[i] += scale[i] * static_cast<A>(from[i]);
    }
  }
}

template <typename A>
void min_max(A* values, int64_t count) {
  A low = values[0], high = values[0];
  for (int64_t s = 1; s < count; ++s) {
    low = std::min(low, values[s]);
    high = std::max(high, values[s]);
  }
  for (int64_t s = 0; s < count; ++s) {
    if (values[s] != values[s]) low = values[s];  // NaN spreads over the sample
  }
  const A range = (high - low) + A(kFloor);
  for (int64_t s = 0; s < count; ++s) values[s] = (values[s] - low) / range;
}

// Mask of sample b, [S].
template <typename A>
void mask_of(const Norms<A>& norms, int64_t b, A* mask) {
  for (int64_t s = 0; s < norms.positions; ++s) mask[s] = std::sqrt(norms.squares(b)[s]);
  min_max(mask, norms.positions);
}

// mask o (P target_mask), stretched to [0, 1]
template <typename A>
void comask_of(const A* p, const A* mask, const A* target_mask, int64_t size, A* out) {
  for (int64_t i = 0; i < size; ++i) {
    A seen = 0;
    for (int64_t j = 0; j < size; ++j) seen += p[i * size + j] * target_mask[j];
    out[i] = mask[i] * seen;
  }
  min_max(out, size);
}

// From inner products to P: rounded into `rounded`, and that value again in `p`, which may be the
// memory of the inner products. Logits are float64: the temperature multiplies their rounding.
template <typename T, typename A>
FASTREID_VI_CLONES void match_rows(const A* gram, const double* inverse_q, const double* inverse_k,
                                   int64_t size, double temperature, A* p, T* rounded, A* lse) {
  std::vector<double> memory(static_cast<size_t>(size));
  double* logits = memory.data();
  for (int64_t i = 0; i < size; ++i) {
    const A* g = gram + i * size;
    A* row = p + i * size;
    const double scale = temperature * inverse_q[i];
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t j = 0; j < size; ++j) {
      logits[j] = static_cast<double>(g[j]) * scale * inverse_k[j];
    }
    for (int64_t j = 0; j < size; ++j) top = logits[j] > top ? logits[j] : top;
    for (int64_t j = 0; j < size; ++j) row[j] = exponential(static_cast<A>(logits[j] - top));
    for (int64_t j = 0; j < size; ++j) sum += static_cast<double>(row[j]);
    lse[i] = static_cast<A>(top + std::log(sum));
    const A share = static_cast<A>(1 / sum);
    for (int64_t j = 0; j < size; ++j) {
      const T value = static_cast<T>(row[j] * share);
      rounded[i * size + j] = value;
      row[j] = static_cast<A>(value);
    }
  }
}

// From dP, in place, to the gradient of the inner products. radial_q and radial_k: what a position
// loses along itself, because cosines do not see its norm. P is as saved; its rows sum to one only
// nearly, and what all dP of a row share must still cancel.
template <typename T, typename A>
FASTREID_VI_CLONES void match_gradient(A* d, const T* p, const A* lse, const double* inverse_q,
                                       const double* inverse_k, int64_t size, A temperature,
                                       A* radial_q, A* radial_k) {
  std::vector<double> sums(static_cast<size_t>(2 * size));
  double *column = sums.data(), *along = column + size;
  for (int64_t i = 0; i < size; ++i) {
    A* row = d + i * size;
    const T* prob = p + i * size;
    double shared = 0, total = 0, radial = 0;
    for (int64_t j = 0; j < size; ++j) {
      const A value = static_cast<A>(prob[j]);
      shared += static_cast<double>(value) * static_cast<double>(row[j]);
      total += static_cast<double>(value);
    }
    const A mean = static_cast<A>(shared / total);
    for (int64_t j = 0; j < size; ++j) {
      const A value = static_cast<A>(prob[j]);
      const A ds = temperature * value * (row[j] - mean);
      const A cosine = (logarithm(value > A(0) ? value : A(1)) + lse[i]) / temperature;
      row[j] = ds;
      along[j] = static_cast<double>(ds * cosine);
      column[j] += along[j];
    }
    for (int64_t j = 0; j < size; ++j) radial += along[j];
    for (int64_t j = 0; j < size; ++j) row[j] *= static_cast<A>(inverse_q[i] * inverse_k[j]);
    radial_q[i] = static_cast<A>(radial * inverse_q[i] * inverse_q[i]);
  }
  for (int64_t j = 0; j < size; ++j) {
    radial_k[j] = static_cast<A>(column[j] * inverse_k[j] * inverse_k[j]);
  }
}

// index[b], held inside [0, count): an entry out of range raises after the room, and is never read.
class Index {
 public:
  Index(const Tensor& index, int64_t count)
      : rows_(torch::stable::contiguous(index)), count_(count) {}
  int64_t operator[](int64_t b) const {
    return std::clamp<int64_t>(rows_.const_data_ptr<int64_t>()[b], 0, count_ - 1);
  }

 private:
  Tensor rows_;
  int64_t count_;
};

// The samples that share each target, in rising order.
class Lists {
 public:
  Lists(const Index& index, int64_t samples, int64_t count)
      : start_(static_cast<size_t>(count + 1)), samples_(static_cast<size_t>(samples)) {
    for (int64_t b = 0; b < samples; ++b) ++start_[static_cast<size_t>(index[b] + 1)];
    for (size_t t = 1; t < start_.size(); ++t) start_[t] += start_[t - 1];
    std::vector<int64_t> next(start_.begin(), start_.end());
    for (int64_t b = 0; b < samples; ++b) {
      samples_[static_cast<size_t>(next[static_cast<size_t>(index[b])]++)] = b;
    }
  }
  struct List {
    const int64_t *first, *last;
    const int64_t* begin() const { return first; }
    const int64_t* end() const { return last; }
    bool empty() const { return first == last; }
  };
  List operator[](int64_t t) const {
    const auto at = static_cast<size_t>(t);
    return {samples_.data() + start_[at], samples_.data() + start_[at + 1]};
  }

 private:
  std::vector<int64_t> start_, samples_;
};

}  // namespace fastreid_vi
