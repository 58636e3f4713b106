// Copies, matrix loads and products of a warp in 16-bit types, and what the blocks of a cluster
// share. On the CPU the lanes exchange their parts by shuffles.
#pragma once

#include "common.cuh"

namespace fastreid_vi {

// Four 8 x 8 matrices of 16-bit elements in shared memory: lane 8 i + j gives the address of row j
// of matrix i. Lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 in part[i], of column
// l / 4 if `transposed`.
template <bool transposed, int matrices>
__device__ __forceinline__ void load_matrices(uint32_t (&part)[matrices], const void* row) {
  static_assert(matrices == 2 || matrices == 4);
#ifdef __CUDACC__
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (matrices == 4 && transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (matrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(part[0]), "=r"(part[1])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(part[0]), "=r"(part[1])
                 : "r"(at)
                 : "memory");
  }
#else
  const int lane = threadIdx.x % kWarp, first = 2 * (lane % 4);
  if (lane < 8 * matrices) expect_aligned(row, kVectorBytes);
  for (int i = 0; i < matrices; ++i) {
    const auto row_of = [&](int j) {
      const uint64_t given = reinterpret_cast<uintptr_t>(row);
      return reinterpret_cast<const uint16_t*>(__shfl_sync(kAllLanes, given, 8 * i + j));
    };
    const uint16_t* const low = row_of(transposed ? first : lane / 4);
    const uint16_t* const high = row_of(transposed ? first + 1 : lane / 4);
    part[i] = low[transposed ? lane / 4 : first];
    part[i] |= static_cast<uint32_t>(high[transposed ? lane / 4 : first + 1]) << 16;
  }
#endif
}

// d += a b, a of 16 x 16 and b of 16 x 8 elements. With g = l / 4 and t = 2 (l % 4), lane l holds
//   a: rows g, g + 8, g, g + 8 at columns t, t, t + 8, t + 8 (and the next), as load_matrices gives
//   b: column g at rows t, t + 8 (and the next)
//   d: row g at columns t, t + 1, then row g + 8
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);

#ifdef __CUDACC__

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Sixteen bytes from global to shared memory, there after copies_done and a barrier.
template <typename T>
__device__ __forceinline__ void copy_async(T* to, const T* from) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Clusters begin with sm_90; older code is never launched, see .cu.
__device__ __forceinline__ int cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
// Also a __syncthreads. What a block wrote before it, the others see behind it.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __trap();
#endif
}
// The same place in the shared memory of another block of the cluster. That block must have begun,
// which a cluster_sync shows, and must not return before it was read or written.
template <typename T>
__device__ __forceinline__ T* at_rank(T* own, int rank) {
  T* there = own;
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
#endif
  return there;
}

#else

template <typename T>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int lane = threadIdx.x % kWarp, row = lane / 4, column = 2 * (lane % 4);
  const auto element = [](uint64_t part, int i) {
    const uint16_t bits = static_cast<uint16_t>(part >> 16 * i);
    T value;
    __builtin_memcpy(static_cast<void*>(&value), &bits, sizeof(T));
    return widen(value);
  };
  const auto both = [](uint32_t low, uint32_t high) { return low | uint64_t(high) << 32; };
  for (int j = 0; j < 4; ++j) {  // elements 2 j, 2 j + 1, 2 j + 8, 2 j + 9 along the sum
    const uint64_t upper = __shfl_sync(kAllLanes, both(a[0], a[2]), row * 4 + j);
    const uint64_t lower = __shfl_sync(kAllLanes, both(a[1], a[3]), row * 4 + j);
    const uint64_t left = __shfl_sync(kAllLanes, both(b[0], b[1]), column * 4 + j);
    const uint64_t right = __shfl_sync(kAllLanes, both(b[0], b[1]), column * 4 + 4 + j);
    for (int i = 0; i < 4; ++i) {
      d[0] += element(upper, i) * element(left, i);
      d[1] += element(upper, i) * element(right, i);
      d[2] += element(lower, i) * element(left, i);
      d[3] += element(lower, i) * element(right, i);
    }
  }
}

template <typename T>
inline void copy_async(T* to, const T* from) {
  store_vector(to, load_vector(from));
}
inline void copies_done() {}

inline int cluster_rank() { return static_cast<int>(emulation::scheduler.rank); }
inline void cluster_sync(const emulation::Place& place = emulation::Place::current()) {
  emulation::scheduler.cluster_barrier(place);
}
template <typename T>
T* at_rank(T* own, int rank) {
  return static_cast<T*>(emulation::scheduler.at_rank(own, static_cast<unsigned>(rank)));
}

#endif

}  // namespace fastreid_vi
