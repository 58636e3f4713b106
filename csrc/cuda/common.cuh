// What device code shares: accumulation types, conversions, 16-byte vectors, warp and block
// reductions.
#pragma once

#include "device.h"

namespace fastreid_vi {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// float for everything narrower, double for double.
template <typename T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename accumulator<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float power(float x, float p) { return powf(x, p); }
__device__ __forceinline__ double power(double x, double p) { return pow(x, p); }

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// Sixteen bytes of elements: one load or store of the widest kind.
template <typename T>
struct alignas(kVectorBytes) Vector {
  static constexpr int size = kVectorBytes / static_cast<int>(sizeof(T));
  T at[size];
};

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
  expect_aligned(address, kVectorBytes);
  return *reinterpret_cast<const Vector<T>*>(address);
}
template <typename T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T>& value) {
  expect_aligned(address, kVectorBytes);
  *reinterpret_cast<Vector<T>*>(address) = value;
}

// Elements first, first + 1, ... of a row, zero from `end` on. `wide`: all rows and `end` are
// multiples of 16 bytes.
template <typename T>
__device__ __forceinline__ Vector<T> load_part(const T* row, int first, int end, bool wide) {
  if (wide && first < end) return load_vector(row + first);
  Vector<T> part;
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) {
    part.at[i] = first + i < end ? row[first + i] : narrow<T>(0);
  }
  return part;
}

template <typename T>
__device__ __forceinline__ void store_part(T* row, int first, int end, bool wide,
                                           const Accumulator<T>* values) {
  if (first >= end) return;
  Vector<T> part;
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) part.at[i] = narrow<T>(values[i]);
  if (wide) return store_vector(row + first, part);
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) {
    if (first + i < end) row[first + i] = part.at[i];
  }
}

// The part of a row of unit stride that 16-byte vectors can cover: `count` vectors from element
// `first`. Odd elements stand before and after; elements(i) is the position of the i-th of them.
template <typename T>
struct VectorSpan {
  int first = 0, count = 0;

  __device__ __forceinline__ VectorSpan(const T* row, int length, bool usable) {
    if (!usable) return;
    const int misaligned =
        static_cast<int>(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(T));
    first = misaligned == 0 ? 0 : Vector<T>::size - misaligned;
    first = first < length ? first : length;
    count = (length - first) / Vector<T>::size;
  }
  __device__ __forceinline__ int odd(int length) const { return length - count * Vector<T>::size; }
  __device__ __forceinline__ int element(int i) const {
    return i < first ? i : i + count * Vector<T>::size;
  }
};

struct Sum {
  template <typename A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return a + b;
  }
};
struct Maximum {  // NaN wins, as in PyTorch
  template <typename A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return a > b || a != a ? a : b;
  }
};
struct Minimum {
  template <typename A>
  __device__ __forceinline__ A operator()(A a, A b) const {
    return a < b || a != a ? a : b;
  }
};

// The result reaches every lane; the order of the additions is the same in every run.
template <typename Combine, typename A>
__device__ __forceinline__ A warp_reduce(A value, Combine combine) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, lanes));
  }
  return value;
}

// The result reaches every thread. All threads of the one-dimensional block must call it, a
// multiple of 32.
template <typename Combine, typename A>
__device__ __forceinline__ A block_reduce(A value, Combine combine) {
  SHARED_ARRAY(A, partial, [kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = warp_reduce(value, combine);
  __syncthreads();  // an earlier call may still be reading
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  A total = partial[0];
  for (int i = 1; i < warps; ++i) total = combine(total, partial[i]);
  return total;
}

}  // namespace fastreid_vi
