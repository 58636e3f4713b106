// LbA's block, forward: masks, both pairings, the positive reconstruction, the dense triplet loss.
//
// Per sample, with raw rows f, the Gram M = F F^T of each sample and G = F_b F_t^T of each pairing:
// for warped rows w = P F_t, f.w = sum P o G and |w|^2 = sum (P M_t) o P. So the distance to the
// negative reconstruction needs no [S, C] matrix. The positive one is an output, and its distance
// is taken from the differences themselves.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cpu/correspondence.h"
#include "cpu/dense_triplet.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::Index;
using fastreid_vi::Matrix;
using fastreid_vi::Norms;
using fastreid_vi::product;
using fastreid_vi::Result;
using fastreid_vi::Samples;
using fastreid_vi::Scratch;
using fastreid_vi::square;
using torch::stable::Tensor;

// From w in `out`: out = f - e with e = m (f - w), and square[s] = sum over channels of (e + eps)^2
template <typename T, typename A>
FASTREID_VI_CLONES void blend(const T* f, int64_t runs, int64_t width, int64_t stride, bool per_run,
                              const A* mask, A eps, A* out, double* square) {
  constexpr int64_t kLanes = 32;
  if (!per_run) std::fill(square, square + width, 0.0);
  for (int64_t r = 0; r < runs; ++r) {
    const T* from = f + r * stride;
    A* to = out + r * width;
    if (per_run) {
      const A m = mask[r];
      A lane[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        for (int64_t k = 0; k < kLanes; ++k) {
          const A value = static_cast<A>(from[i + k]), e = m * (value - to[i + k]);
          to[i + k] = value - e;
          lane[k] += (e + eps) * (e + eps);
        }
      }
      for (; i < width; ++i) {
        const A value = static_cast<A>(from[i]), e = m * (value - to[i]);
        to[i] = value - e;
        lane[i % kLanes] += (e + eps) * (e + eps);
      }
      square[r] = 0;
      for (int64_t k = 0; k < kLanes; ++k) square[r] += static_cast<double>(lane[k]);
    } else {
      for (int64_t i = 0; i < width; ++i) {
        const A value = static_cast<A>(from[i]), e = mask[i] * (value - to[i]);
        to[i] = value - e;
        square[i] += static_cast<double>((e + eps) * (e + eps));
      }
    }
  }
}

// (m (f - w) + eps)^2 summed over channels, for one position, from w itself.
template <typename A>
double exact_square(const A* p, const Matrix<const A>& query, int64_t i, const Matrix<const A>& key,
                    double mask, double eps) {
  std::vector<double> w(static_cast<size_t>(key.columns));
  for (int64_t j = 0; j < key.rows; ++j) {
    if (p[j] == A(0)) continue;
    for (int64_t c = 0; c < key.columns; ++c) {
      w[static_cast<size_t>(c)] +=
          static_cast<double>(p[j]) * static_cast<double>(key.data[j * key.row + c * key.column]);
    }
  }
  double sum = 0;
  for (int64_t c = 0; c < key.columns; ++c) {
    const auto f = static_cast<double>(query.data[i * query.row + c * query.column]);
    const double e = mask * (f - w[static_cast<size_t>(c)]) + eps;
    sum += e * e;
  }
  return sum;
}

// Squared distances to the reconstruction that is never formed, [S].
template <typename A>
void far_squares(const A* p, const A* gram, const A* warped, const Norms<A>& norms, int64_t b,
                 int64_t t, const Matrix<const A>& query, const Matrix<const A>& key, const A* mask,
                 double eps, double* out) {
  const int64_t size = norms.positions;
  for (int64_t i = 0; i < size; ++i) {
    double cross = 0, own = 0, sum = 0;
    for (int64_t j = 0; j < size; ++j) {
      const auto share = static_cast<double>(p[i * size + j]);
      cross += share * static_cast<double>(gram[i * size + j]);
      own += share * static_cast<double>(warped[i * size + j]);
      sum += share * static_cast<double>(norms.sums(t)[j]);
    }
    const auto m = static_cast<double>(mask[i]);
    const auto whole = static_cast<double>(norms.squares(b)[i]);
    const double apart = whole - 2 * cross + own;
    if (m > 0 && apart < fastreid_vi::kCancelled * whole) {
      out[i] = exact_square(p + i * size, query, i, key, m, eps);
    } else {
      const double shift = static_cast<double>(norms.sums(b)[i]) - sum;
      out[i] = std::max(0.0, m * m * apart + 2 * eps * m * shift +
                                 static_cast<double>(query.columns) * eps * eps);
      if (apart != apart) out[i] = apart;
    }
  }
}

struct Outputs {
  Tensor aligned, loss, comask, probability, lse, gram, mask, slopes;
};

// The pairings of one call, sample by sample.
template <typename T>
class Block {
 public:
  using A = accumulate_t<T>;

  Block(const Tensor& features, const Tensor& positive, const Tensor& negative, double temperature,
        double eps, const Outputs& out)
      : x_(features),
        norms_(x_),
        size_(x_.positions()),
        all_(size_ * size_),
        positive_(positive, x_.count()),
        negative_(negative, x_.count()),
        temperature_(temperature),
        eps_(eps),
        out_(out),
        aligned_(features),
        near(static_cast<size_t>(x_.count() * size_)),
        far(near.size()),
        comask(near.size()) {}

  const Tensor& aligned() const { return aligned_.tensor; }

  void run() {
    const int64_t cost = all_ * x_.channels();
    fastreid_vi::parallel(x_.count(), cost, [&](int64_t from, int64_t to) {
      const Scratch<A> memory(x_.scratch());
      for (int64_t b = from; b < to; ++b) {
        const Matrix<const A> rows = x_.matrix(b, memory.get());
        product(rows, rows.transposed(), square(gram(b), size_));
        fastreid_vi::mask_of(norms_, b, mask(b));
      }
    });
    fastreid_vi::parallel(x_.count(), 3 * cost, [&](int64_t from, int64_t to) {
      Memory memory(x_, aligned_);
      for (int64_t b = from; b < to; ++b) {
        meet_positive(b, memory);
        meet_negative(b, memory);
      }
    });
  }

 private:
  // What one thread works in.
  struct Memory {
    Memory(const Samples<T>& x, const Result<T>& aligned)
        : gram(x.positions() * x.positions()),
          p(x.positions() * x.positions()),
          warped(x.positions() * x.positions()),
          queries(x.scratch()),
          keys(x.scratch()),
          work(aligned.scratch()),
          inverse(2 * x.positions()) {}
    Scratch<A> gram, p, warped, queries, keys, work;
    Scratch<double> inverse;
  };

  A* gram(int64_t b) const { return out_.gram.template mutable_data_ptr<A>() + b * all_; }
  A* mask(int64_t b) const { return out_.mask.template mutable_data_ptr<A>() + b * size_; }

  // G and P of sample b with sample t; both are left in the memory.
  void match(int64_t b, int64_t t, int64_t side, const Matrix<const A>& key, Memory& memory) const {
    product(x_.matrix(b, memory.queries.get()), key.transposed(), square(memory.gram.get(), size_));
    double *iq = memory.inverse.get(), *ik = iq + size_;
    norms_.inverse(b, false, iq);
    norms_.inverse(t, false, ik);
    const int64_t at = side * x_.count() + b;
    fastreid_vi::match_rows(memory.gram.get(), iq, ik, size_, temperature_, memory.p.get(),
                            out_.probability.template mutable_data_ptr<T>() + at * all_,
                            out_.lse.template mutable_data_ptr<A>() + at * size_);
  }

  void meet_positive(int64_t b, Memory& memory) {
    const int64_t t = positive_[b];
    const Matrix<const A> key = x_.matrix(t, memory.keys.get());
    match(b, t, 0, key, memory);
    A* seen = comask.data() + b * size_;
    fastreid_vi::comask_of(memory.p.get(), mask(b), mask(t), size_, seen);
    A* out = aligned_.work(b, memory.work.get());
    product(square(memory.p.get(), size_), key, x_.laid_out(out, x_.width()));
    blend(x_.data(b), x_.runs(), x_.width(), x_.stride(), x_.channels_last(), mask(b),
          static_cast<A>(eps_), out, near.data() + b * size_);
    aligned_.finish(b, out);
  }

  void meet_negative(int64_t b, Memory& memory) {
    const int64_t t = negative_[b];
    const Matrix<const A> key = x_.matrix(t, memory.keys.get());
    match(b, t, 1, key, memory);
    product(square(memory.p.get(), size_), square(gram(t), size_),
            square(memory.warped.get(), size_));
    far_squares(memory.p.get(), memory.gram.get(), memory.warped.get(), norms_, b, t,
                x_.matrix(b, memory.queries.get()), key, mask(b), eps_, far.data() + b * size_);
  }

  Samples<T> x_;
  Norms<A> norms_;
  int64_t size_, all_;
  Index positive_, negative_;
  double temperature_, eps_;
  const Outputs& out_;
  Result<T> aligned_;

 public:
  std::vector<double> near, far;  // squared distances [B, S]
  std::vector<A> comask;          // [B, S]
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dense_alignment(
    const Tensor& features, const Tensor& positive, const Tensor& negative, double temperature,
    double margin, const std::string& weighting, double eps) {
  using torch::stable::new_empty;
  const auto wide = fastreid_vi::accumulate_type(features.scalar_type());
  const int64_t batch = features.size(0), size = features.size(2) * features.size(3);
  Outputs out{features,
              new_empty(features, {}, wide),
              new_empty(features, {batch, 1, features.size(2), features.size(3)}),
              new_empty(features, {2, batch, size, size}),
              new_empty(features, {2, batch, size}, wide),
              new_empty(features, {batch, size, size}, wide),
              new_empty(features, {batch, size}, wide),
              new_empty(features, {2, batch, size}, wide)};
  fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    Block<T> block(features, positive, negative, temperature, eps, out);
    block.run();
    out.aligned = block.aligned();
    out.loss.mutable_data_ptr<A>()[0] = fastreid_vi::position_losses(
        block.near.data(), block.far.data(), block.comask.data(), batch, size, margin,
        weighting == "batch", out.slopes.mutable_data_ptr<A>());
    fastreid_vi::convert(block.comask.data(), batch * size, out.comask.mutable_data_ptr<T>());
  });
  return {out.aligned, out.loss, out.comask, out.probability,
          out.lse,     out.gram, out.mask,   out.slopes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("dense_alignment", TORCH_BOX(&dense_alignment));
}
