// What the two ways of the cross-modality retrieval loss share: who queries whom, and unit rows.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <unordered_map>
#include <vector>

#include "softrank.h"

namespace fastreid_vi {
namespace {

constexpr double kNormFloor = 1e-8;
constexpr int64_t kLanes = 16;  // independent sums, so that they vectorise
constexpr int64_t kNone = -1;

// The rows of one identity in one modality.
struct Group {
  int modality;
  int64_t first, size;  // in Batch::rows
  int64_t partner;      // the group of the same identity in the other modality, or kNone
};

// One modality as queries against all rows of the other one.
struct Direction {
  int64_t gallery = 0;  // n
  int64_t kept = 0;     // queries that have a match and a mismatch
  bool closed = false;  // n > 2 / strength: one block per row, and no rank passes its target

  double terms() const { return static_cast<double>(kept) * static_cast<double>(gallery); }
};

struct Batch {
  std::vector<Group> groups;
  std::vector<int64_t> rows;                    // by group
  std::vector<int64_t> group_of;                // of each row of the embeddings
  std::vector<int64_t> place;                   // of each row among those of its modality
  std::array<std::vector<int64_t>, 2> members;  // rows of each modality, in order
  std::array<Direction, 2> directions;
  double active = 0;  // directions with a kept query

  Batch(const torch::stable::Tensor& labels, const torch::stable::Tensor& modalities,
        double strength);

  int64_t matches(const Group& g) const { return g.partner == kNone ? 0 : groups[g.partner].size; }
  bool kept(const Group& g) const {
    return g.partner != kNone && matches(g) < directions[g.modality].gallery;
  }
  bool closed(int m) const { return directions[m].kept > 0 && directions[m].closed; }
  bool ranked(int m) const { return directions[m].kept > 0 && !directions[m].closed; }
};

Batch::Batch(const torch::stable::Tensor& labels, const torch::stable::Tensor& modalities,
             double strength) {
  const torch::stable::Tensor dense = torch::stable::contiguous(labels),
                              kinds = torch::stable::contiguous(modalities);
  const int64_t *label = dense.const_data_ptr<int64_t>(), *kind = kinds.const_data_ptr<int64_t>();
  const int64_t n = labels.size(0);
  std::unordered_map<int64_t, std::array<int64_t, 2>> known;
  known.reserve(static_cast<size_t>(n));
  group_of.resize(static_cast<size_t>(n));
  place.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const int m = kind[i] == 0 ? 0 : 1;
    auto& pair = known.try_emplace(label[i], std::array{kNone, kNone}).first->second;
    if (pair[m] == kNone) {
      pair[m] = static_cast<int64_t>(groups.size());
      groups.push_back({m, 0, 0, pair[1 - m]});
      if (pair[1 - m] != kNone) groups[pair[1 - m]].partner = pair[m];
    }
    group_of[i] = pair[m];
    ++groups[pair[m]].size;
    place[i] = static_cast<int64_t>(members[m].size());
    members[m].push_back(i);
  }
  int64_t first = 0;
  for (Group& g : groups) first = (g.first = first) + g.size;
  std::vector<int64_t> next(groups.size());
  rows.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) rows[groups[group_of[i]].first + next[group_of[i]]++] = i;
  for (int m = 0; m < 2; ++m) {
    Direction& direction = directions[m];
    direction.gallery = static_cast<int64_t>(members[1 - m].size());
    direction.closed = static_cast<double>(direction.gallery) * strength > 2.0;
    for (const Group& g : groups) {
      if (g.modality == m && kept(g)) direction.kept += g.size;
    }
    if (direction.kept > 0) active += 1;
  }
}

template <typename T>
FASTREID_VI_CLONES double square_norm(const T* __restrict x, int64_t size) {
  double lane[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const auto value = static_cast<double>(static_cast<accumulate_t<T>>(x[d + i]));
      lane[i] += value * value;
    }
  }
  for (int64_t i = 0; d + i < size; ++i) {
    const auto value = static_cast<double>(static_cast<accumulate_t<T>>(x[d + i]));
    lane[i] += value * value;
  }
  double total = 0;
  for (const double part : lane) total += part;
  return total;
}

FASTREID_VI_CLONES double dot(const double* __restrict a, const double* __restrict b,
                              int64_t size) {
  double lane[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lane[i] += a[d + i] * b[d + i];
  }
  for (int64_t i = 0; d + i < size; ++i) lane[i] += a[d + i] * b[d + i];
  double total = 0;
  for (const double part : lane) total += part;
  return total;
}

FASTREID_VI_CLONES void add_scaled(double scale, const double* __restrict x, int64_t size,
                                   double* __restrict total) {
  for (int64_t d = 0; d < size; ++d) total[d] += scale * x[d];
}

// total = sum over the rows of the unit rows x / max(|x|, floor).
template <typename T>
FASTREID_VI_CLONES void sum_units(const T* __restrict x, int64_t stride,
                                  const int64_t* __restrict rows, int64_t count,
                                  const double* __restrict inverse, int64_t width,
                                  double* __restrict total) {
  std::fill(total, total + width, 0.0);
  for (int64_t k = 0; k < count; ++k) {
    const T* row = x + rows[k] * stride;
    const double scale = inverse[rows[k]];
    for (int64_t d = 0; d < width; ++d) {
      total[d] += scale * static_cast<double>(static_cast<accumulate_t<T>>(row[d]));
    }
  }
}

// dx = (g - h (h . g)) / |x|; below the norm's floor the cosine is linear, and nothing is
// projected.
template <typename T>
FASTREID_VI_CLONES void through_norm(const T* __restrict x, const double* __restrict g,
                                     int64_t size, double inverse, bool floored,
                                     T* __restrict out) {
  using A = accumulate_t<T>;
  double lane[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      lane[i] += static_cast<double>(static_cast<A>(x[d + i])) * g[d + i];
    }
  }
  for (int64_t i = 0; d + i < size; ++i) {
    lane[i] += static_cast<double>(static_cast<A>(x[d + i])) * g[d + i];
  }
  double along = 0;
  for (const double part : lane) along += part;
  along = floored ? 0.0 : along * inverse;
  if (size == 1 && !floored) inverse *= 0.0;
  for (d = 0; d < size; ++d) {
    const double h = static_cast<double>(static_cast<A>(x[d])) * inverse;
    out[d] = static_cast<T>(static_cast<A>((g[d] - h * along) * inverse));
  }
}

// Embeddings of one type with their inverse norms.
template <typename T>
struct Units {
  const T* x;
  int64_t count, size, stride;
  std::vector<double> inverse;

  Units(const torch::stable::Tensor& rows)
      : x(rows.const_data_ptr<T>()),
        count(rows.size(0)),
        size(rows.size(1)),
        stride(rows.stride(0)),
        inverse(static_cast<size_t>(count)) {
    parallel(count, size, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        // A NaN norm stays NaN: std::max would keep its first argument only.
        const double norm = std::sqrt(square_norm(x + i * stride, size));
        inverse[i] = 1.0 / (norm < kNormFloor ? kNormFloor : norm);
      }
    });
  }

  bool floored(int64_t i) const { return inverse[i] >= 1.0 / kNormFloor; }
};

}  // namespace
}  // namespace fastreid_vi
