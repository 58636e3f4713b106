// The hardest pair of every anchor, from distances that are held at once for a batch and strip by
// strip for more rows.
#pragma once

#include <cstdint>

#include "cpu/pairs.h"

namespace fastreid_vi {

// The farthest positive and the nearest negative of an anchor: the first of equals, and any NaN.
template <typename A>
struct Mined {
  int64_t positive = -1, negative = -1;  // -1: there is none
  A near = 0, far = 0;

  bool valid() const { return positive >= 0 && negative >= 0; }
};

template <typename A>
Mined<A> mine(const A* distance, const int64_t* labels, int64_t count, int64_t label) {
  Mined<A> best;
  for (int64_t j = 0; j < count; ++j) {
    const A d = distance[j];
    if (labels[j] == label) {
      if (best.positive < 0 || d > best.near || (d != d && best.near == best.near)) {
        best.positive = j, best.near = d;
      }
    } else if (best.negative < 0 || d < best.far || (d != d && best.far == best.far)) {
      best.negative = j, best.far = d;
    }
  }
  return best;
}

// Calls body(i, distances of x_i to all of y) for all rows, in parallel.
template <typename A, typename F>
void each_anchor(const Rows<A>& x, const Rows<A>& y, Metric metric, const F& body) {
  const int64_t strip = strip_of(x.count, y.count);
  const bool symmetric = &x == &y && strip == x.count;
  const Scratch<A> matrix(strip * y.count);
  for (int64_t first = 0; first < x.count; first += strip) {
    const int64_t rows = std::min(strip, x.count - first);
    distances(x, first, rows, y, metric, symmetric, matrix.get(), y.count);
    parallel(rows, 4 * y.count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(first + i, matrix.get() + i * y.count);
    });
  }
}

}  // namespace fastreid_vi
