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
#include <span>
#include <tuple>
#include <type_traits>
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

constexpr int64_t kColumns = 1024;  // columns in which the rows of an identity stay in the cache

// Identities in the order of their first rows.
struct Identities {
  std::vector<int64_t> identity;  // [N] of each row
  std::vector<int64_t> begin;     // [P + 1] where its rows begin in `rows`
  std::vector<int64_t> rows;      // [N] by identity, ascending

  // Rows of the same key belong together; `keys` are labels, or first rows.
  Identities(const int64_t* keys, int64_t count)
      : identity(static_cast<size_t>(count)), begin(1, 0), rows(static_cast<size_t>(count)) {
    std::unordered_map<int64_t, size_t> known;
    for (size_t i = 0; i < identity.size(); ++i) {
      const auto [entry, fresh] = known.try_emplace(keys[i], known.size());
      if (fresh) begin.push_back(0);
      identity[i] = static_cast<int64_t>(entry->second);
      ++begin[entry->second + 1];
    }
    for (size_t p = 1; p < begin.size(); ++p) begin[p] += begin[p - 1];
    std::vector<int64_t> next(begin);
    for (size_t i = 0; i < identity.size(); ++i) {
      rows[static_cast<size_t>(next[static_cast<size_t>(identity[i])]++)] = static_cast<int64_t>(i);
    }
  }
  int64_t count() const { return static_cast<int64_t>(begin.size()) - 1; }
  std::span<const int64_t> of(int64_t p) const {
    const auto* from = begin.data() + p;
    return {rows.data() + from[0], rows.data() + from[1]};
  }
  int64_t first_of(int64_t p) const { return of(p).front(); }
};

// In float64: a first row far from the centre makes large sums of which little remains.
template <typename A>
FASTREID_VI_CLONES void add_difference(const A* x, const A* base, int64_t width, double* sum) {
  for (int64_t k = 0; k < width; ++k) sum[k] += static_cast<double>(x[k] - base[k]);
}

template <typename A>
FASTREID_VI_CLONES void finish_centre(const double* sum, const A* base, int64_t rows, int64_t width,
                                      A* offset, A* centre) {
  const auto count = static_cast<double>(rows);
  for (int64_t k = 0; k < width; ++k) {
    const double mean = sum[k] / count;
    offset[k] = static_cast<A>(mean);
    centre[k] = static_cast<A>(static_cast<double>(base[k]) + mean);
  }
}

// sum of ((x - base) - offset)^2, in short sums
template <typename A>
FASTREID_VI_CLONES A square_of(const A* x, const A* base, const A* offset, int64_t width) {
  constexpr int64_t kLanes = 64;
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
  for (int64_t left = kLanes / 2; left > 0; left /= 2) {
    for (int64_t k = 0; k < left; ++k) lane[k] += lane[k + left];
  }
  return square + lane[0];
}

// sum += scale * ((x - base) - offset)
template <typename A>
FASTREID_VI_CLONES void add_pull(const A* x, const A* base, const A* offset, A scale, int64_t width,
                                 A* sum) {
  for (int64_t k = 0; k < width; ++k) sum[k] += scale * ((x[k] - base[k]) - offset[k]);
}

// out = scale * ((x - base) - offset) + shift
template <typename A>
FASTREID_VI_CLONES void pull(const A* x, const A* base, const A* offset, A scale, const A* shift,
                             int64_t width, A* out) {
  for (int64_t k = 0; k < width; ++k) {
    out[k] = scale * ((x[k] - base[k]) - offset[k]) + shift[k];
  }
}

// out = (push - total) / rows
template <typename A>
FASTREID_VI_CLONES void share(const A* total, const A* push, A rows, int64_t width, A* out) {
  for (int64_t k = 0; k < width; ++k) out[k] = ((push ? push[k] : A(0)) - total[k]) / rows;
}

// Columns [column, column + width) of one identity.
struct Block {
  int64_t identity, index, column, width;
};

// Calls body(block) for blocks of columns of every identity, in parallel.
template <typename A, typename F>
void each_block(const Rows<A>& x, const Identities& ids, const F& body) {
  const int64_t blocks = fastreid_vi::blocks_of(x.width, kColumns);
  const int64_t cost = x.count * std::min(kColumns, x.width) / ids.count();
  fastreid_vi::parallel(ids.count() * blocks, cost, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t index = item % blocks, column = index * kColumns;
      body(Block{item / blocks, index, column, std::min(kColumns, x.width - column)});
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

  // One block of one centre.
  void fill(const Rows<A>& x, const Identities& ids, const Block& block) const {
    const int64_t p = block.identity;
    const int64_t at = p * width + block.column;
    const A* base = x.row(ids.first_of(p)) + block.column;
    double sum[kColumns] = {};
    for (const int64_t i : ids.of(p).subspan(1)) {
      add_difference(x.row(i) + block.column, base, block.width, sum);
    }
    finish_centre(sum, base, static_cast<int64_t>(ids.of(p).size()), block.width, offset.get() + at,
                  centre.get() + at);
  }
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
  for (int64_t i = 0; i < n; ++i) {
    first.mutable_data_ptr<int64_t>()[i] = ids.first_of(ids.identity[static_cast<size_t>(i)]);
  }
  fastreid_vi::for_floating(embeddings.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    double sum = 0, apart = 0;
    if (n > 0) {
      const Rows<A> x = fastreid_vi::rows_of<T>(embeddings, Metric::euclidean);
      const Centres<A> centres(ids.count(), x.width);
      const Scratch<A> squares(fastreid_vi::blocks_of(x.width, kColumns) * n);
      each_block(x, ids, [&](const Block& block) {
        centres.fill(x, ids, block);
        const int64_t p = block.identity;
        const A* base = x.row(ids.first_of(p)) + block.column;
        const A* offset = centres.offset.get() + p * x.width + block.column;
        for (const int64_t i : ids.of(p)) {
          squares.get()[block.index * n + i] =
              square_of(x.row(i) + block.column, base, offset, block.width);
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
      fastreid_vi::differences(centres, first, rows, centres, gaps, nullptr,
                               out + first * centres.width, centres.width);
    }
  });
  return any;
}

// dx of one identity in one block of columns: scale_i (x_i - c), less its mean over the rows, and
// the share of what pushes the centre, if anything does.
template <typename A, typename T>
void pull_rows(const Rows<A>& x, const Identities& ids, const Block& block,
               const Centres<A>& centres, const A* scale, const A* push, T* out) {
  const int64_t p = block.identity, at = p * x.width + block.column;
  const A *base = x.row(ids.first_of(p)) + block.column, *offset = centres.offset.get() + at;
  A total[kColumns] = {}, result[kColumns];
  for (const int64_t i : ids.of(p)) {
    add_pull(x.row(i) + block.column, base, offset, scale[i], block.width, total);
  }
  share(total, push ? push + at : nullptr, static_cast<A>(ids.of(p).size()), block.width, total);
  for (const int64_t i : ids.of(p)) {
    T* to = out + i * x.width + block.column;
    if constexpr (std::is_same_v<T, A>) {
      pull(x.row(i) + block.column, base, offset, scale[i], total, block.width, to);
    } else {
      pull(x.row(i) + block.column, base, offset, scale[i], total, block.width, result);
      fastreid_vi::convert(result, block.width, to);
    }
  }
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
    const A share = *grad_pull.const_data_ptr<A>() / static_cast<A>(n);
    std::vector<A> scale(far.const_data_ptr<A>(), far.const_data_ptr<A>() + n);
    for (A& s : scale) s = s == 0 ? A(0) : share / s;
    T* out = dx.mutable_data_ptr<T>();
    // Centres that nothing pushes are the rule: dx is written while the rows are in the cache, and
    // once more only where the margin acts.
    each_block(x, ids, [&](const Block& block) {
      centres.fill(x, ids, block);
      pull_rows<A>(x, ids, block, centres, scale.data(), nullptr, out);
    });
    const Scratch<A> push(ids.count() * x.width);
    if (push_gradient(centres.rows(embeddings), static_cast<A>(margin),
                      *grad_push.const_data_ptr<A>(), push.get())) {
      each_block(x, ids, [&](const Block& block) {
        pull_rows<A>(x, ids, block, centres, scale.data(), push.get(), out);
      });
    }
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("center_cluster_loss", TORCH_BOX(&center_cluster_loss));
  m.impl("center_cluster_loss_backward", TORCH_BOX(&center_cluster_loss_backward));
}
