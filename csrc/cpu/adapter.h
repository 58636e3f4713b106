// The [B, C]-sized work of the modality distribution adapter, in float64: the gate and both batch
// norms, forward and backward. Values [B, C] lie sample by sample.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "common.h"
#include "cpu/channels.h"

namespace fastreid_vi {
namespace {

using Vector = std::vector<double>;

inline Vector zeros(int64_t size) { return Vector(static_cast<size_t>(size)); }

// Mean and biased variance over samples of values [B, C], or the given ones.
struct BatchNorm {
  BatchNorm(int64_t channels, const std::optional<Tensor>& mean, const std::optional<Tensor>& var)
      : mean(values_of(mean, channels, 0.0)),
        variance(values_of(var, channels, 0.0)),
        fixed(mean.has_value()) {}
  Vector mean, variance;
  bool fixed;

  // `within` [B, C]: variance inside each sample, where a value is itself a mean.
  void measure(const Vector& values, const Vector* within, int64_t batches) {
    const size_t channels = mean.size();
    for (int64_t b = 0; b < batches && !fixed; ++b) {
      for (size_t c = 0; c < channels; ++c) mean[c] += values[b * channels + c] / batches;
    }
    for (int64_t b = 0; b < batches && !fixed; ++b) {
      for (size_t c = 0; c < channels; ++c) {
        const double d = values[b * channels + c] - mean[c];
        variance[c] += (d * d + (within ? (*within)[b * channels + c] : 0)) / batches;
      }
    }
  }
};

// z[b, c] = sum over m of weight[c, m] (context[b, m, c] + mean[b, c])
template <typename A>
Vector mixed(const A* context, const double* mean, const Vector& weight, int64_t batches,
             int64_t maps, int64_t channels) {
  Vector z = zeros(batches * channels);
  for (int64_t b = 0; b < batches; ++b) {
    const double* mu = mean + b * channels;
    for (int64_t m = 0; m < maps; ++m) {
      const A* row = context + (b * maps + m) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        z[b * channels + c] += weight[c * maps + m] * (static_cast<double>(row[c]) + mu[c]);
      }
    }
  }
  return z;
}

// What the stages of one call share.
struct AdapterSizes {
  int64_t batches, channels, positions, maps;
  double eps;
  int64_t all() const { return batches * channels; }
};

// The gate, and the affine map y = x + a (x - mean) + d that it makes with the map's batch norm.
struct OpenGate {
  template <typename A>
  OpenGate(const AdapterSizes& sizes, const A* context, const double* means,
           const double* variances, const Vector& ca_weight, const Vector& bn_weight,
           const Vector& bn_bias, const Vector& norm_weight, const Vector& norm_bias, BatchNorm& ca,
           BatchNorm& norm)
      : gate(zeros(sizes.all())), a(gate), d(gate) {
    const Vector z = mixed(context, means, ca_weight, sizes.batches, sizes.maps, sizes.channels);
    ca.measure(z, nullptr, sizes.batches);
    Vector between = zeros(sizes.all()), within = between;
    for (int64_t i = 0; i < sizes.all(); ++i) {
      const int64_t c = i % sizes.channels;
      const double normal = (z[i] - ca.mean[c]) / std::sqrt(ca.variance[c] + sizes.eps);
      gate[i] = 1 / (1 + std::exp(-(bn_weight[c] * normal + bn_bias[c])));
      between[i] = gate[i] * means[i];
      within[i] = gate[i] * gate[i] * variances[i];
    }
    norm.measure(between, &within, sizes.batches);
    for (int64_t i = 0; i < sizes.all(); ++i) {
      const int64_t c = i % sizes.channels;
      const double scale = norm_weight[c] / std::sqrt(norm.variance[c] + sizes.eps);
      a[i] = scale * gate[i];
      d[i] = scale * (between[i] - norm.mean[c]) + norm_bias[c];
    }
  }
  Vector gate, a, d;
};

// dx = on_g g - on_x (x - mean) - offset + what comes through the attention from `context`, the
// gradient of sum over m of ca_weight t; and the gradients of the parameters.
struct CloseGate {
  template <typename A>
  CloseGate(const AdapterSizes& sizes, const Vector& sum_g, const Vector& sum_gc, const A* context,
            const double* means, const double* variances, const double* gates,
            const Vector& ca_weight, const Vector& bn_weight, const Vector& norm_weight,
            const BatchNorm& ca, const BatchNorm& norm)
      : on_g(zeros(sizes.all())),
        on_x(on_g),
        offset(on_g),
        mixed_gradient(on_g),
        ca_gradient(zeros(sizes.channels * sizes.maps)),
        bn_weight_gradient(zeros(sizes.channels)),
        bn_bias_gradient(bn_weight_gradient),
        norm_weight_gradient(bn_weight_gradient),
        norm_bias_gradient(bn_weight_gradient) {
    const int64_t channels = sizes.channels;
    const double positions = static_cast<double>(sizes.positions);
    const double pixels = static_cast<double>(sizes.batches) * positions;
    Vector shift = zeros(sizes.all()), rstd = zeros(channels);
    for (int64_t c = 0; c < channels; ++c) rstd[c] = 1 / std::sqrt(norm.variance[c] + sizes.eps);
    for (int64_t i = 0; i < sizes.all(); ++i) {
      const int64_t c = i % channels;
      shift[i] = rstd[c] * (gates[i] * means[i] - norm.mean[c]);
      norm_bias_gradient[c] += sum_g[i];
      norm_weight_gradient[c] += rstd[c] * gates[i] * sum_gc[i] + shift[i] * sum_g[i];
    }
    const Vector z = mixed(context, means, ca_weight, sizes.batches, sizes.maps, channels);
    Vector normal = zeros(sizes.all()), dz = normal;
    for (int64_t i = 0; i < sizes.all(); ++i) {
      const int64_t c = i % channels;
      const double scale = norm_weight[c] * rstd[c], g = gates[i];
      if (!norm.fixed) {
        on_x[i] = scale * rstd[c] * g * norm_weight_gradient[c] / pixels;
        offset[i] = scale * (norm_bias_gradient[c] + shift[i] * norm_weight_gradient[c]) / pixels;
      }
      const double through_mean = means[i] * (scale * sum_g[i] - positions * offset[i]);
      const double dg = through_mean + scale * sum_gc[i] - positions * on_x[i] * variances[i];
      dz[i] = dg * g * (1 - g);
      normal[i] = (z[i] - ca.mean[c]) / std::sqrt(ca.variance[c] + sizes.eps);
      bn_bias_gradient[c] += dz[i];
      bn_weight_gradient[c] += dz[i] * normal[i];
      on_g[i] = 1 + scale * g;
      on_x[i] *= g;
      offset[i] *= g;
    }
    for (int64_t i = 0; i < sizes.all(); ++i) {
      const int64_t b = i / channels, c = i % channels;
      if (!ca.fixed) {
        dz[i] -= (bn_bias_gradient[c] + normal[i] * bn_weight_gradient[c]) / sizes.batches;
      }
      mixed_gradient[i] = bn_weight[c] * dz[i] / std::sqrt(ca.variance[c] + sizes.eps);
      for (int64_t m = 0; m < sizes.maps; ++m) {
        ca_gradient[c * sizes.maps + m] +=
            mixed_gradient[i] *
            (static_cast<double>(context[(b * sizes.maps + m) * channels + c]) + means[i]);
      }
    }
  }
  Vector on_g, on_x, offset, mixed_gradient;
  Vector ca_gradient, bn_weight_gradient, bn_bias_gradient;
  Vector norm_weight_gradient, norm_bias_gradient;
};

}  // namespace
}  // namespace fastreid_vi
