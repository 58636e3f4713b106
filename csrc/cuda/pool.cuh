// Generalised-mean pooling over positions, forward and backward.
//   moment = mean over s of x^p + eps;  pooled = moment^(1/p)
//   dx = grad * moment^(1/p - 1) * x^(p-1) / S
// Every output element is written once, by one thread; sums run in a fixed order.
#pragma once

#include "common.cuh"

namespace fastreid_vi {

// A map [B, C, S]: element (b, c, s) lies at b * batch + c * channel + s * position.
struct MapShape {
  int channels, positions;
};
struct MapStrides {
  int64_t batch, channel, position;
};

constexpr int kPoolThreads = 256;
constexpr int kPoolWarps = kPoolThreads / kWarp;

// Channels that one block of the channels_last kernels covers: a vector for each lane.
template <typename T>
constexpr int kPoolColumns = kWarp * Vector<T>::size;

// x^p. `cube`: p is 3, the published exponent, and no call to powf is compiled in; otherwise p
// decides, alike for all threads.
template <bool cube, typename A>
__device__ __forceinline__ A raised(A x, A p) {
  if constexpr (cube) return x * x * x;
  if (p == A(1)) return x;
  if (p == A(2)) return x * x;
  return power(x, p);
}

// x^(p-1), the derivative's factor.
template <bool cube, typename A>
__device__ __forceinline__ A raised_less_one(A x, A p) {
  if constexpr (cube) return x * x;
  if (p == A(1)) return A(1);
  if (p == A(2)) return x;
  return power(x, p - A(1));
}

// channels_last: a block takes one sample and kPoolColumns channels. Lane l of every warp reads the
// l-th vector of channels, warp w the positions w, w + 8, ...; the warps' sums meet in shared
// memory. Four positions are in flight, with powf one: it fills the time of a load, and the double
// version would spill.
template <typename T, bool cube>
__global__ void __launch_bounds__(kPoolThreads)
    gem_pool_channels_last_kernel(const T* __restrict__ x, T* __restrict__ pooled,
                                  Accumulator<T>* __restrict__ moment, MapShape shape,
                                  MapStrides strides, Accumulator<T> p, Accumulator<T> eps) {
  using A = Accumulator<T>;
  constexpr int size = Vector<T>::size;
  SHARED_ARRAY(A, partial, [kPoolWarps][kPoolColumns<T>]);
  const int groups = (shape.channels + kPoolColumns<T> - 1) / kPoolColumns<T>;
  const int64_t sample = blockIdx.x / groups;
  const int first = blockIdx.x % groups * kPoolColumns<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  A sum[size] = {};
  if (first + lane * size < shape.channels) {
    const T* column = x + sample * strides.batch + first + lane * size;
#pragma unroll(cube ? 4 : 1)
    for (int s = warp; s < shape.positions; s += kPoolWarps) {
      const Vector<T> v = load_vector(column + s * strides.position);
#pragma unroll
      for (int i = 0; i < size; ++i) sum[i] += raised<cube>(widen(v.at[i]), p);
    }
  }
#pragma unroll
  for (int i = 0; i < size; ++i) partial[warp][lane * size + i] = sum[i];
  __syncthreads();

  const int column = threadIdx.x;
  if (column >= kPoolColumns<T> || first + column >= shape.channels) return;
  A total = 0;
#pragma unroll
  for (int w = 0; w < kPoolWarps; ++w) total += partial[w][column];
  const A mean = total / static_cast<A>(shape.positions) + eps;
  const int64_t out = sample * shape.channels + first + column;
  moment[out] = mean;
  pooled[out] = narrow<T>(power(mean, A(1) / p));
}

// Any other layout: a warp takes one channel of one sample and reads along its positions, in
// vectors where they lie side by side.
template <typename T, bool cube>
__global__ void __launch_bounds__(kPoolThreads)
    gem_pool_positions_kernel(const T* __restrict__ x, T* __restrict__ pooled,
                              Accumulator<T>* __restrict__ moment, MapShape shape,
                              MapStrides strides, Accumulator<T> p, Accumulator<T> eps) {
  using A = Accumulator<T>;
  const int groups = (shape.channels + kPoolWarps - 1) / kPoolWarps;
  const int64_t sample = blockIdx.x / groups;
  const int lane = threadIdx.x % kWarp;
  const int channel = blockIdx.x % groups * kPoolWarps + threadIdx.x / kWarp;
  if (channel >= shape.channels) return;
  const T* row = x + sample * strides.batch + channel * strides.channel;
  const VectorSpan<T> body(row, shape.positions, strides.position == 1);

  A sum = 0;
  for (int i = lane; i < body.count; i += kWarp) {
    const Vector<T> v = load_vector(row + body.first + i * Vector<T>::size);
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) sum += raised<cube>(widen(v.at[j]), p);
  }
  for (int i = lane; i < body.odd(shape.positions); i += kWarp) {
    sum += raised<cube>(widen(row[body.element(i) * strides.position]), p);
  }
  sum = warp_reduce(sum, Sum{});
  if (lane != 0) return;
  const A mean = sum / static_cast<A>(shape.positions) + eps;
  const int64_t out = sample * shape.channels + channel;
  moment[out] = mean;
  pooled[out] = narrow<T>(power(mean, A(1) / p));
}

// grad * moment^(1/p - 1) / S of one channel of one sample.
template <typename T, typename A>
__device__ __forceinline__ A gem_pool_scale(const T* grad, const A* moment, int64_t i, A p,
                                            int positions) {
  return widen(grad[i]) * power(moment[i], A(1) / p - A(1)) / static_cast<A>(positions);
}

// Work is divided as in the forward pass.
template <typename T, bool cube>
__global__ void __launch_bounds__(kPoolThreads)
    gem_pool_backward_channels_last_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                                           const Accumulator<T>* __restrict__ moment,
                                           T* __restrict__ dx, MapShape shape, MapStrides strides,
                                           MapStrides dx_strides, Accumulator<T> p) {
  using A = Accumulator<T>;
  constexpr int size = Vector<T>::size;
  SHARED_ARRAY(A, scales, [kPoolColumns<T>]);
  const int groups = (shape.channels + kPoolColumns<T> - 1) / kPoolColumns<T>;
  const int64_t sample = blockIdx.x / groups;
  const int first = blockIdx.x % groups * kPoolColumns<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = threadIdx.x;
  if (column < kPoolColumns<T> && first + column < shape.channels) {
    scales[column] =
        gem_pool_scale(grad, moment, sample * shape.channels + first + column, p, shape.positions);
  }
  __syncthreads();

  const int channel = first + lane * size;
  if (channel >= shape.channels) return;
  A scale[size];
#pragma unroll
  for (int i = 0; i < size; ++i) scale[i] = scales[lane * size + i];
  const T* from = x + sample * strides.batch + channel;
  T* to = dx + sample * dx_strides.batch + channel;
#pragma unroll(cube ? 4 : 1)
  for (int s = warp; s < shape.positions; s += kPoolWarps) {
    Vector<T> v = load_vector(from + s * strides.position);
#pragma unroll
    for (int i = 0; i < size; ++i) {
      v.at[i] = narrow<T>(scale[i] * raised_less_one<cube>(widen(v.at[i]), p));
    }
    store_vector(to + s * dx_strides.position, v);
  }
}

template <typename T, bool cube>
__global__ void __launch_bounds__(kPoolThreads)
    gem_pool_backward_positions_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                                       const Accumulator<T>* __restrict__ moment,
                                       T* __restrict__ dx, MapShape shape, MapStrides strides,
                                       MapStrides dx_strides, Accumulator<T> p) {
  using A = Accumulator<T>;
  const int groups = (shape.channels + kPoolWarps - 1) / kPoolWarps;
  const int64_t sample = blockIdx.x / groups;
  const int lane = threadIdx.x % kWarp;
  const int channel = blockIdx.x % groups * kPoolWarps + threadIdx.x / kWarp;
  if (channel >= shape.channels) return;
  const A scale =
      gem_pool_scale(grad, moment, sample * shape.channels + channel, p, shape.positions);
  const T* from = x + sample * strides.batch + channel * strides.channel;
  T* to = dx + sample * dx_strides.batch + channel * dx_strides.channel;
  const bool alike =
      (reinterpret_cast<uintptr_t>(from) ^ reinterpret_cast<uintptr_t>(to)) % kVectorBytes == 0;
  const VectorSpan<T> body(from, shape.positions,
                           alike && strides.position == 1 && dx_strides.position == 1);

  for (int i = lane; i < body.count; i += kWarp) {
    const int s = body.first + i * Vector<T>::size;
    Vector<T> v = load_vector(from + s);
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) {
      v.at[j] = narrow<T>(scale * raised_less_one<cube>(widen(v.at[j]), p));
    }
    store_vector(to + s, v);
  }
  for (int i = lane; i < body.odd(shape.positions); i += kWarp) {
    const int s = body.element(i);
    to[s * dx_strides.position] =
        narrow<T>(scale * raised_less_one<cube>(widen(from[s * strides.position]), p));
  }
}

}  // namespace fastreid_vi
