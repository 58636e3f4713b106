#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "bits.h"
#include "rerank.h"
#include "turns.h"

namespace fastreid_vi::retrieval {
namespace {

constexpr std::int64_t kTurn = 64;
constexpr std::int64_t kLanes = 64;

// Squared differences lose nothing to cancellation, unlike norms and products.
FASTREID_VI_CLONES float squared_distance(const float* a, const float* b, std::int64_t size) {
  float lanes[kLanes] = {};
  const std::int64_t whole = size / kLanes * kLanes;
  for (std::int64_t k = 0; k < whole; k += kLanes) {
    for (std::int64_t l = 0; l < kLanes; ++l)
      lanes[l] += (a[k + l] - b[k + l]) * (a[k + l] - b[k + l]);
  }
  for (std::int64_t k = whole; k < size; ++k) lanes[k - whole] += (a[k] - b[k]) * (a[k] - b[k]);
  return static_cast<float>(std::accumulate(lanes, lanes + kLanes, 0.0));
}

// The entry of a list that holds an item, found by its index.
struct Place {
  std::int32_t item, rank;
};

// All lists ordered by index instead of distance.
class Places {
 public:
  Places(const Lists& lists, int threads) : length_(lists.length), rows_(lists.rows) {
    places_.resize(static_cast<std::size_t>(lists.rows * lists.length));
    take_turns(rows_, kTurn, workers_for(rows_, kTurn, threads),
               [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) sort_row(lists, i);
               });
  }

  // Position of `item` in the list of `row`; the length of the lists if it is not there.
  std::int64_t rank(std::int64_t row, std::int32_t item) const {
    const Place* begin = places_.data() + row * length_;
    const Place* at = std::lower_bound(
        begin, begin + length_, item,
        [](const Place& place, std::int32_t wanted) { return place.item < wanted; });
    return at != begin + length_ && at->item == item ? at->rank : length_;
  }

 private:
  void sort_row(const Lists& lists, std::int64_t i) {
    Place* row = places_.data() + i * length_;
    const auto list = lists.row(i);
    for (std::int64_t r = 0; r < length_; ++r) row[r] = {list[r], static_cast<std::int32_t>(r)};
    std::sort(row, row + length_, [](const Place& a, const Place& b) { return a.item < b.item; });
  }

  std::int64_t length_, rows_;
  std::vector<Place> places_;
};

class Finder {
 public:
  Finder(const Lists& lists, const NeighborRule& rule, int threads)
      : lists_(lists), rule_(rule), places_(lists, threads) {
    back_.resize(static_cast<std::size_t>(lists.rows * lists.length));
    take_turns(lists.rows, kTurn, workers_for(lists.rows, kTurn, threads),
               [&](std::int64_t, std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   const auto list = lists.row(i);
                   for (std::int64_t r = 0; r < lists.length; ++r) {
                     back_[i * lists.length + r] = static_cast<std::int32_t>(
                         places_.rank(list[r], static_cast<std::int32_t>(i)));
                   }
                 }
               });
  }

  // R*(i) into `whole`; `initial` is empty before and after.
  void collect(std::int64_t i, ColumnSet& initial, ColumnSet& whole) const {
    reciprocal(i, rule_.k1, [&](std::int32_t j) { whole.insert(j); });
    if (!rule_.expand) return;
    reciprocal(i, rule_.k1, [&](std::int32_t j) { initial.insert(j); });
    reciprocal(i, rule_.k1, [&](std::int32_t c) {
      std::int64_t members = 0, common = 0;
      reciprocal(c, rule_.half, [&](std::int32_t j) {
        ++members;
        common += initial.contains(j);
      });
      // The initial set decides, not the growing one.
      if (3 * common > 2 * members) {
        reciprocal(c, rule_.half, [&](std::int32_t j) { whole.insert(j); });
      }
    });
    initial.drain([](std::int32_t) {});
  }

  // Distance of two items by either's list; NaN if none holds it.
  float listed(std::int64_t i, std::int32_t j) const {
    const std::int64_t rank = places_.rank(i, j);
    if (rank < lists_.length) return lists_.distances[i * lists_.length + rank];
    const std::int64_t back = places_.rank(j, static_cast<std::int32_t>(i));
    if (back < lists_.length) return lists_.distances[j * lists_.length + back];
    return std::nanf("");
  }

 private:
  // R(i, k) by rising rank.
  template <typename Use>
  void reciprocal(std::int64_t i, std::int64_t k, const Use& use) const {
    const auto list = lists_.row(i);
    const std::int32_t* back = back_.data() + i * lists_.length;
    const std::int64_t length = std::min(k + 1, lists_.length);
    for (std::int64_t r = 0; r < length; ++r) {
      if (back[r] < length) use(list[r]);
    }
  }

  const Lists& lists_;
  NeighborRule rule_;
  Places places_;
  std::vector<std::int32_t> back_;  // [rows, length] rank of i in the list of its r-th entry
};

}  // namespace

NeighborSets find_neighbors(const Lists& lists, const NeighborRule& rule,
                            std::span<const float* const> features, std::int64_t size,
                            int threads) {
  const std::int64_t rows = lists.rows;
  for (std::int64_t k = 0; k < rows * lists.length; ++k) {
    if (lists.items[k] < 0 || lists.items[k] >= rows) {
      throw std::invalid_argument("lists: expected items that can be neighbours");
    }
  }
  const Finder finder(lists, rule, threads);
  NeighborSets sets;
  sets.offsets.assign(rows + 1, 0);
  const std::int64_t workers = workers_for(rows, kTurn, threads);
  std::vector<ColumnSet> initial(workers, ColumnSet(rows)), whole(workers, ColumnSet(rows));
  take_turns(rows, kTurn, workers, [&](std::int64_t w, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      finder.collect(i, initial[w], whole[w]);
      whole[w].drain([&](std::int32_t) { ++sets.offsets[i + 1]; });
    }
  });
  std::partial_sum(sets.offsets.begin(), sets.offsets.end(), sets.offsets.begin());
  sets.columns.resize(sets.offsets.back());
  sets.distances.resize(sets.offsets.back());
  take_turns(rows, kTurn, workers, [&](std::int64_t w, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      std::int64_t at = sets.offsets[i];
      finder.collect(i, initial[w], whole[w]);
      whole[w].drain([&](std::int32_t j) {
        const float known = finder.listed(i, j);
        sets.columns[at] = j;
        sets.distances[at++] =
            std::isnan(known) ? squared_distance(features[i], features[j], size) : known;
      });
    }
  });
  return sets;
}

void encode(std::span<const std::int64_t> offsets, std::span<const float> distances,
            std::span<const float> maxima, std::span<const float> rounding, int threads,
            std::span<float> values) {
  const std::int64_t rows = std::ssize(offsets) - 1;
  const auto encode_row = [&](std::int64_t i) {
    const bool some = maxima[i] > rounding[i];
    double sum = 0;
    for (std::int64_t k = offsets[i]; k < offsets[i + 1]; ++k) {
      values[k] = some ? std::exp(-std::max(distances[k], 0.0F) / maxima[i]) : 1.0F;
      sum += values[k];
    }
    for (std::int64_t k = offsets[i]; k < offsets[i + 1]; ++k) {
      values[k] = static_cast<float>(values[k] / sum);
    }
  };
  take_turns(rows, kTurn, workers_for(rows, kTurn, threads),
             [&](std::int64_t, std::int64_t begin, std::int64_t end) {
               for (std::int64_t i = begin; i < end; ++i) encode_row(i);
             });
}

}  // namespace fastreid_vi::retrieval
