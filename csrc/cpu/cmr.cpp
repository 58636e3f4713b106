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
    const Direction& its = batch.directions[m];
    const double terms = static_cast<double>(its.kept) * static_cast<double>(its.gallery);
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
  int64_t size, height, width;              // D; rows of the visible, of the infrared modality
  std::unique_ptr<double[]> units;          // [N, D]
  std::unique_ptr<double[]> cosine, slope;  // [height, width]

  template <typename T>
  Ranked(const Batch& all, const Units<T>& from, double strength_)
      : batch(all),
        strength(strength_),
        size(from.size),
        height(static_cast<int64_t>(all.members[0].size())),
        width(static_cast<int64_t>(all.members[1].size())),
        units(std::make_unique_for_overwrite<double[]>(from.count * from.size)),
        cosine(std::make_unique_for_overwrite<double[]>(height * width)) {
    parallel(from.count, size, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        sum_units(from.x, from.stride, &i, 1, from.inverse.data(), size, unit(i));
      }
    });
    parallel(height, width * size, [&](int64_t first, int64_t last) {
      for (int64_t v = first; v < last; ++v) {
        for (int64_t i = 0; i < width; ++i) {
          cosine[v * width + i] = dot(unit(batch.members[0][v]), unit(batch.members[1][i]), size);
        }
      }
    });
  }

  double* unit(int64_t row) const { return units.get() + row * size; }

  // Where the cosines of query k of modality m begin, and how far apart they lie.
  int64_t start(int m, int64_t k) const { return m == 0 ? k * width : k; }
  int64_t step(int m) const { return m == 0 ? 1 : width; }

  // The sum of |rank - target| over the kept queries of modality m. With `weight` not zero also
  // adds weight times its derivative to `slope`.
  template <typename A>
  double rank(int m, double weight) {
    const Direction& direction = batch.directions[m];
    const std::vector<int64_t>&queries = batch.members[m], &gallery = batch.members[1 - m];
    const int64_t n = direction.gallery;
    std::vector<double> parts(queries.size());
    parallel(static_cast<int64_t>(queries.size()), 16 * n, [&](int64_t a, int64_t z) {
      SoftRanker<double> ranker(n, strength, false);
      BlockCentring<double> centring(n);
      std::vector<double> row(static_cast<size_t>(n)), ranks(row.size());
      std::vector<int32_t> blocks(row.size());
      for (int64_t k = a; k < z; ++k) {
        const Group& own = batch.groups[batch.group_of[queries[k]]];
        if (!batch.kept(own)) continue;
        const double* c = cosine.get() + start(m, k);
        for (int64_t j = 0; j < n; ++j) row[j] = 0.5 * (1.0 - c[j * step(m)]);
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
        double* s = slope.get() + start(m, k);
        for (int64_t j = 0; j < n; ++j) s[j * step(m)] += ranks[j];
      }
    });
    double total = 0;
    for (const double part : parts) total += part;
    return total;
  }

  // out[i] = gradient of unit row i, for every row. [N, D]
  void gradient(double* out) const {
    for (int m = 0; m < 2; ++m) {
      const std::vector<int64_t>&own = batch.members[m], &other = batch.members[1 - m];
      const auto count = static_cast<int64_t>(own.size());
      const auto terms = static_cast<int64_t>(other.size());
      parallel(count, terms * size, [&](int64_t a, int64_t z) {
        for (int64_t k = a; k < z; ++k) {
          double* row = out + own[k] * size;
          std::fill(row, row + size, 0.0);
          const double* s = slope.get() + start(m, k);
          for (int64_t j = 0; j < terms; ++j) {
            add_scaled(s[j * step(m)], unit(other[j]), size, row);
          }
        }
      });
    }
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
        ranked = std::make_unique<Ranked>(batch, units, strength);
      }
      for (int m = 0; m < 2; ++m) {
        const auto n = static_cast<double>(batch.directions[m].gallery);
        const auto kept = static_cast<double>(batch.directions[m].kept);
        if (batch.closed(m)) total += 0.5 * (n - 1) + remainder[m] / (strength * kept * n);
        if (batch.ranked(m)) total += ranked->rank<A>(m, 0.0) / (kept * n);
      }
      total /= batch.active;
    }
    *loss.mutable_data_ptr<A>() = static_cast<A>(total);
  });
  return loss;
}

template <typename T>
void retrieval_gradient(const Batch& batch, const Units<T>& units, double grad, double strength,
                        T* out) {
  const int64_t size = units.size;
  const bool closed = batch.closed(0) || batch.closed(1);
  const bool ranked = batch.ranked(0) || batch.ranked(1);
  std::unique_ptr<double[]> of_group, of_row;
  if (closed) {
    of_group = std::make_unique_for_overwrite<double[]>(batch.groups.size() * size);
    closed_gradient(batch, units, grad, strength, of_group.get());
  }
  if (ranked) {
    Ranked rows(batch, units, strength);
    rows.slope = std::make_unique<double[]>(rows.height * rows.width);
    for (int m = 0; m < 2; ++m) {
      const Direction& its = batch.directions[m];
      const double terms = static_cast<double>(its.kept) * static_cast<double>(its.gallery);
      if (batch.ranked(m)) rows.template rank<accumulate_t<T>>(m, grad / (batch.active * terms));
    }
    of_row = std::make_unique_for_overwrite<double[]>(units.count * size);
    rows.gradient(of_row.get());
  }
  parallel(units.count, size, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      const int64_t i = batch.rows[k];  // rows of a group together: their gradient stays in cache
      double* g = closed ? of_group.get() + batch.group_of[i] * size : of_row.get() + i * size;
      if (closed && ranked) {
        add_scaled(1.0, g, size, of_row.get() + i * size);
        g = of_row.get() + i * size;
      }
      through_norm(units.x + i * units.stride, g, size, units.inverse[i], units.floored(i),
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
      retrieval_gradient(batch, Units<T>(rows), g, strength, out.mutable_data_ptr<T>());
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
