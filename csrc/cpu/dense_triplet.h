// The dense triplet loss over distances, shared by the loss on maps and by the whole block.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace fastreid_vi {

// Loss of squared distances [B, S], and the slopes of both distances over the distances, [2, B, S]:
// times a difference vector they are the gradient; zero where a distance is.
template <typename A>
A position_losses(const double* near, const double* far, const A* weight, int64_t batch,
                  int64_t size, double margin, bool over_batch, A* slopes) {
  const int64_t count = batch * size;
  std::vector<double> shared(over_batch ? static_cast<size_t>(size) : 0);
  for (int64_t i = 0; over_batch && i < count; ++i) {
    shared[static_cast<size_t>(i % size)] +=
        static_cast<double>(weight[i]) / static_cast<double>(batch);
  }
  double loss = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double n = std::sqrt(near[i]), f = std::sqrt(far[i]), hinge = margin + n - f;
    const double w =
        over_batch ? shared[static_cast<size_t>(i % size)] : static_cast<double>(weight[i]);
    if (!(hinge <= 0)) loss += w * hinge;  // NaN counts
    const double slope = hinge > 0 ? w / static_cast<double>(count) : 0;
    slopes[i] = static_cast<A>(n > 0 ? slope / n : 0);
    slopes[count + i] = static_cast<A>(f > 0 ? -slope / f : 0);
  }
  return static_cast<A>(count > 0 ? loss / static_cast<double>(count) : 0);
}

}  // namespace fastreid_vi
