// MPANet's centre cluster loss: rows near their centre, centres apart.
//
// A block of columns is read once: its centres are known when its last row has been added, and the
// block of rows is still in the cache. Centres are kept as offsets from the first row of their
// identity too: x - c = (x - x_first) - offset is exact for near-equal rows, and zero for equal
// ones.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "common.h"
#include "cpu/pairs.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::Metric;
using fastreid_vi::Rows;
using fastreid_vi::Scratch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kColumns = 256;  // columns of the rows that stay in the cache

// Identities in the order of their first rows.
struct Identities {
  std::vector<int64_t> first;     // [P] its first row
  std::vector<int64_t> size;      // [P] number of its rows
  std::vector<int64_t> identity;  // [N] of each row

  // Rows of the same key belong together; `keys` are labels, or first rows.
  Identities(const int64_t* keys, int64_t rows) : identity(static_cast<size_t>(rows)) {
    std::unordered_map<int64_t, int64_t> known;
    for (int64_t i = 0; i < rows; ++i) {
      const auto [entry, fresh] = known.try_emplace(keys[i], count());
      if (fresh) first.push_back(i), size.push_back(0);
      identity[static_cast<size_t>(i)] = entry->second;
      ++size[static_cast<size_t>(entry->second)];
    }
  }
  int64_t count() const { return static_cast<int64_t>(first.size()); }
  int64_t of(int64_t row) const { return identity[static_cast<size_t>(row)]; }
  int64_t first_of(int64_t p) const { return first[static_cast<size_t>(p)]; }
  int64_t size_of(int64_t p) const { return size[static_cast<size_t>(p)]; }
};

template <typename A>
FASTREID_VI_CLONES void add_difference(const A* x, const A* base, int64_t width, A* sum) {
  for (int64_t k = 0; k < width; ++k) sum[k] += x[k] - base[k];
}

template <typename A>
FASTREID_VI_CLONES void finish_centre(const A* base, A rows, int64_t width, A* offset, A* centre) {
  for (int64_t k = 0; k < width; ++k) {
    offset[k] /= rows;
    centre[k] = base[k] + offset[k];
  }
}

// sum of ((x - base) - offset)^2, in short sums
template <typename A>
FASTREID_VI_CLONES A square_of(const A* x, const A* base, const A* offset, int64_t width) {
  constexpr int64_t kLanes = 32;
  A lane[kLanes] = {}, square = 0;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      const A difference = (x[i + k] - base[i + k]) - offset[i + k];
      lane[k] += difference * difference;
    }
  }
  for (; i < width; ++i) {
    const A difference = (x[i] - base[i]) - offset[i];
    square += difference * difference;
  }
  for (const A part : lane) square += part;
  return square;
}

// out = scale * ((x - base) - offset), and sum += out
template <typename A>
FASTREID_VI_CLONES void pull(const A* x, const A* base, const A* offset, A scale, int64_t width,
                             A* out, A* sum) {
  for (int64_t k = 0; k < width; ++k) {
    out[k] = scale * ((x[k] - base[k]) - offset[k]);
    sum[k] += out[k];
  }
}

template <typename A>
FASTREID_VI_CLONES void add_scaled(const A* x, A scale, int64_t width, A* out) {
  for (int64_t k = 0; k < width; ++k) out[k] += scale * x[k];
}

// Columns [column, column + width) of all rows and of their centres.
template <typename A>
struct Block {
  int64_t index, column, width;
};

// Calls body(block) for blocks of columns, in parallel.
template <typename A, typename F>
void each_block(const Rows<A>& x, const F& body) {
  const int64_t blocks = fastreid_vi::blocks_of(x.width, kColumns);
  fastreid_vi::parallel(blocks, x.count * kColumns, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t column = index * kColumns;
      body(Block<A>{index, column, std::min(kColumns, x.width - column)});
    }
  });
}

// Centres of all identities and their offsets from the first row.
template <typename A>
struct Centres {
  explicit Centres(int64_t identities, int64_t width)
      : centre(identities * width), offset(identities * width), width(width), count(identities) {}
  Scratch<A> centre, offset;  // [P, D]
  int64_t width, count;

  void fill(const Rows<A>& x, const Identities& ids, const Block<A>& block) const {
    for (int64_t p = 0; p < ids.count(); ++p) {
      A* sum = offset.get() + p * width + block.column;
      std::fill(sum, sum + block.width, A(0));
    }
    for (int64_t i = 0; i < x.count; ++i) {
      const int64_t p = ids.of(i), first = ids.first_of(p);
      if (i == first) continue;
      add_difference(x.row(i) + block.column, x.row(first) + block.column, block.width,
                     offset.get() + p * width + block.column);
    }
    for (int64_t p = 0; p < ids.count(); ++p) {
      const int64_t at = p * width + block.column;
      finish_centre(x.row(ids.first_of(p)) + block.column, static_cast<A>(ids.size_of(p)),
                    block.width, offset.get() + at, centre.get() + at);
    }
  }

  // Distances between all centres, [P, P] row by row or at once.
  Rows<A> rows(const Tensor& any) const { return {count, width, width, centre.get(), any, {}, {}}; }
};

// Calls body(rows of centres, first of them, their distances to all centres) strip by strip.
template <typename A, typename F>
void each_gap(const Rows<A>& centres, const F& body) {
  const int64_t strip = fastreid_vi::strip_of(centres.count, centres.count);
  const Scratch<A> gaps(strip * centres.count);
  for (int64_t first = 0; first < centres.count; first += strip) {
    const int64_t rows = std::min(strip, centres.count - first);
    fastreid_vi::distances(centres, first, rows, centres, Metric::euclidean, strip == centres.count,
                           gaps.get(), centres.count);
    body(first, rows, gaps.get());
  }
}

template <typename A>
double pushed(const Rows<A>& centres, A margin) {
  double sum = 0;
  each_gap(centres, [&](int64_t first, int64_t rows, const A* gaps) {
    for (int64_t p = 0; p < rows; ++p) {
      for (int64_t q = first + p + 1; q < centres.count; ++q) {
        const A hinge = margin - gaps[p * centres.count + q];
        sum += hinge <= 0 ? 0.0 : static_cast<double>(hinge);  // NaN stays
      }
    }
  });
  const auto count = static_cast<double>(centres.count);
  return centres.count > 1 ? 2 * sum / (count * (count - 1)) : 0.0;
}

using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Loss center_cluster_loss(const Tensor& embeddings, const Tensor& labels, double margin) {
  const auto kind = fastreid_vi::accumulate_type(embeddings.scalar_type());
  const Tensor own = torch::stable::contiguous(labels);
  const int64_t n = embeddings.size(0);
  Tensor loss = torch::stable::new_empty(embeddings, {}, kind);
  Tensor pull = torch::stable::new_empty(embeddings, {}, kind);
  Tensor push = torch::stable::new_empty(embeddings, {}, kind);
  Tensor first = torch::stable::new_empty(own, {n}, ScalarType::Long);
  Tensor radius = torch::stable::new_empty(embeddings, {n}, kind);
  const Identities ids(own.const_data_ptr<int64_t>(), n);
  for (int64_t i = 0; i < n; ++i) first.mutable_data_ptr<int64_t>()[i] = ids.first_of(ids.of(i));
  fastreid_vi::for_floating(embeddings.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    double sum = 0, apart = 0;
    if (n > 0) {
      const Rows<A> x = fastreid_vi::rows_of<T>(embeddings, Metric::euclidean);
      const Centres<A> centres(ids.count(), x.width);
      const Scratch<A> squares(fastreid_vi::blocks_of(x.width, kColumns) * n);
      each_block(x, [&](const Block<A>& block) {
        centres.fill(x, ids, block);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t p = ids.of(i);
          squares.get()[block.index * n + i] =
              square_of(x.row(i) + block.column, x.row(ids.first_of(p)) + block.column,
                        centres.offset.get() + p * x.width + block.column, block.width);
        }
      });
      for (int64_t i = 0; i < n; ++i) {
        double square = 0;
        for (int64_t b = 0; b * kColumns < x.width; ++b) {
          square += static_cast<double>(squares.get()[b * n + i]);
        }
        const double distance = std::sqrt(square);
        radius.mutable_data_ptr<A>()[i] = static_cast<A>(distance);
        sum += distance;
      }
      sum /= static_cast<double>(n);
      apart = pushed(centres.rows(embeddings), static_cast<A>(margin));
    }
    *loss.mutable_data_ptr<A>() = static_cast<A>(sum + apart);
    *pull.mutable_data_ptr<A>() = static_cast<A>(sum);
    *push.mutable_data_ptr<A>() = static_cast<A>(apart);
  });
  return {loss, pull, push, first, radius};
}

// out [P, D] = sum over the other identities q of -2 grad / (P (P-1)) (c_p - c_q) / |c_p - c_q|,
// over pairs within the margin. False, and nothing written, where there is no such pair.
template <typename A>
bool push_gradient(const Rows<A>& centres, A margin, A grad, A* out) {
  const auto count = static_cast<A>(centres.count);
  const A scale = centres.count > 1 ? -2 * grad / (count * (count - 1)) : A(0);
  const A clamped = std::sqrt(static_cast<A>(fastreid_vi::kSquareFloor));
  bool any = false;
  each_gap(centres, [&](int64_t first, int64_t rows, A* gaps) {
    bool active = false;
    for (int64_t k = 0; k < rows * centres.count; ++k) {
      const bool within = !(gaps[k] <= clamped || gaps[k] >= margin);
      gaps[k] = within ? scale / gaps[k] : A(0);
      active |= within;
    }
    if (!any && active) std::fill(out, out + first * centres.width, A(0));
    any |= active;
    if (any) {
      fastreid_vi::differences(centres, first, rows, centres, gaps, centres.count,
                               out + first * centres.width, centres.width);
    }
  });
  return any;
}

Tensor center_cluster_loss_backward(const Tensor& grad_pull, const Tensor& grad_push,
                                    const Tensor& embeddings, const Tensor& first,
                                    const Tensor& radius, double margin) {
  const Tensor key = torch::stable::contiguous(first), far = torch::stable::contiguous(radius);
  const int64_t n = embeddings.size(0);
  Tensor dx = torch::stable::new_empty(embeddings, embeddings.sizes());
  if (n == 0) return dx;
  const Identities ids(key.const_data_ptr<int64_t>(), n);
  fastreid_vi::for_floating(embeddings.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Rows<A> x = fastreid_vi::rows_of<T>(embeddings, Metric::euclidean);
    const Centres<A> centres(ids.count(), x.width);
    const A* r = far.const_data_ptr<A>();
    const A share = *grad_pull.const_data_ptr<A>() / static_cast<A>(n);
    T* out = dx.mutable_data_ptr<T>();
    each_block(x, [&](const Block<A>& block) { centres.fill(x, ids, block); });
    const Scratch<A> push(ids.count() * x.width);
    const bool pushes = push_gradient(centres.rows(embeddings), static_cast<A>(margin),
                                      *grad_push.const_data_ptr<A>(), push.get());
    each_block(x, [&](const Block<A>& block) {
      const Scratch<A> memory((n + ids.count()) * kColumns);
      A *e = memory.get(), *total = e + n * kColumns;
      std::fill(total, total + ids.count() * kColumns, A(0));
      for (int64_t i = 0; i < n; ++i) {
        const int64_t p = ids.of(i);
        pull(x.row(i) + block.column, x.row(ids.first_of(p)) + block.column,
             centres.offset.get() + p * x.width + block.column, r[i] == 0 ? A(0) : share / r[i],
             block.width, e + i * kColumns, total + p * kColumns);
      }
      for (int64_t p = 0; pushes && p < ids.count(); ++p) {
        add_scaled(push.get() + p * x.width + block.column, A(-1), block.width,
                   total + p * kColumns);
      }
      for (int64_t i = 0; i < n; ++i) {
        const int64_t p = ids.of(i);
        add_scaled(total + p * kColumns, A(-1) / static_cast<A>(ids.size_of(p)), block.width,
                   e + i * kColumns);
        fastreid_vi::convert(e + i * kColumns, block.width, out + i * x.width + block.column);
      }
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("center_cluster_loss", TORCH_BOX(&center_cluster_loss));
  m.impl("center_cluster_loss_backward", TORCH_BOX(&center_cluster_loss_backward));
}
