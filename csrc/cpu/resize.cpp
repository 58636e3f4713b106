// Bilinear resize and normalisation. A result row blends two source rows that are already resized
// along the width, and neighbouring result rows share them; backward gathers, along each axis, the
// results that a source pixel went into. Both read tensors of any strides where they lie.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "common.h"

namespace {

using fastreid_vi::accumulate_t;
using torch::stable::Tensor;

constexpr int64_t kBand = 32;  // result rows that a thread takes at a time

// Where each result along one axis looks: neighbours and the weight of the upper one. The
// coordinate times 2 results is a whole number, so that only the weight is rounded.
struct Axis {
  Axis(int64_t results, int64_t sources) : results(results), sources(sources) {
    for (int64_t i = 0; i < results; ++i) {
      const int64_t numerator = std::max<int64_t>((2 * i + 1) * sources - results, 0);
      const int64_t from = numerator / (2 * results);
      low.push_back(from);
      high.push_back(std::min(from + 1, sources - 1));
      fraction.push_back(static_cast<double>(numerator % (2 * results)) /
                         static_cast<double>(2 * results));
    }
  }
  int64_t results, sources;
  std::vector<int64_t> low, high;
  std::vector<double> fraction;
};

// The other direction: tap t of source s is result index[t * sources + s], with its weight. Sources
// with fewer taps than others repeat their first one with weight 0.
template <typename A>
struct Taps {
  explicit Taps(const Axis& axis) : sources(axis.sources) {
    std::vector<int64_t> first(static_cast<size_t>(sources), axis.results), used(first.size());
    for (int64_t i = axis.results - 1; i >= 0; --i) first[axis.high[i]] = first[axis.low[i]] = i;
    for (int64_t i = 0; i < axis.results; ++i) {
      for (const int64_t s : {axis.low[i], axis.high[i]}) {
        used[s] = std::max(used[s], i - first[s] + 1);
      }
    }
    count = *std::max_element(used.begin(), used.end());
    index.resize(static_cast<size_t>(count * sources));
    weight.resize(index.size());
    for (int64_t s = 0; s < sources; ++s) {
      for (int64_t t = 0; t < count; ++t) {
        const int64_t i = t < used[s] ? first[s] + t : std::min(first[s], axis.results - 1);
        double w = 0;
        if (t < used[s] && axis.low[i] == s) w += 1 - axis.fraction[i];
        if (t < used[s] && axis.high[i] == s) w += axis.fraction[i];
        index[t * sources + s] = i;
        weight[t * sources + s] = static_cast<A>(w);
      }
    }
  }
  int64_t sources, count;
  std::vector<int64_t> index;
  std::vector<A> weight;
};

// A row of a result is one run in memory: the pixels of a channel, or in channels_last all channels
// of each pixel. Calls body(k, pixel, channel) for the elements k of all rows that start at
// `channel`.
template <typename F>
void each_element(int64_t pixels, int64_t channels, const F& body) {
  for (int64_t x = 0; x < pixels; ++x) {
    for (int64_t c = 0; c < channels; ++c) body(x * channels + c, x, c);
  }
}

template <typename T, typename A>
FASTREID_VI_CLONES void resample(const T* __restrict from, const int64_t* __restrict left,
                                 const int64_t* __restrict right, const A* __restrict fraction,
                                 int64_t length, A* __restrict to) {
  for (int64_t k = 0; k < length; ++k) {
    to[k] = (A(1) - fraction[k]) * static_cast<A>(from[left[k]]) +
            fraction[k] * static_cast<A>(from[right[k]]);
  }
}

template <typename T, typename A>
FASTREID_VI_CLONES void blend(const A* top, const A* bottom, A fraction, const A* __restrict mean,
                              const A* __restrict scale, int64_t length, T* __restrict to) {
  for (int64_t k = 0; k < length; ++k) {
    const A value = (A(1) - fraction) * top[k] + fraction * bottom[k];
    to[k] = static_cast<T>((value - mean[k]) * scale[k]);
  }
}

template <typename T, typename A>
FASTREID_VI_CLONES void add_scaled(const T* __restrict from, A scale, int64_t length,
                                   A* __restrict to) {
  for (int64_t k = 0; k < length; ++k) to[k] += scale * static_cast<A>(from[k]);
}

template <typename A>
FASTREID_VI_CLONES void add_tap(const A* __restrict from, const int64_t* __restrict index,
                                const A* __restrict weight, int64_t length, A* __restrict to) {
  for (int64_t k = 0; k < length; ++k) to[k] += weight[k] * from[index[k]];
}

// Two source rows, resized along the width: result rows come in order and share them.
template <typename T, typename A>
class Pair {
 public:
  explicit Pair(int64_t length) : rows_{std::vector<A>(length), std::vector<A>(length)} {}

  // Row y, made by fill(row) if it is not here yet; `other` is a row that must stay.
  template <typename F>
  const A* row(int64_t y, int64_t other, const F& fill) {
    for (int slot : {0, 1}) {
      if (held_[slot] == y) return rows_[slot].data();
    }
    const int slot = held_[0] == other ? 1 : 0;
    fill(y, rows_[slot].data());
    held_[slot] = y;
    return rows_[slot].data();
  }

 private:
  std::array<std::vector<A>, 2> rows_;
  std::array<int64_t, 2> held_{-1, -1};
};

Tensor resize_normalize(const Tensor& images, int64_t height, int64_t width,
                        std::vector<double> mean, std::vector<double> std) {
  const bool columns = fastreid_vi::is_channels_last(images);
  const int64_t batches = images.size(0), channels = images.size(1);
  const int64_t group = columns ? channels : 1, length = width * group;
  using torch::headeronly::MemoryFormat;
  Tensor out = torch::stable::empty(
      {batches, channels, height, width}, images.scalar_type(), std::nullopt, images.device(),
      std::nullopt, columns ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const Axis down(height, images.size(2)), across(width, images.size(3));
  fastreid_vi::for_floating(images.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    std::vector<int64_t> left(static_cast<size_t>(length)), right(left.size());
    std::vector<A> fraction(left.size());
    each_element(width, group, [&](int64_t k, int64_t x, int64_t c) {
      left[k] = across.low[x] * images.stride(3) + c * images.stride(1);
      right[k] = across.high[x] * images.stride(3) + c * images.stride(1);
      fraction[k] = static_cast<A>(across.fraction[x]);
    });
    // One row per channel, or one in all for channels_last.
    std::vector<A> shift(static_cast<size_t>(width * channels)), scale(shift.size());
    each_element(width, channels, [&](int64_t k, int64_t x, int64_t c) {
      const int64_t at = columns ? k : c * width + x;
      shift[at] = static_cast<A>(mean[c]);
      scale[at] = static_cast<A>(1 / std[c]);
    });
    const T* source = images.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    const int64_t bands = (height + kBand - 1) / kBand, planes = batches * channels / group;
    fastreid_vi::parallel(planes * bands, 2 * kBand * length, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const int64_t plane = item / bands, first = item % bands * kBand;
        const int64_t b = columns ? plane : plane / channels, c = columns ? 0 : plane % channels;
        const T* x = source + b * images.stride(0) + c * images.stride(1);
        Pair<T, A> pair(length);
        const auto fill = [&](int64_t row, A* into) {
          resample(x + row * images.stride(2), left.data(), right.data(), fraction.data(), length,
                   into);
        };
        for (int64_t i = first; i < std::min(first + kBand, height); ++i) {
          const A* top = pair.row(down.low[i], down.high[i], fill);
          const A* bottom = pair.row(down.high[i], down.low[i], fill);
          blend(top, bottom, static_cast<A>(down.fraction[i]), shift.data() + c * width,
                scale.data() + c * width, length, y + (plane * height + i) * length);
        }
      }
    });
  });
  return out;
}

// The tensor itself if its rows are runs in the wanted memory format, otherwise a copy.
Tensor in_runs(const Tensor& grad, bool columns) {
  if (columns ? fastreid_vi::is_channels_last(grad) : grad.is_contiguous()) return grad;
  Tensor copy = fastreid_vi::empty_map(grad, columns);
  torch::stable::copy_(copy, grad);
  return copy;
}

Tensor resize_normalize_backward(const Tensor& grad, int64_t height, int64_t width,
                                 std::vector<double> std, bool columns) {
  const int64_t batches = grad.size(0), channels = grad.size(1);
  const int64_t group = columns ? channels : 1;
  const Tensor given = in_runs(grad, columns);
  using torch::headeronly::MemoryFormat;
  Tensor out = torch::stable::empty(
      {batches, channels, height, width}, grad.scalar_type(), std::nullopt, grad.device(),
      std::nullopt, columns ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  fastreid_vi::for_floating(grad.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Taps<A> down(Axis(grad.size(2), height)), across(Axis(grad.size(3), width));
    const int64_t run = grad.size(3) * group, length = width * group;
    std::vector<int64_t> index(static_cast<size_t>(across.count * length));
    std::vector<A> weight(index.size());
    for (int64_t t = 0; t < across.count; ++t) {
      each_element(width, group, [&](int64_t k, int64_t x, int64_t c) {
        index[t * length + k] = across.index[t * width + x] * group + c;
        weight[t * length + k] = across.weight[t * width + x];
      });
    }
    const T* g = given.const_data_ptr<T>();
    T* dx = out.mutable_data_ptr<T>();
    const int64_t planes = batches * channels / group, cost = down.count * run;
    fastreid_vi::parallel(planes * height, cost, [&](int64_t from, int64_t to) {
      std::vector<A> tall(static_cast<size_t>(run)), line(static_cast<size_t>(length));
      for (int64_t item = from; item < to; ++item) {
        const int64_t plane = item / height, y = item % height;
        std::fill(tall.begin(), tall.end(), A(0));
        std::fill(line.begin(), line.end(), A(0));
        for (int64_t t = 0; t < down.count; ++t) {
          const int64_t i = down.index[t * height + y];
          const A w = down.weight[t * height + y];
          if (w != A(0)) add_scaled(g + (plane * grad.size(2) + i) * run, w, run, tall.data());
        }
        for (int64_t t = 0; t < across.count; ++t) {
          add_tap(tall.data(), index.data() + t * length, weight.data() + t * length, length,
                  line.data());
        }
        const int64_t first = columns ? 0 : plane % channels;
        T* into = dx + item * length;
        each_element(width, group, [&](int64_t k, int64_t, int64_t c) {
          into[k] = static_cast<T>(line[k] * static_cast<A>(1 / std[first + c]));
        });
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("resize_normalize", TORCH_BOX(&resize_normalize));
  m.impl("resize_normalize_backward", TORCH_BOX(&resize_normalize_backward));
}
