// The three products of pattern pooling, for the widest instruction set that this machine has.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <string_view>
#include <type_traits>
#include <utility>

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTREID_VI_MANY_TILES 1
#include <immintrin.h>
#endif

namespace fastreid_vi {

constexpr int64_t kRun = 32;       // rows summed before they join the total: accuracy, and cache
constexpr int kRows = 4;           // rows that one tile of `outer` writes
constexpr int64_t kColumns = 512;  // columns whose vectors stay in the first cache
constexpr int64_t kPitch = 64;     // rows of vectors are padded to this many elements

}  // namespace fastreid_vi

#define FASTREID_VI_ISA plain
#define FASTREID_VI_BYTES 16
#include "pattern_tiles.inc"  // NOLINT
#undef FASTREID_VI_ISA
#undef FASTREID_VI_BYTES

#ifdef FASTREID_VI_MANY_TILES
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define FASTREID_VI_ISA avx2
#define FASTREID_VI_BYTES 32
#include "pattern_tiles.inc"  // NOLINT
#undef FASTREID_VI_ISA
#undef FASTREID_VI_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define FASTREID_VI_ISA avx512
#define FASTREID_VI_BYTES 64
#include "pattern_tiles.inc"  // NOLINT
#undef FASTREID_VI_ISA
#undef FASTREID_VI_BYTES
#pragma GCC pop_options
#endif

namespace fastreid_vi {

#ifdef FASTREID_VI_MANY_TILES
// 4 for AVX-512, 3 for AVX2, 1 for neither. PyTorch's own limit, ATEN_CPU_CAPABILITY=avx2 or
// default, holds here too: it is how the narrower tiles are tested on a wider machine.
inline int tile_level() {
  static const int level = [] {
    const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view name = limit ? limit : "avx512";
    if (name == "default") return 1;
    if (name != "avx2" && __builtin_cpu_supports("x86-64-v4")) return 4;
    return __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
  }();
  return level;
}
#endif

// Calls body.operator()<Tiles>() with the tiles of this machine.
template <typename T, typename F>
void with_tiles(F&& body) {
#ifdef FASTREID_VI_MANY_TILES
  if (tile_level() == 4) return body.template operator()<avx512::Tiles<T>>();
  if (tile_level() == 3) return body.template operator()<avx2::Tiles<T>>();
#endif
  body.template operator()<plain::Tiles<T>>();
}

}  // namespace fastreid_vi
