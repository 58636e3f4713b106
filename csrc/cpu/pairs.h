// Pairs of rows: squared distances and weighted sums of differences, the two products that every
// metric loss is made of. Always from differences, never from |x|^2 + |y|^2 - 2 x.y: near-equal
// rows keep their small distances.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common.h"
#include "cpu/pattern_tiles.h"

namespace fastreid_vi {

constexpr int64_t kSide = 32;        // rows and columns of a tile of distances, at most
constexpr int64_t kColumnRun = 512;  // columns summed before they join the total
constexpr int64_t kPanel = 64;       // columns of a panel of differences
constexpr int64_t kGroup = 256;      // columns that are packed at once: rows lie pages apart
constexpr int64_t kRowRun = 128;     // rows of a panel, and terms summed before they join the total

// Some rows of a matrix whose inner axis is contiguous; `end` is one past the last element of all.
template <typename A>
struct RowBlock {
  const A* data;
  int64_t stride, count;
  const A* end;

  const A* row(int64_t i) const { return data + i * stride; }
};

}  // namespace fastreid_vi

#define FASTREID_VI_ISA plain
#define FASTREID_VI_BYTES 16
#include "pairs.inc"  // NOLINT
#undef FASTREID_VI_ISA
#undef FASTREID_VI_BYTES

#ifdef FASTREID_VI_MANY_TILES
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define FASTREID_VI_ISA avx2
#define FASTREID_VI_BYTES 32
#include "pairs.inc"  // NOLINT
#undef FASTREID_VI_ISA
#undef FASTREID_VI_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define FASTREID_VI_ISA avx512
#define FASTREID_VI_BYTES 64
#include "pairs.inc"  // NOLINT
#undef FASTREID_VI_ISA
#undef FASTREID_VI_BYTES
#pragma GCC pop_options
#endif

namespace fastreid_vi {

// Calls body.operator()<Tiles>() with the pair tiles of this machine.
template <typename A, typename F>
void with_pair_tiles(F&& body) {
#ifdef FASTREID_VI_MANY_TILES
  if (tile_level() == 4) return body.template operator()<avx512::PairTiles<A>>();
  if (tile_level() == 3) return body.template operator()<avx2::PairTiles<A>>();
#endif
  body.template operator()<plain::PairTiles<A>>();
}

enum class Metric { euclidean, sqeuclidean, cosine };

inline Metric metric_of(const std::string& name) {
  if (name == "euclidean") return Metric::euclidean;
  if (name == "sqeuclidean") return Metric::sqeuclidean;
  STD_TORCH_CHECK(name == "cosine", "metric: expected euclidean, sqeuclidean or cosine, got ",
                  name);
  return Metric::cosine;
}

constexpr double kSquareFloor =
    1e-12;                            // below it a euclidean distance is clamped, without gradient
constexpr double kNormFloor = 1e-12;  // a shorter row has no direction: cosine 0 to every row

// Memory on cache lines, not initialised.
template <typename A>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t size)
      : data_(static_cast<A*>(::operator new(static_cast<size_t>(size) * sizeof(A), kLine))) {}
  A* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(A* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<A, Free> data_;
};

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// to[0, count) = from, in the other type.
template <typename T, typename A>
void convert(const T* from, int64_t count, A* to) {
  if constexpr (std::is_same_v<T, A>) {
    std::copy(from, from + count, to);
  } else if constexpr (std::is_same_v<A, accumulate_t<T>>) {
    with_pair_tiles<A>([&]<typename Tiles>() { Tiles::widen(from, count, to); });
  } else {
    with_pair_tiles<T>([&]<typename Tiles>() { Tiles::narrow(from, count, to); });
  }
}

// Embeddings in the dtype of accumulation, and for the cosine their directions: |u - v|^2 / 2 is
// 1 - u.v for unit rows. Read in place where nothing has to be changed.
template <typename A>
struct Rows {
  int64_t count = 0, width = 0, stride = 0;
  const A* data = nullptr;
  Tensor tensor;
  Scratch<A> copy;
  std::vector<A> norm;  // cosine: length of each row, not below the floor; -1 for a shorter one

  RowBlock<A> block(int64_t first, int64_t rows) const {
    return {data + first * stride, stride, rows, data + (count - 1) * stride + width};
  }
  const A* row(int64_t i) const { return data + i * stride; }
  bool has_direction(int64_t i) const { return !(norm[static_cast<size_t>(i)] < 0); }
};

// Divides a row by its length; a row below the floor becomes zero.
template <typename A>
FASTREID_VI_CLONES A make_unit(A* row, int64_t width) {
  constexpr int64_t kLanes = 16;
  double lane[kLanes] = {}, square = 0;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      const auto value = static_cast<double>(row[i + k]);
      lane[k] += value * value;
    }
  }
  for (; i < width; ++i) square += static_cast<double>(row[i]) * static_cast<double>(row[i]);
  for (const double part : lane) square += part;
  const A norm = static_cast<A>(std::sqrt(square));
  if (norm < static_cast<A>(kNormFloor)) {
    std::fill(row, row + width, A(0));
    return A(-1);
  }
  for (int64_t k = 0; k < width; ++k) row[k] /= norm;
  return norm;
}

template <typename T>
Rows<accumulate_t<T>> rows_of(const Tensor& x, Metric metric) {
  using A = accumulate_t<T>;
  const bool unit = metric == Metric::cosine;
  const bool in_line = x.size(1) == 1 || x.stride(1) == 1;
  Rows<A> rows{x.size(0), x.size(1), 0, nullptr, in_line ? x : torch::stable::contiguous(x),
               {},        {}};
  const T* from = rows.tensor.template const_data_ptr<T>();
  const int64_t stride = rows.tensor.stride(0);
  if constexpr (std::is_same_v<T, A>) {
    if (!unit) {
      rows.data = from, rows.stride = stride;
      return rows;
    }
  }
  rows.stride = blocks_of(rows.width, 16) * 16;
  rows.copy = Scratch<A>(rows.count * rows.stride);
  rows.norm.resize(unit ? static_cast<size_t>(rows.count) : 0);
  rows.data = rows.copy.get();
  parallel(rows.count, rows.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* to = rows.copy.get() + i * rows.stride;
      convert(from + i * stride, rows.width, to);
      if (unit) rows.norm[static_cast<size_t>(i)] = make_unit(to, rows.width);
    }
  });
  return rows;
}

// The distance from the sum of squared differences of two (unit) rows.
template <typename A>
A distance_of(A square, Metric metric, bool directed) {
  if (metric == Metric::sqeuclidean) return square;
  if (metric == Metric::cosine) return directed || square != square ? square / 2 : A(1);
  const A floor = static_cast<A>(kSquareFloor);
  return std::sqrt(square < floor ? floor : square);  // NaN stays
}

// out[(i - first) * pitch + j] = distance of x_i and y_j for i in [first, first + rows) and all j.
// With `symmetric` x and y are the same, all rows are asked for, and each pair is computed once.
template <typename A>
void distances(const Rows<A>& x, int64_t first, int64_t rows, const Rows<A>& y, Metric metric,
               bool symmetric, A* out, int64_t pitch) {
  const int64_t side = std::max(rows, y.count) > 512 ? kSide : kSide / 2;
  const int64_t down = blocks_of(rows, side), across = blocks_of(y.count, side);
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t i = 0; i < down; ++i) {
    for (int64_t j = symmetric ? i : 0; j < across; ++j) tiles.emplace_back(i * side, j * side);
  }
  const auto count = static_cast<int64_t>(tiles.size());
  with_pair_tiles<A>([&]<typename Tiles>() {
    parallel(count, side * side * x.width, [&](int64_t begin, int64_t end) {
      A square[kSide * kSide];
      for (int64_t item = begin; item < end; ++item) {
        const auto [i0, j0] = tiles[static_cast<size_t>(item)];
        const RowBlock<A> a = x.block(first + i0, std::min(side, rows - i0));
        const RowBlock<A> b = y.block(j0, std::min(side, y.count - j0));
        const bool diagonal = symmetric && i0 == j0;
        Tiles::squares(a, b, x.width, diagonal, square, side);
        for (int64_t i = 0; i < a.count; ++i) {
          for (int64_t j = diagonal ? i : 0; j < b.count; ++j) {
            const bool directed = metric != Metric::cosine ||
                                  (x.has_direction(first + i0 + i) && y.has_direction(j0 + j));
            const A d = distance_of(square[i * side + j], metric, directed);
            out[(i0 + i) * pitch + j0 + j] = d;
            if (symmetric) out[(j0 + j) * pitch + i0 + i] = d;
          }
        }
      }
    });
  });
}

// Rows whose distances to all others are held at once: all of a batch, in which each pair is
// computed once, or a strip of a large one.
inline int64_t strip_of(int64_t rows, int64_t others) {
  return std::max(rows, others) <= 1024 ? rows : std::min<int64_t>(rows, 256);
}

// Columns [column, column + width) of rows [first, first + count) as panels, `pitch` rows apart.
template <typename A>
void pack(const Rows<A>& x, int64_t first, int64_t count, int64_t column, int64_t width, A* to,
          int64_t pitch) {
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t i = 0; i < width; i += kPanel) {
      std::copy_n(x.row(first + k) + column + i, std::min(kPanel, width - i),
                  to + i * pitch + k * kPanel);
    }
  }
}

// out_i = sum over j of c_ij (s_ij x_i - y_j) for i in [first, first + rows), in the dtype of
// `out`, which starts at row `first` as do c and s [rows, M]; a null `s` is one everywhere.
template <typename A, typename T>
void differences(const Rows<A>& x, int64_t first, int64_t rows, const Rows<A>& y, const A* c,
                 std::type_identity_t<const A*> s, T* out, int64_t out_stride) {
  const bool same = x.data == y.data && rows == y.count;
  const int64_t padded = blocks_of(rows, 8) * 8, groups = blocks_of(x.width, kGroup);
  const int64_t size = padded * kGroup, other = same ? 0 : kRowRun * kGroup;
  with_pair_tiles<A>([&]<typename Tiles>() {
    parallel(groups, rows * y.count * kGroup, [&](int64_t begin, int64_t end) {
      const Scratch<A> memory(2 * size + other);
      A *total = memory.get(), *from = total + size, *against = from + size;
      std::fill(from, against + other, A(0));
      for (int64_t group = begin; group < end; ++group) {
        const int64_t column = group * kGroup, width = std::min(kGroup, x.width - column);
        std::fill(total, from, A(0));
        pack(x, first, rows, column, width, from, padded);
        for (int64_t j = 0; j < y.count; j += kRowRun) {
          const int64_t n = std::min(kRowRun, y.count - j);
          if (!same) pack(y, j, n, column, width, against, kRowRun);
          for (int64_t i = 0; i < width; i += kPanel) {
            const A* panel = same ? from + i * padded + j * kPanel : against + i * kRowRun;
            Tiles::differences(c + j, s ? s + j : nullptr, y.count, from + i * padded, rows, panel,
                               n, total + i * padded);
          }
        }
        for (int64_t k = 0; k < rows; ++k) {
          for (int64_t i = 0; i < width; i += kPanel) {
            convert(total + i * padded + k * kPanel, std::min(kPanel, width - i),
                    out + k * out_stride + column + i);
          }
        }
      }
    });
  });
}

// The gradient of a row from that of its direction: what lies along the row is taken out, in place.
template <typename A>
FASTREID_VI_CLONES void through_norm(const A* u, A norm, int64_t width, A* du) {
  constexpr int64_t kLanes = 16;
  double lane[kLanes] = {}, dot = 0;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      lane[k] += static_cast<double>(u[i + k]) * static_cast<double>(du[i + k]);
    }
  }
  for (; i < width; ++i) dot += static_cast<double>(u[i]) * static_cast<double>(du[i]);
  for (const double part : lane) dot += part;
  const A along = static_cast<A>(dot);
  const A length = norm < 0 ? static_cast<A>(kNormFloor) : norm;
  for (int64_t k = 0; k < width; ++k) du[k] = (du[k] - u[k] * along) / length;
}

// A gradient [N, D] that is summed in A, then written as T: for the cosine of the rows' directions,
// from which that of the rows follows. Sums go straight into the result where the dtypes agree.
template <typename T>
class Gradient {
 public:
  using A = accumulate_t<T>;
  explicit Gradient(const Tensor& like, Metric metric)
      : tensor(torch::stable::new_empty(like, like.sizes())),
        unit_(metric == Metric::cosine && !std::is_same_v<T, A> ? like.numel() : 0),
        metric_(metric) {}

  // Calls body with the memory that takes the sums, [N, D] contiguous.
  template <typename F>
  void sum(F&& body) {
    T* out = tensor.template mutable_data_ptr<T>();
    if (metric_ == Metric::cosine && !std::is_same_v<T, A>) {
      body(unit_.get());
    } else {
      body(out);
    }
  }
  void finish(const Rows<A>& rows) {
    if (metric_ != Metric::cosine) return;
    T* out = tensor.template mutable_data_ptr<T>();
    sum([&](auto* du) {
      parallel(rows.count, rows.width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if constexpr (std::is_same_v<decltype(du), A*>) {
            A* row = du + i * rows.width;
            through_norm(rows.row(i), rows.norm[static_cast<size_t>(i)], rows.width, row);
            if constexpr (!std::is_same_v<T, A>) convert(row, rows.width, out + i * rows.width);
          }
        }
      });
    });
  }

  Tensor tensor;

 private:
  Scratch<A> unit_;
  Metric metric_;
};

}  // namespace fastreid_vi
