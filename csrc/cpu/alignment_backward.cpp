// LbA's block, backward. With c = grad_loss times the slope of a distance over the distance, the
// gradient at a position is u = c (m (f - w) + eps), and warped rows receive
// dw = m (dR - u) from the positive pairing, -m u from the negative one.
//
// Positive: dP = dW K^T, dK += P^T dW, in memory of one sample. Negative, without [S, C]: dP from
// the inner products G (back from P and its log-sum-exp) and P M; f and w enter dF through
// Q = dG - diag(c m^2) P, once as dF_b += Q F_t and once as dF_t += Q^T F_b, and through
// dF_t += (P^T diag(c m^2) P) F_t. Where f and w nearly agree those terms cancel: such a sample's
// negative pairing goes the way of the positive one. The thread that owns a sample writes its
// gradient, in rising order of the samples that share it as their target.
#include <torch/csrc/stable/library.h>

#include "cpu/correspondence.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::Index;
using fastreid_vi::Lists;
using fastreid_vi::Matrix;
using fastreid_vi::Norms;
using fastreid_vi::product;
using fastreid_vi::Result;
using fastreid_vi::Samples;
using fastreid_vi::Scratch;
using fastreid_vi::square;
using torch::stable::Tensor;

// e = f - r, run by run
template <typename T, typename A>
FASTREID_VI_CLONES void subtract_runs(const T* f, int64_t f_stride, const T* r, int64_t r_stride,
                                      int64_t runs, int64_t width, A* e) {
  for (int64_t k = 0; k < runs; ++k) {
    const T* __restrict from = f + k * f_stride;
    const T* __restrict minus = r + k * r_stride;
    A* __restrict to = e + k * width;
    for (int64_t i = 0; i < width; ++i) to[i] = static_cast<A>(from[i]) - static_cast<A>(minus[i]);
  }
}

// From w in `e`: e = m (f - w)
template <typename T, typename A>
FASTREID_VI_CLONES void away_from(const T* f, int64_t stride, int64_t runs, int64_t width,
                                  bool per_run, const A* mask, A* e) {
  for (int64_t r = 0; r < runs; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      const A value = static_cast<A>(f[r * stride + i]);
      e[r * width + i] = mask[per_run ? r : i] * (value - e[r * width + i]);
    }
  }
}

// From e in `out`: out = share (dR + turn (e + eps)) + radial f + offset, all by position
template <typename A>
struct Terms {
  const A *share, *turn, *radial, *offset;
};

template <typename T, typename A>
FASTREID_VI_CLONES void combine(const T* dr, int64_t dr_stride, const T* f, int64_t f_stride,
                                int64_t runs, int64_t width, bool per_run, Terms<A> terms, A eps,
                                A* out) {
  for (int64_t r = 0; r < runs; ++r) {
    const T* __restrict g = dr + r * dr_stride;
    const T* __restrict x = f + r * f_stride;
    A* __restrict to = out + r * width;
    if (per_run) {
      const A a = terms.share[r], b = terms.turn[r], c = terms.radial[r], d = terms.offset[r];
      for (int64_t i = 0; i < width; ++i) {
        to[i] = a * static_cast<A>(g[i]) + b * (to[i] + eps) + c * static_cast<A>(x[i]) + d;
      }
    } else {
      for (int64_t i = 0; i < width; ++i) {
        to[i] = terms.share[i] * static_cast<A>(g[i]) + terms.turn[i] * (to[i] + eps) +
                terms.radial[i] * static_cast<A>(x[i]) + terms.offset[i];
      }
    }
  }
}

// A row of inner products G, back from P and its log-sum-exp; `length` is |q| / temperature.
template <typename A>
FASTREID_VI_CLONES void gram_row(const A* prob, const A* norm, A lse, A length, int64_t size,
                                 A* gram) {
  for (int64_t j = 0; j < size; ++j) {
    const A value = prob[j] > A(0) ? prob[j] : A(1);
    gram[j] = (fastreid_vi::logarithm(value) + lse) * length * norm[j];
  }
}

// What a backward pass is given, dense.
struct Saved {
  Tensor probability, lse, gram, mask, slopes;
};

template <typename T>
class BlockGradient {
 public:
  using A = accumulate_t<T>;

  BlockGradient(const Tensor& grad_aligned, const Tensor& grad_loss, const Tensor& features,
                const Tensor& positive, const Tensor& negative, const Tensor& aligned,
                const Saved& saved, double temperature, double eps)
      : x_(features),
        dr_(grad_aligned, x_.channels_last()),
        r_(aligned, x_.channels_last()),
        norms_(x_),
        batch_(x_.count()),
        size_(x_.positions()),
        all_(size_ * size_),
        picks_{Index(positive, batch_), Index(negative, batch_)},
        lists_{Lists(picks_[0], batch_, batch_), Lists(picks_[1], batch_, batch_)},
        saved_(saved),
        temperature_(static_cast<A>(temperature)),
        eps_(static_cast<A>(eps)),
        grad_(grad_loss.const_data_ptr<A>()[0]),
        inner_(torch::stable::new_empty(features, {2, batch_, size_, size_},
                                        fastreid_vi::accumulate_type(features.scalar_type()))),
        radial_q_(static_cast<size_t>(2 * batch_ * size_)),
        radial_k_(radial_q_.size()),
        offset_k_(static_cast<size_t>(batch_ * size_)),
        direct_(static_cast<size_t>(batch_)),
        dx_(features) {}

  Tensor run() {
    const int64_t cost = all_ * x_.channels();
    fastreid_vi::parallel(batch_, cost, [&](int64_t from, int64_t to) {
      Memory memory(*this);
      for (int64_t b = from; b < to; ++b) {
        find_directly(0, b, memory);
        find_negative(b, memory);
      }
    });
    fastreid_vi::parallel(batch_, 6 * cost, [&](int64_t from, int64_t to) {
      Memory memory(*this);
      for (int64_t t = from; t < to; ++t) gather(t, memory);
    });
    return dx_.tensor;
  }

 private:
  // What one thread works in: one sample, two matrices [S, S], vectors over positions.
  struct Memory {
    explicit Memory(const BlockGradient& g)
        : sample(g.dx_.size),
          rows(g.x_.scratch()),
          grads(g.x_.scratch()),
          work(g.dx_.scratch()),
          p(g.all_),
          weighted(g.all_),
          sum(g.all_),
          vectors(5 * g.size_),
          zeros(static_cast<size_t>(g.size_)),
          inverse(2 * g.size_) {}
    Scratch<A> sample, rows, grads, work, p, weighted, sum, vectors;
    std::vector<A> zeros;
    Scratch<double> inverse;
  };

  int64_t at(int64_t side, int64_t b) const { return side * batch_ + b; }
  const T* p(int64_t side, int64_t b) const {
    return saved_.probability.template const_data_ptr<T>() + at(side, b) * all_;
  }
  const A* lse(int64_t side, int64_t b) const {
    return saved_.lse.template const_data_ptr<A>() + at(side, b) * size_;
  }
  const A* mask(int64_t b) const { return saved_.mask.template const_data_ptr<A>() + b * size_; }
  Matrix<A> inner(int64_t side, int64_t b) const {
    return square(inner_.template mutable_data_ptr<A>() + at(side, b) * all_, size_);
  }
  A slope(int64_t side, int64_t b, int64_t s) const {
    return grad_ * saved_.slopes.template const_data_ptr<A>()[at(side, b) * size_ + s];
  }

  // P as a matrix of the accumulation type.
  Matrix<const A> wide_p(int64_t side, int64_t b, A* scratch) const {
    if constexpr (std::is_same_v<T, A>) {
      return {p(side, b), size_, size_, size_, 1};
    } else {
      fastreid_vi::convert(p(side, b), all_, scratch);
      return {scratch, size_, size_, size_, 1};
    }
  }

  void through_match(int64_t side, int64_t b, Memory& memory) {
    double *iq = memory.inverse.get(), *ik = iq + size_;
    norms_.inverse(b, true, iq);
    norms_.inverse(picks_[side][b], true, ik);
    const auto place = static_cast<size_t>(at(side, b) * size_);
    fastreid_vi::match_gradient(inner(side, b).data, p(side, b), lse(side, b), iq, ik, size_,
                                temperature_, radial_q_.data() + place, radial_k_.data() + place);
  }

  // e = m (f - w): what the aligned map took away. Computed again for the negative pairing, and
  // where the aligned map was rounded to a narrower type.
  void find_away(int64_t side, int64_t b, Memory& memory, A* e) const {
    if (std::is_same_v<T, A> && side == 0) {
      subtract_runs(x_.data(b), x_.stride(), r_.data(b), r_.stride(), x_.runs(), x_.width(), e);
    } else {
      product(wide_p(side, b, memory.p.get()), x_.matrix(picks_[side][b], memory.grads.get()),
              x_.laid_out(e, x_.width()));
      away_from(x_.data(b), x_.stride(), x_.runs(), x_.width(), x_.channels_last(), mask(b), e);
    }
  }

  // dW of a pairing, in the sample's memory.
  Matrix<const A> warped_rows(int64_t side, int64_t b, Memory& memory) const {
    A *turn = memory.vectors.get(), *e = memory.sample.get();
    for (int64_t s = 0; s < size_; ++s) turn[s] = -mask(b)[s] * slope(side, b, s);
    find_away(side, b, memory, e);
    const A* none = memory.zeros.data();
    combine(dr_.data(b), dr_.stride(), x_.data(b), x_.stride(), x_.runs(), x_.width(),
            x_.channels_last(), Terms<A>{side == 0 ? mask(b) : none, turn, none, none}, eps_, e);
    return x_.laid_out(static_cast<const A*>(e), x_.width());
  }

  void find_directly(int64_t side, int64_t b, Memory& memory) {
    const Matrix<const A> dw = warped_rows(side, b, memory);
    product(dw, x_.matrix(picks_[side][b], memory.rows.get()).transposed(), inner(side, b));
    through_match(side, b, memory);
  }

  void find_negative(int64_t b, Memory& memory) {
    const int64_t t = picks_[1][b];
    const Matrix<A> d = inner(1, b);
    const Matrix<const A> prob = wide_p(1, b, memory.p.get());
    const A* own = saved_.gram.template const_data_ptr<A>() + t * all_;
    product(prob, square(own, size_), d);
    A *gram = memory.weighted.get(), *norm = memory.vectors.get();
    for (int64_t j = 0; j < size_; ++j) norm[j] = std::sqrt(norms_.squares(t)[j]);
    for (int64_t i = 0; i < size_; ++i) {
      gram_row(prob.data + i * size_, norm, lse(1, b)[i],
               std::sqrt(norms_.squares(b)[i]) / temperature_, size_, gram + i * size_);
    }
    const bool direct = cancels(b, prob.data, gram, d.data);
    direct_[static_cast<size_t>(b)] = direct;
    if (direct) return find_directly(1, b, memory);
    A* offset = offset_k_.data() + b * size_;
    for (int64_t i = 0; i < size_; ++i) {
      const A m = mask(b)[i], turn = slope(1, b, i) * m;
      for (int64_t j = 0; j < size_; ++j) {
        const int64_t ij = i * size_ + j;
        d.data[ij] = -turn * (m * (gram[ij] - d.data[ij]) + eps_ * norms_.sums(t)[j]);
        offset[j] -= turn * eps_ * prob.data[ij];
      }
    }
    through_match(1, b, memory);
    for (int64_t i = 0; i < size_; ++i) {
      const A turn = slope(1, b, i) * mask(b)[i] * mask(b)[i];
      for (int64_t j = 0; j < size_; ++j) d.data[i * size_ + j] -= turn * prob.data[i * size_ + j];
    }
  }

  // Whether |f|^2 - 2 f.w + |w|^2 cancels at a position that matters.
  bool cancels(int64_t b, const A* prob, const A* gram, const A* warped) const {
    for (int64_t i = 0; i < size_; ++i) {
      if (slope(1, b, i) == A(0) || mask(b)[i] == A(0)) continue;
      const auto whole = static_cast<double>(norms_.squares(b)[i]);
      double apart = whole;
      for (int64_t j = i * size_; j < (i + 1) * size_; ++j) {
        apart += static_cast<double>(prob[j]) *
                 (static_cast<double>(warped[j]) - 2 * static_cast<double>(gram[j]));
      }
      if (apart < fastreid_vi::kCancelled * whole) return true;
    }
    return false;
  }

  // The gradient of sample t: its own rows as queries, then as keys of the samples that met it.
  void gather(int64_t t, Memory& memory) {
    A* out = dx_.work(t, memory.work.get());
    const Matrix<A> rows = x_.laid_out(out, x_.width());
    A *share = memory.vectors.get(), *turn = share + size_, *radial = turn + size_,
      *offset = radial + size_;
    for (int64_t s = 0; s < size_; ++s) {
      const A m = mask(t)[s], far = direct(t) ? A(0) : slope(1, t, s) * m;
      share[s] = 1 - m;
      turn[s] = m * slope(0, t, s);
      radial[s] = far * m - radial_q_[static_cast<size_t>(at(0, t) * size_ + s)] -
                  radial_q_[static_cast<size_t>(at(1, t) * size_ + s)];
      offset[s] = far * eps_;
      for (int64_t side = 0; side < 2; ++side) {
        for (const int64_t b : lists_[side][t]) {
          radial[s] -= radial_k_[static_cast<size_t>(at(side, b) * size_ + s)];
        }
      }
      for (const int64_t b : lists_[1][t]) {
        offset[s] += offset_k_[static_cast<size_t>(b * size_ + s)];
      }
    }
    find_away(0, t, memory, out);
    combine(dr_.data(t), dr_.stride(), x_.data(t), x_.stride(), x_.runs(), x_.width(),
            x_.channels_last(), Terms<A>{share, turn, radial, offset}, eps_, out);
    for (int64_t side = 0; side < 2; ++side) {
      product(inner(side, t), x_.matrix(picks_[side][t], memory.rows.get()), rows, true);
      for (const int64_t b : lists_[side][t]) {
        product(inner(side, b).transposed(), x_.matrix(b, memory.rows.get()), rows, true);
      }
    }
    if (direct(t)) subtract_rows(warped_rows(1, t, memory), rows);
    for (int64_t side = 0; side < 2; ++side) {
      for (const int64_t b : lists_[side][t]) {
        if (side == 1 && !direct(b)) continue;
        const Matrix<const A> dw = warped_rows(side, b, memory);
        product(wide_p(side, b, memory.p.get()).transposed(), dw, rows, true);
      }
    }
    add_warped(t, memory, rows);
    dx_.finish(t, out);
  }

  bool direct(int64_t b) const { return direct_[static_cast<size_t>(b)] != 0; }

  // dW = -m u is what a query's own gradient m u is the negative of.
  static void subtract_rows(const Matrix<const A>& dw, const Matrix<A>& out) {
    for (int64_t i = 0; i < out.rows * out.columns; ++i) out.data[i] -= dw.data[i];
  }

  // rows += sum over the samples that met t as a negative of (P^T diag(c m^2) P) F_t
  void add_warped(int64_t t, Memory& memory, const Matrix<A>& rows) const {
    const Matrix<A> sum = square(memory.sum.get(), size_);
    bool first = true;
    for (const int64_t b : lists_[1][t]) {
      if (direct(b)) continue;
      const Matrix<const A> prob = wide_p(1, b, memory.p.get());
      A* weighted = memory.weighted.get();
      for (int64_t i = 0; i < size_; ++i) {
        const A turn = slope(1, b, i) * mask(b)[i] * mask(b)[i];
        for (int64_t j = 0; j < size_; ++j) {
          weighted[i * size_ + j] = turn * prob.data[i * size_ + j];
        }
      }
      product(square(weighted, size_).transposed(), prob, sum, !first);
      first = false;
    }
    if (!first) product(sum, x_.matrix(t, memory.rows.get()), rows, true);
  }

  Samples<T> x_, dr_, r_;
  Norms<A> norms_;
  int64_t batch_, size_, all_;
  Index picks_[2];
  Lists lists_[2];
  const Saved& saved_;
  A temperature_, eps_, grad_;
  Tensor inner_;  // dG of the positive, Q of the negative pairing, [2, B, S, S]
  std::vector<A> radial_q_, radial_k_, offset_k_;
  std::vector<char> direct_;  // samples whose negative pairing goes the way of the positive one
  Result<T> dx_;
};

Tensor dense_alignment_backward(const Tensor& grad_aligned, const Tensor& grad_loss,
                                const Tensor& features, const Tensor& positive,
                                const Tensor& negative, const Tensor& aligned,
                                const Tensor& probability, const Tensor& lse, const Tensor& gram,
                                const Tensor& mask, const Tensor& slopes, double temperature,
                                double eps) {
  using torch::stable::contiguous;
  const Saved saved{contiguous(probability), contiguous(lse), contiguous(gram), contiguous(mask),
                    contiguous(slopes)};
  return fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    return BlockGradient<T>(grad_aligned, grad_loss, features, positive, negative, aligned, saved,
                            temperature, eps)
        .run();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("dense_alignment_backward", TORCH_BOX(&dense_alignment_backward));
}
