// Masks, matching probabilities, warps, and alignment within a batch.
//
// Backward, for P = softmax(t cos): dP = dW K^T, then dG of the inner products G = Q K^T by
// `match_gradient`, then dQ = dG K and dK = dG^T Q + P^T dW. The samples that share a target are
// added up by the thread that owns it, in rising order.
#include "cpu/correspondence.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

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

Tensor new_values(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, fastreid_vi::accumulate_type(like.scalar_type()));
}

Tensor new_mask(const Tensor& features) {
  return torch::stable::new_empty(features,
                                  {features.size(0), 1, features.size(2), features.size(3)});
}

Tensor feature_mask(const Tensor& features) {
  Tensor out = new_mask(features);
  fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Samples<T> x(features);
    const Norms<A> norms(x);
    const Scratch<A> mask(norms.positions);
    for (int64_t b = 0; b < x.count(); ++b) {
      fastreid_vi::mask_of(norms, b, mask.get());
      fastreid_vi::convert(mask.get(), norms.positions,
                           out.template mutable_data_ptr<T>() + b * norms.positions);
    }
  });
  return out;
}

// What a forward pass writes; the map and the masks may be missing.
struct Matched {
  Tensor map, comask, probability, lse;
};

// One forward pass for all: P, and where `warps` the warped map, blended where there is a blend.
template <typename T>
void match_all(const Tensor& source, const Tensor& target, const Tensor& index,
               const Tensor* source_mask, const Tensor* target_mask, double temperature,
               bool blends, Matched& out, const Result<T>* map) {
  using A = accumulate_t<T>;
  const Samples<T> q(source), k(target);
  const Norms<A> q_norms(q), k_norms(k);
  const int64_t size = q.positions(), all = size * size;
  const Index picks(index, k.count());
  const A* masks = source_mask ? source_mask->const_data_ptr<A>() : nullptr;
  const A* target_masks = target_mask ? target_mask->const_data_ptr<A>() : nullptr;
  T* p_to = out.probability.mutable_data_ptr<T>();
  A* lse_to = out.lse.mutable_data_ptr<A>();
  T* comask_to = masks ? out.comask.mutable_data_ptr<T>() : nullptr;
  const int64_t cost = all * q.channels();
  fastreid_vi::parallel(q.count(), cost, [&](int64_t from, int64_t to) {
    const Scratch<A> gram(all), vectors(2 * size);
    const Scratch<double> inverse(2 * size);
    const Scratch<A> queries(q.scratch()), keys(k.scratch()), work(map ? map->scratch() : 0);
    A *comask = vectors.get(), *kept = comask + size;
    double *iq = inverse.get(), *ik = iq + size;
    for (int64_t b = from; b < to; ++b) {
      const int64_t t = picks[b];
      const Matrix<A> p = square(gram.get(), size);
      const Matrix<const A> key = k.matrix(t, keys.get());
      product(q.matrix(b, queries.get()), key.transposed(), p);
      q_norms.inverse(b, false, iq);
      k_norms.inverse(t, false, ik);
      fastreid_vi::match_rows(p.data, iq, ik, size, temperature, p.data, p_to + b * all,
                              lse_to + b * size);
      if (masks) {
        fastreid_vi::comask_of(p.data, masks + b * size, target_masks + t * size, size, comask);
        fastreid_vi::convert(comask, size, comask_to + b * size);
      }
      if (!map) continue;
      A* warped = map->work(b, work.get());
      if (blends) {  // m P, so that the product is m w already
        for (int64_t i = 0; i < size; ++i) {
          const A m = masks[b * size + i];
          for (int64_t j = 0; j < size; ++j) p.data[i * size + j] *= m;
          kept[i] = 1 - m;
        }
      }
      product(p, key, q.laid_out(warped, q.width()));
      if (blends) {
        fastreid_vi::add_scaled(q.data(b), q.runs(), q.width(), q.stride(), q.channels_last(), kept,
                                warped);
      }
      map->finish(b, warped);
    }
  });
}

Matched new_matched(const Tensor& source) {
  const int64_t batch = source.size(0), size = source.size(2) * source.size(3);
  const Tensor none = torch::stable::new_empty(source, {0});
  return {none, none, torch::stable::new_empty(source, {batch, size, size}),
          new_values(source, {batch, size})};
}

std::tuple<Tensor, Tensor> correspondence_probability(const Tensor& source, const Tensor& target,
                                                      const Tensor& index, double temperature) {
  Matched out = new_matched(source);
  fastreid_vi::for_floating(source.scalar_type(), [&]<typename T>() {
    match_all<T>(source, target, index, nullptr, nullptr, temperature, false, out, nullptr);
  });
  return {out.probability, out.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> correspondence_warp(
    const Tensor& source, const Tensor& target, const Tensor& index,
    const std::optional<Tensor>& source_mask, const std::optional<Tensor>& target_mask,
    double temperature) {
  Matched out = new_matched(source);
  const bool masked = source_mask && target_mask;
  if (masked) out.comask = new_mask(source);
  const Tensor sm = masked ? torch::stable::contiguous(*source_mask) : source;
  const Tensor tm = masked ? torch::stable::contiguous(*target_mask) : source;
  fastreid_vi::for_floating(source.scalar_type(), [&]<typename T>() {
    const Result<T> map(source);
    out.map = map.tensor;
    match_all<T>(source, target, index, masked ? &sm : nullptr, masked ? &tm : nullptr, temperature,
                 false, out, &map);
  });
  return {out.map, out.comask, out.probability, out.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> align_features(const Tensor& features,
                                                          const Tensor& index, const Tensor& mask,
                                                          double temperature) {
  Matched out = new_matched(features);
  out.comask = new_mask(features);
  const Tensor m = torch::stable::contiguous(mask);
  fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    const Result<T> map(features);
    out.map = map.tensor;
    match_all<T>(features, features, index, &m, &m, temperature, true, out, &map);
  });
  return {out.map, out.comask, out.probability, out.lse};
}

// The gradient through the pairings of one call. `mask`: rows of P were multiplied by it.
template <typename T>
class PairingGradient {
 public:
  using A = accumulate_t<T>;

  PairingGradient(const Tensor& source, const Tensor& target, const Tensor& index,
                  const Tensor& probability, const Tensor& lse, double temperature,
                  const Tensor* mask)
      : q_(source),
        k_(target),
        q_norms_(q_),
        k_norms_(k_),
        size_(q_.positions()),
        all_(size_ * size_),
        picks_(index, k_.count()),
        lists_(picks_, q_.count(), k_.count()),
        p_(torch::stable::contiguous(probability)),
        lse_(torch::stable::contiguous(lse)),
        temperature_(static_cast<A>(temperature)),
        mask_(mask),
        inner_(new_values(source, {q_.count(), size_, size_})),
        radial_q_(static_cast<size_t>(q_.count() * size_)),
        radial_k_(radial_q_.size()) {}

  const Samples<T>& source() const { return q_; }
  const Samples<T>& target() const { return k_; }
  int64_t cost() const { return all_ * q_.channels(); }

  // Fills dG: from the gradient of the warped map, or of P itself.
  void find_inner(const Samples<T>* grad_map, const Tensor* grad_p) {
    fastreid_vi::parallel(q_.count(), cost(), [&](int64_t from, int64_t to) {
      const Scratch<A> keys(k_.scratch()), grads(grad_map ? grad_map->scratch() : 0);
      const Scratch<double> inverse(2 * size_);
      double *iq = inverse.get(), *ik = iq + size_;
      for (int64_t b = from; b < to; ++b) {
        const int64_t t = picks_[b];
        const Matrix<A> d = inner(b);
        if (grad_map) {
          product(grad_map->matrix(b, grads.get()), k_.matrix(t, keys.get()).transposed(), d);
          for (int64_t i = 0; mask_ && i < size_; ++i) {
            const A m = mask(b)[i];
            for (int64_t j = 0; j < size_; ++j) d.data[i * size_ + j] *= m;
          }
        } else {
          const T* g = grad_p->const_data_ptr<T>() + b * all_;
          fastreid_vi::convert(g, all_, d.data);
        }
        q_norms_.inverse(b, true, iq);
        k_norms_.inverse(t, true, ik);
        const auto at = static_cast<size_t>(b * size_);
        fastreid_vi::match_gradient(d.data, p(b), lse_.const_data_ptr<A>() + b * size_, iq, ik,
                                    size_, temperature_, radial_q_.data() + at,
                                    radial_k_.data() + at);
      }
    });
  }

  // out = dG K; loss[s]: what sample b loses along its own positions.
  void as_query(int64_t b, A* keys, const Matrix<A>& out, A* loss) const {
    product(inner(b), k_.matrix(picks_[b], keys), out);
    for (int64_t s = 0; s < size_; ++s) {
      loss[s] = -radial_q_[static_cast<size_t>(b * size_ + s)];
    }
  }

  // out += sums over the samples whose target is t of dG^T Q + P^T dW; loss as above.
  void as_key(int64_t t, const Samples<T>* grad_map, A* queries, A* weights, const Matrix<A>& out,
              A* loss) const {
    for (const int64_t b : lists_[t]) {
      product(inner(b).transposed(), q_.matrix(b, queries), out, true);
      for (int64_t s = 0; s < size_; ++s) {
        loss[s] -= radial_k_[static_cast<size_t>(b * size_ + s)];
      }
      if (!grad_map) continue;
      for (int64_t i = 0; i < size_; ++i) {
        const A m = mask_ ? mask(b)[i] : A(1);
        for (int64_t j = 0; j < size_; ++j) {
          weights[i * size_ + j] = m * static_cast<A>(p(b)[i * size_ + j]);
        }
      }
      product(square(weights, size_).transposed(), grad_map->matrix(b, queries), out, true);
    }
  }

  const A* mask(int64_t b) const { return mask_->template const_data_ptr<A>() + b * size_; }

 private:
  Matrix<A> inner(int64_t b) const {
    return square(inner_.template mutable_data_ptr<A>() + b * all_, size_);
  }
  const T* p(int64_t b) const { return p_.template const_data_ptr<T>() + b * all_; }

  Samples<T> q_, k_;
  Norms<A> q_norms_, k_norms_;
  int64_t size_, all_;
  Index picks_;
  Lists lists_;
  Tensor p_, lse_;
  A temperature_;
  const Tensor* mask_;
  Tensor inner_;  // dP, then dG, [B, S, S]
  std::vector<A> radial_q_, radial_k_;
};

template <typename T, typename A>
void subtract_radial(const Samples<T>& x, int64_t b, const A* loss, A* out) {
  fastreid_vi::add_scaled(x.data(b), x.runs(), x.width(), x.stride(), x.channels_last(), loss, out);
}

// Gradients of both maps, from the gradient of the warped map or of P.
std::tuple<Tensor, Tensor> both_gradients(const Tensor* grad_map, const Tensor* grad_p,
                                          const Tensor& source, const Tensor& target,
                                          const Tensor& index, const Tensor& probability,
                                          const Tensor& lse, double temperature) {
  Tensor dsource, dtarget;
  fastreid_vi::for_floating(source.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    PairingGradient<T> pairing(source, target, index, probability, lse, temperature, nullptr);
    std::optional<Samples<T>> dw;
    if (grad_map) dw.emplace(*grad_map, fastreid_vi::is_channels_last(source));
    const Samples<T>* grads = dw ? &*dw : nullptr;
    pairing.find_inner(grads, grad_p);
    const Samples<T>&q = pairing.source(), &k = pairing.target();
    const Result<T> dq(source), dk(target);
    const int64_t size = q.positions();
    fastreid_vi::parallel(q.count(), pairing.cost(), [&](int64_t from, int64_t to) {
      const Scratch<A> keys(k.scratch()), work(dq.scratch()), loss(size);
      for (int64_t b = from; b < to; ++b) {
        A* out = dq.work(b, work.get());
        pairing.as_query(b, keys.get(), q.laid_out(out, q.width()), loss.get());
        subtract_radial(q, b, loss.get(), out);
        dq.finish(b, out);
      }
    });
    fastreid_vi::parallel(k.count(), pairing.cost(), [&](int64_t from, int64_t to) {
      const Scratch<A> queries(q.scratch()), work(dk.scratch()), weights(size * size), loss(size);
      for (int64_t t = from; t < to; ++t) {
        A* out = dk.work(t, work.get());
        std::fill(out, out + dk.size, A(0));
        std::fill(loss.get(), loss.get() + size, A(0));
        pairing.as_key(t, grads, queries.get(), weights.get(), k.laid_out(out, k.width()),
                       loss.get());
        subtract_radial(k, t, loss.get(), out);
        dk.finish(t, out);
      }
    });
    dsource = dq.tensor;
    dtarget = dk.tensor;
  });
  return {dsource, dtarget};
}

std::tuple<Tensor, Tensor> correspondence_probability_backward(
    const Tensor& grad, const Tensor& source, const Tensor& target, const Tensor& index,
    const Tensor& probability, const Tensor& lse, double temperature) {
  const Tensor g = torch::stable::contiguous(grad);
  return both_gradients(nullptr, &g, source, target, index, probability, lse, temperature);
}

std::tuple<Tensor, Tensor> correspondence_warp_backward(const Tensor& grad, const Tensor& source,
                                                        const Tensor& target, const Tensor& index,
                                                        const Tensor& probability,
                                                        const Tensor& lse, double temperature) {
  return both_gradients(&grad, nullptr, source, target, index, probability, lse, temperature);
}

Tensor align_features_backward(const Tensor& grad, const Tensor& features, const Tensor& index,
                               const Tensor& mask, const Tensor& probability, const Tensor& lse,
                               double temperature) {
  const Tensor m = torch::stable::contiguous(mask);
  return fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    PairingGradient<T> pairing(features, features, index, probability, lse, temperature, &m);
    const Samples<T>& x = pairing.source();
    const Samples<T> dr(grad, x.channels_last());
    pairing.find_inner(&dr, nullptr);
    const Result<T> dx(features);
    const int64_t size = x.positions();
    fastreid_vi::parallel(x.count(), 2 * pairing.cost(), [&](int64_t from, int64_t to) {
      const Scratch<A> scratch(x.scratch()), work(dx.scratch()), weights(size * size);
      const Scratch<A> loss(size), kept(size);
      for (int64_t b = from; b < to; ++b) {
        A* out = dx.work(b, work.get());
        const Matrix<A> rows = x.laid_out(out, x.width());
        pairing.as_query(b, scratch.get(), rows, loss.get());
        pairing.as_key(b, &dr, scratch.get(), weights.get(), rows, loss.get());
        subtract_radial(x, b, loss.get(), out);
        for (int64_t s = 0; s < size; ++s) kept.get()[s] = 1 - pairing.mask(b)[s];
        subtract_radial(dr, b, kept.get(), out);
        dx.finish(b, out);
      }
    });
    return dx.tensor;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("feature_mask", TORCH_BOX(&feature_mask));
  m.impl("correspondence_probability", TORCH_BOX(&correspondence_probability));
  m.impl("correspondence_probability_backward", TORCH_BOX(&correspondence_probability_backward));
  m.impl("correspondence_warp", TORCH_BOX(&correspondence_warp));
  m.impl("correspondence_warp_backward", TORCH_BOX(&correspondence_warp_backward));
  m.impl("align_features", TORCH_BOX(&align_features));
  m.impl("align_features_backward", TORCH_BOX(&align_features_backward));
}
