// What every native room shares: dtype dispatch, accumulation types, feature maps as rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

// A function compiled for several instruction sets, chosen when the library is loaded. The
// resolvers run before the sanitizers are ready, so instrumented builds take the plain function.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__CUDACC__)
#define FASTREID_VI_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTREID_VI_CLONES
#endif

namespace fastreid_vi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float32 for everything narrower, float64 for float64.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulate_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body.operator()<T>() with the C++ type of a floating dtype; a lambda, not a macro, because
// macros swallow the commas of a kernel launch.
template <typename F>
decltype(auto) for_floating(ScalarType dtype, F&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::Double:
      return body.template operator()<double>();
    case ScalarType::Half:
      return body.template operator()<torch::headeronly::Half>();
    case ScalarType::BFloat16:
      return body.template operator()<torch::headeronly::BFloat16>();
    default:
      STD_TORCH_CHECK(false, "expected a floating dtype");
  }
}

// A feature map [B, C, H, W] whose positions collapse to S = H W: element (b, c, s) lies at
// b * batch + c * channel + s * position. One of `channel`, `position` is 1.
struct FeatureMap {
  Tensor tensor;  // keeps the memory alive, a dense copy where the strides did not collapse
  int64_t batches, channels, positions;
  int64_t batch, channel, position;

  bool channels_last() const { return channel == 1 && position != 1; }
};

// Whether strides are those of memory_format=channels_last and not also those of a contiguous map.
inline bool is_channels_last(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  const bool last = (c == 1 || x.stride(1) == 1) && (w == 1 || x.stride(3) == c) &&
                    (h == 1 || x.stride(2) == w * c) &&
                    (x.size(0) <= 1 || x.stride(0) == h * w * c);
  return last && !x.is_contiguous();
}

inline Tensor empty_map(const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(
      x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline FeatureMap feature_map(const Tensor& x) {
  const int64_t h = x.size(2), w = x.size(3);
  const int64_t position = w == 1 ? x.stride(2) : x.stride(3);
  const bool collapse = h == 1 || w == 1 || x.stride(2) == w * x.stride(3);
  const bool unit = position == 1 || x.stride(1) == 1 || x.size(1) == 1 || h * w == 1;
  Tensor rows = collapse && unit ? x : torch::stable::contiguous(x);
  FeatureMap map{rows, x.size(0), x.size(1), h * w, rows.stride(0), rows.stride(1), 1};
  map.position = collapse && unit ? position : 1;
  // Strides of axes of length one are arbitrary; make one of the two read as unit.
  if (map.positions == 1) map.position = map.channel == 1 ? map.channels : 1;
  if (map.channels == 1) map.channel = map.position == 1 ? map.positions : 1;
  return map;
}

// The map with unit stride along channels (channels_last) or along positions; copies if it must.
inline FeatureMap map_in_layout(const Tensor& x, bool channels_last) {
  FeatureMap map = feature_map(x);
  const int64_t length = channels_last ? map.channels : map.positions;
  if ((channels_last ? map.channel : map.position) != 1 && length != 1) {
    Tensor copy = empty_map(x, channels_last);
    torch::stable::copy_(copy, x);
    map = feature_map(copy);
  }
  (channels_last ? map.channel : map.position) = 1;
  return map;
}

// Calls body(begin, end) over [0, count) with PyTorch's threads; `cost` is the work of one item in
// elements, so that tiny inputs stay on the calling thread.
template <typename F>
void parallel(int64_t count, int64_t cost, const F& body) {
  constexpr int64_t kWorthAThread = 1 << 15;
  const int64_t grain = cost > 0 ? (kWorthAThread + cost - 1) / cost : count;
  if (count > 0) torch::stable::parallel_for(0, count, grain > 0 ? grain : 1, body);
}

}  // namespace fastreid_vi
