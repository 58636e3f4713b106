// MCJA's cross-modality retrieval loss. In closed form it is linear in the cosines: sums of unit
// rows per identity suffice. Small galleries rank row by row. All sums are float64: the loss is a
// large constant with a small remainder, and its gradient a difference of sums.
#include "cmr.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <vector>

namespace fastreid_vi {
namespace {

using torch::stable::Tensor;

constexpr int64_t kColumns = 128;  // columns whose sums over every group stay in cache

// Sums over groups for a few columns: of each group, of each modality as a gallery, and of its kept
// queries weighted by their share of matches p / n.
struct ColumnSums {
  std::vector<double> group;
  std::array<std::array<double, kColumns>, 2> gallery, query;

  explicit ColumnSums(const Batch& batch) : group(batch.groups.size() * kColumns) {}

  double* of(int64_t g) { return group.data() + g * kColumns; }

  template <typename T>
  void take(const Batch& batch, const Units<T>& units, int64_t column, int64_t width) {
    for (int m = 0; m < 2; ++m) {
      gallery[m].fill(0.0);
      query[m].fill(0.0);
    }
    for (size_t g = 0; g < batch.groups.size(); ++g) {
      const Group& its = batch.groups[g];
      sum_units(units.x + column, units.stride, batch.rows.data() + its.first, its.size,
                units.inverse.data(), width, of(g));
      const int m = its.modality;
      if (batch.closed(1 - m)) add_scaled(1.0, of(g), width, gallery[m].data());
      if (batch.closed(m) && batch.kept(its)) {
        const double share = static_cast<double>(batch.matches(its)) /
                             static_cast<double>(batch.directions[m].gallery);
        add_scaled(share, of(g), width, query[m].data());
      }
    }
  }
};

// What each direction in closed form adds to its constant (n - 1) / 2:
// sum over kept queries i of (p_i / n) h_i . S - h_i . S_id(i), over strength q n.
template <typename T>
std::array<double, 2> closed_remainders(const Batch& batch, const Units<T>& units) {
  const int64_t blocks = (units.size + kColumns - 1) / kColumns;
  std::vector<std::array<double, 2>> parts(static_cast<size_t>(blocks));
  parallel(blocks, units.count * kColumns, [&](int64_t from, int64_t to) {
    ColumnSums sums(batch);
    for (int64_t b = from; b < to; ++b) {
      const int64_t column = b * kColumns, width = std::min(kColumns, units.size - column);
      sums.take(batch, units, column, width);
      std::array<double, 2>& part = parts[b];
      for (int m = 0; m < 2; ++m) {
        part[m] = dot(sums.query[m].data(), sums.gallery[1 - m].data(), width);
      }
      for (size_t g = 0; g < batch.groups.size(); ++g) {
        const Group& its = batch.groups[g];
        if (batch.closed(its.modality) && batch.kept(its)) {
          part[its.modality] -= dot(sums.of(g), sums.of(its.partner), width);
        }
      }
    }
  });
  std::array<double, 2> total = {};
  for (const auto& part : parts) {
    for (int m = 0; m < 2; ++m) total[m] += part[m];
  }
  return total;
}

// The gradient of every unit row of a group, from the directions in closed form. [groups, D]
template <typename T>
void closed_gradient(const Batch& batch, const Units<T>& units, double grad, double strength,
                     double* out) {
  std::array<double, 2> weight = {};
  for (int m = 0; m < 2; ++m) {
    const double terms = batch.directions[m].terms();
    if (batch.closed(m)) weight[m] = grad / (batch.active * strength * terms);
  }
  const int64_t blocks = (units.size + kColumns - 1) / kColumns;
  parallel(blocks, units.count * kColumns, [&](int64_t from, int64_t to) {
    ColumnSums sums(batch);
    for (int64_t b = from; b < to; ++b) {
      const int64_t column = b * kColumns, width = std::min(kColumns, units.size - column);
      sums.take(batch, units, column, width);
      for (size_t g = 0; g < batch.groups.size(); ++g) {
        const Group& its = batch.groups[g];
        const int m = its.modality;
        const bool asks = batch.closed(m) && batch.kept(its);
        const bool answers =
            batch.closed(1 - m) && its.partner != kNone && batch.kept(batch.groups[its.partner]);
        double* row = out + g * units.size + column;
        std::fill(row, row + width, 0.0);
        if (asks) {
          const double share = static_cast<double>(batch.matches(its)) /
                               static_cast<double>(batch.directions[m].gallery);
          add_scaled(weight[m] * share, sums.gallery[1 - m].data(), width, row);
        }
        if (batch.closed(1 - m)) {
          add_scaled(weight[1 - m], sums.query[1 - m].data(), width, row);
        }
        if (asks || answers) {
          const double own = (asks ? weight[m] : 0.0) + (answers ? weight[1 - m] : 0.0);
          add_scaled(-own, sums.of(its.partner), width, row);
        }
      }
    }
  });
}

// Directions whose gallery is too small for the closed form: cosines, ranks and, in the backward
// pass, slopes of the loss in the cosines, row by row.
struct Ranked {
  const Batch& batch;
  double strength;
  std::array<Tensor, 2> units;  // of each modality, in float64 [its rows, D]
  Tensor cosine, slope;         // [visible, infrared]

  template <typename T>
  Ranked(const Batch& all, const Units<T>& from, double strength_, const Tensor& like)
      : batch(all),
        strength(strength_),
        units{unit_rows(0, from, like), unit_rows(1, from, like)},
        cosine(torch::stable::matmul(units[0], torch::stable::transpose(units[1], 0, 1))),
        slope(torch::stable::new_zeros(cosine, {cosine.size(0), cosine.size(1)})) {}

  template <typename T>
  Tensor unit_rows(int m, const Units<T>& from, const Tensor& like) const {
    const std::vector<int64_t>& members = batch.members[m];
    const auto count = static_cast<int64_t>(members.size());
    Tensor out = torch::stable::new_empty(like, {count, from.size}, ScalarType::Double);
    double* rows = out.mutable_data_ptr<double>();
    parallel(count, from.size, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        sum_units(from.x, from.stride, &members[k], 1, from.inverse.data(), from.size,
                  rows + k * from.size);
      }
    });
    return out;
  }

  // The sum of |rank - target| over the kept queries of modality m. With `weight` not zero also
  // adds weight times its derivative to `slope`.
  template <typename A>
  double rank(int m, double weight) {
    const std::vector<int64_t>&queries = batch.members[m], &gallery = batch.members[1 - m];
    const int64_t n = batch.directions[m].gallery;
    // Where the pairs of one query begin, and how far apart they lie.
    const int64_t next = m == 0 ? n : 1, step = m == 0 ? 1 : static_cast<int64_t>(queries.size());
    const double* cosines = cosine.const_data_ptr<double>();
    double* slopes = slope.mutable_data_ptr<double>();
    std::vector<double> parts(queries.size());
    parallel(static_cast<int64_t>(queries.size()), 16 * n, [&](int64_t from, int64_t to) {
      SoftRanker<double> ranker(n, strength, false);
      BlockCentring<double> centring(n);
      std::vector<double> row(static_cast<size_t>(n)), ranks(row.size());
      std::vector<int32_t> blocks(row.size());
      for (int64_t k = from; k < to; ++k) {
        const Group& own = batch.groups[batch.group_of[queries[k]]];
        if (!batch.kept(own)) continue;
        for (int64_t j = 0; j < n; ++j) row[j] = 0.5 * (1.0 - cosines[k * next + j * step]);
        ranker.row(row.data(), ranks.data(), blocks.data());
        for (int64_t j = 0; j < n; ++j) {
          const bool match = batch.group_of[gallery[j]] == own.partner;
          // In the loss's type: a rank that rounds to its target is at it.
          const double error = static_cast<A>(ranks[j]) - static_cast<A>(match ? 1 : n);
          parts[k] += std::abs(error);
          row[j] = error > 0 ? weight : error < 0 ? -weight : 0.0;
        }
        if (weight == 0.0) continue;
        centring.row(row.data(), blocks.data(), -0.5 / strength, ranks.data());
        for (int64_t j = 0; j < n; ++j) slopes[k * next + j * step] += ranks[j];
      }
    });
    double total = 0;
    for (const double part : parts) total += part;
    return total;
  }

  // The gradient of the unit rows of each modality.
  std::array<Tensor, 2> gradient() const {
    return {torch::stable::matmul(slope, units[1]),
            torch::stable::matmul(torch::stable::transpose(slope, 0, 1), units[0])};
  }
};

Tensor cross_modality_retrieval_loss(const Tensor& embeddings, const Tensor& labels,
                                     const Tensor& modalities, double strength) {
  const Tensor rows = with_unit_rows(embeddings);
  Tensor loss = torch::stable::new_empty(embeddings, {}, accumulate_type(embeddings.scalar_type()));
  const Batch batch(labels, modalities, strength);
  for_floating(embeddings.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    double total = 0;
    if (batch.active > 0) {
      const Units<T> units(rows);
      std::array<double, 2> remainder = {};
      if (batch.closed(0) || batch.closed(1)) remainder = closed_remainders(batch, units);
      std::unique_ptr<Ranked> ranked;
      if (batch.ranked(0) || batch.ranked(1)) {
        ranked = std::make_unique<Ranked>(batch, units, strength, rows);
      }
      for (int m = 0; m < 2; ++m) {
        const auto n = static_cast<double>(batch.directions[m].gallery);
        const double terms = batch.directions[m].terms();
        if (batch.closed(m)) total += 0.5 * (n - 1) + remainder[m] / (strength * terms);
        if (batch.ranked(m)) total += ranked->rank<A>(m, 0.0) / terms;
      }
      total /= batch.active;
    }
    *loss.mutable_data_ptr<A>() = static_cast<A>(total);
  });
  return loss;
}

template <typename T>
void retrieval_gradient(const Batch& batch, const Tensor& rows, double grad, double strength,
                        T* out) {
  const Units<T> units(rows);
  const int64_t size = units.size;
  const bool closed = batch.closed(0) || batch.closed(1);
  const bool ranked = batch.ranked(0) || batch.ranked(1);
  std::unique_ptr<double[]> of_group;
  std::array<Tensor, 2> of_row;
  if (closed) {
    of_group = std::make_unique_for_overwrite<double[]>(batch.groups.size() * size);
    closed_gradient(batch, units, grad, strength, of_group.get());
  }
  if (ranked) {
    Ranked pairs(batch, units, strength, rows);
    for (int m = 0; m < 2; ++m) {
      const double terms = batch.directions[m].terms();
      if (batch.ranked(m)) pairs.template rank<accumulate_t<T>>(m, grad / (batch.active * terms));
    }
    of_row = pairs.gradient();
  }
  parallel(units.count, size, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      const int64_t i = batch.rows[k];  // rows of a group together: their gradient stays in cache
      const int64_t g = batch.group_of[i];
      double* row = closed ? of_group.get() + g * size : nullptr;
      if (ranked) {
        double* own = of_row[batch.groups[g].modality].template mutable_data_ptr<double>() +
                      batch.place[i] * size;
        if (closed) add_scaled(1.0, row, size, own);
        row = own;
      }
      through_norm(units.x + i * units.stride, row, size, units.inverse[i], units.floored(i),
                   out + i * size);
    }
  });
}

Tensor cross_modality_retrieval_loss_backward(const Tensor& grad, const Tensor& embeddings,
                                              const Tensor& labels, const Tensor& modalities,
                                              double strength) {
  const Tensor rows = with_unit_rows(embeddings);
  Tensor out = torch::stable::new_empty(rows, {rows.size(0), rows.size(1)});
  const Batch batch(labels, modalities, strength);
  for_floating(embeddings.scalar_type(), [&]<typename T>() {
    const auto g = static_cast<double>(*grad.const_data_ptr<accumulate_t<T>>());
    if (batch.active > 0) {
      retrieval_gradient(batch, rows, g, strength, out.mutable_data_ptr<T>());
    }
  });
  if (batch.active == 0) torch::stable::zero_(out);
  return out;
}

}  // namespace
}  // namespace fastreid_vi

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("cross_modality_retrieval_loss", TORCH_BOX(&fastreid_vi::cross_modality_retrieval_loss));
  m.impl("cross_modality_retrieval_loss_backward",
         TORCH_BOX(&fastreid_vi::cross_modality_retrieval_loss_backward));
}
