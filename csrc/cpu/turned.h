// A gradient read in the layout of its feature map. It arrives in the other layout wherever the
// next op is not a convolution of the same memory format; its blocks are then transposed into a
// thread's scratch on the way, so that no copy of the whole map is made.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "common.h"
#include "cpu/channels.h"

namespace fastreid_vi {
namespace {

// Tiles are transposed in registers, one vector per row.
template <typename T>
struct Tile {
  static constexpr int64_t kEdge = sizeof(T) == 8 ? 8 : 16;
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  typedef Bits Row __attribute__((vector_size(kEdge * sizeof(T))));

  // to[j * to_stride + i] = from[i * from_stride + j], i, j < kEdge: log2(kEdge) rounds that
  // interleave the first half of the rows with the second.
  [[gnu::always_inline]] static void transpose(const T* from, int64_t from_stride, T* to,
                                               int64_t to_stride) {
    Row rows[kEdge], next[kEdge], low, high;
    if constexpr (kEdge == 16) {
      low = Row{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
      high = Row{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    } else {
      low = Row{0, 8, 1, 9, 2, 10, 3, 11};
      high = Row{4, 12, 5, 13, 6, 14, 7, 15};
    }
    for (int64_t i = 0; i < kEdge; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(Row));
#pragma GCC unroll 4
    for (int64_t round = 1; round < kEdge; round *= 2) {
      for (int64_t i = 0; i < kEdge / 2; ++i) {
        next[2 * i] = __builtin_shuffle(rows[i], rows[i + kEdge / 2], low);
        next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kEdge / 2], high);
      }
      for (int64_t i = 0; i < kEdge; ++i) rows[i] = next[i];
    }
    for (int64_t j = 0; j < kEdge; ++j) std::memcpy(to + j * to_stride, &rows[j], sizeof(Row));
  }
};

// to[j * to_stride + i] = from[i * from_stride + j], i < rows, j < columns.
template <typename T>
FASTREID_VI_CLONES void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns,
                                  T* to, int64_t to_stride) {
  constexpr int64_t kEdge = Tile<T>::kEdge;
  const int64_t whole_rows = rows / kEdge * kEdge, whole_columns = columns / kEdge * kEdge;
  for (int64_t i = 0; i < whole_rows; i += kEdge) {
    for (int64_t j = 0; j < whole_columns; j += kEdge) {
      Tile<T>::transpose(from + i * from_stride + j, from_stride, to + j * to_stride + i,
                         to_stride);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
}

// Scratch on cache lines that is not touched before it is written.
template <typename T>
class Untouched {
 public:
  explicit Untouched(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), kLine))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<T, Free> data_;
};

// A gradient beside a map that is read as `columns` (channels-last) or by plane.
template <typename T>
class Turned {
 public:
  Turned(const Tensor& grad, bool columns) : columns_(columns), map_(feature_map(grad)) {
    const int64_t length = columns ? map_.channels : map_.positions;
    turned_ = (columns ? map_.channel : map_.position) != 1 && length != 1;
    if (!turned_) (columns ? map_.channel : map_.position) = 1;
  }

  bool turned() const { return turned_; }

  // Elements of scratch for `width` channels.
  int64_t scratch(int64_t width) const {
    if (!turned_) return 0;
    return columns_ ? map_.positions * pitch(width) : width * pitch(map_.positions);
  }

  // Channels [c, c + width) of sample b, counted from zero, in the layout of the map.
  Plane<const T> block(int64_t b, int64_t c, int64_t width, T* scratch) const {
    const T* first = map_.tensor.template const_data_ptr<T>() + b * map_.batch + c * map_.channel;
    if (!turned_) return {first, map_.channel, map_.position};
    if (columns_) {
      transpose(first, map_.channel, width, map_.positions, scratch, pitch(width));
      return {scratch, 1, pitch(width)};
    }
    transpose(first, map_.position, map_.positions, width, scratch, pitch(map_.positions));
    return {scratch, pitch(map_.positions), 1};
  }

 private:
  // Rows of whole cache lines, and one more: rows a power of two apart share few sets of the cache.
  static int64_t pitch(int64_t length) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return (length + kLine - 1) / kLine * kLine + kLine;
  }

  bool columns_, turned_;
  FeatureMap map_;
};

}  // namespace
}  // namespace fastreid_vi
