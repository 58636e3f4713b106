// Ranks when a gallery comes in blocks of columns: no row of distances is ever whole.
#pragma once

#include <cstdint>
#include <span>

#include "ranking.h"

namespace fastreid_vi::retrieval {

// The matches of row i in gallery t are the entries [start[i * T + t], start[i * T + t + 1]),
// nearest first, equal distances by slot, the position in the gallery.
template <typename T>
struct Matches {
  std::span<const std::int64_t> start;  // [rows * T + 1]
  std::span<const T> distance;
  std::span<const std::int32_t> slot;
};

// Running counts over the blocks so far, of images that are kept and no match.
struct Ahead {
  std::span<std::int64_t> images;      // [matches] ahead of each match
  std::span<std::int64_t> identities;  // [rows * T] with an image ahead of the first match
  std::span<std::int32_t> last;        // [rows * T] the identity counted last, -1 before any
};

// Adds one block to `ahead` and returns the first row that holds a NaN, or -1. Gallery t holds the
// block's columns `members.columns[members.offsets[t] : members.offsets[t + 1]]` at positions
// `slots`. Columns ascend by identity inside a block and from block to block: an identity's images
// follow each other, so the one counted last is all there is to remember.
template <typename T>
std::int64_t count_ahead(const Distances<T>& block, const Images& queries, const Images& pool,
                         const Galleries& members, std::span<const std::int32_t> slots,
                         CameraRule rule, int threads, const Matches<T>& matches,
                         const Ahead& ahead);

}  // namespace fastreid_vi::retrieval
