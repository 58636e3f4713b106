#include "streaming.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "turns.h"

namespace fastreid_vi::retrieval {
namespace {

constexpr std::int64_t kRowsPerTurn = 4;

// Up to so many matches, a vectorised pass per match beats a binary search per image.
constexpr std::int64_t kFewMatches = 256;

// As wide as the values compared, so that a comparison's lanes add up without conversion.
template <typename T>
using Count = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

// What one thread writes on, for the longest gallery of a block.
template <typename T>
struct Scratch {
  Scratch(std::size_t longest, std::size_t most_matches)
      : kept(longest), found(longest + 1), crossed(most_matches + 1) {}

  std::vector<T> kept;              // distances; NaN for a match and for what the rule drops
  std::vector<std::int32_t> found;  // identities ahead of the first match
  std::vector<std::int64_t> crossed;
};

template <typename T>
struct Job {
  const Distances<T>& block;
  const Images& queries;
  const Images& pool;
  const Galleries& members;
  std::span<const std::int32_t> slots;
  CameraRule rule;
  const Matches<T>& matches;
  const Ahead& ahead;
};

// One row's matches in one gallery, and that gallery's images in the block.
template <typename T>
struct Segment {
  std::span<const std::int64_t> columns;
  std::span<const std::int32_t> slots;
  std::span<const T> distance;          // of the matches
  std::span<const std::int32_t> match;  // their slots
  std::span<std::int64_t> images;
};

template <typename T>
[[gnu::always_inline]] inline void gather(const Job<T>& job, std::int64_t row,
                                          const Segment<T>& segment, T* kept) {
  const auto& d = job.block;
  const T* distance = d.data + row * d.row_stride;
  const std::int32_t own = job.queries.ids[row];
  // A place that no image has where the rule looks at none. `same_id_and_camera` drops images of
  // the query's own identity only, and they are no business of this pass.
  const std::int32_t place = job.rule == CameraRule::kLocation ? job.queries.places[row] : -1;
  const std::int32_t *ids = job.pool.ids.data(), *places = job.pool.places.data();
  const std::int64_t* columns = segment.columns.data();
  const auto size = std::ssize(segment.columns);
  for (std::int64_t k = 0; k < size; ++k) {
    const std::int64_t c = columns[k];
    const bool out = (ids[c] == own) | (places[c] == place);
    kept[k] = out ? std::numeric_limits<T>::quiet_NaN() : distance[c * d.column_stride];
  }
}

// One vectorised pass per match.
template <typename T>
[[gnu::always_inline]] inline void count_each(const Segment<T>& segment, const T* kept) {
  const auto size = std::ssize(segment.columns);
  const std::int32_t* slots = segment.slots.data();
  for (std::size_t m = 0; m < segment.match.size(); ++m) {
    const T limit = segment.distance[m];
    const std::int32_t at = segment.match[m];
    Count<T> count = 0;
    for (std::int64_t k = 0; k < size; ++k) {
      count += (kept[k] < limit) | ((kept[k] == limit) & (slots[k] < at));
    }
    segment.images[m] += count;
  }
}

// One binary search per image, then a running sum.
template <typename T>
void count_many(const Segment<T>& segment, const T* kept, std::vector<std::int64_t>& crossed) {
  const auto matches = std::ssize(segment.match);
  std::fill_n(crossed.begin(), matches + 1, 0);
  for (std::int64_t k = 0; k < std::ssize(segment.columns); ++k) {
    if (kept[k] != kept[k]) continue;
    std::int64_t low = 0, high = matches;  // matches [0, low) are ahead of the image
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      const T limit = segment.distance[middle];
      const bool ahead =
          limit < kept[k] || (limit == kept[k] && segment.match[middle] < segment.slots[k]);
      (ahead ? low : high) = ahead ? middle + 1 : middle;
    }
    ++crossed[low];
  }
  std::int64_t sum = 0;
  for (std::int64_t m = 0; m < matches; ++m) segment.images[m] += sum += crossed[m];
}

// Identities with an image ahead of the first match that were not counted before.
template <typename T>
[[gnu::always_inline]] inline void count_identities(const Job<T>& job, const Segment<T>& segment,
                                                    Scratch<T>& scratch, std::int64_t& identities,
                                                    std::int32_t& last) {
  const T* kept = scratch.kept.data();
  const T limit = segment.distance[0];
  const std::int32_t at = segment.match[0];
  const std::int64_t* columns = segment.columns.data();
  const std::int32_t *slots = segment.slots.data(), *ids = job.pool.ids.data();
  std::int32_t* found = scratch.found.data();
  std::int64_t size = 0;
  // Written whether it counts or not: no branch to guess.
  for (std::int64_t k = 0; k < std::ssize(segment.columns); ++k) {
    found[size] = ids[columns[k]];
    size += (kept[k] < limit) | ((kept[k] == limit) & (slots[k] < at));
  }
  for (std::int64_t k = 0; k < size; ++k) {
    identities += found[k] != last;
    last = found[k];
  }
}

template <typename T>
[[gnu::always_inline]] inline bool has_nan(const Distances<T>& d, std::int64_t row) {
  const T* values = d.data + row * d.row_stride;
  Count<T> found = 0;
  if (d.column_stride == 1) {
    for (std::int64_t j = 0; j < d.columns; ++j) found |= values[j] != values[j];
  } else {
    for (std::int64_t j = 0; j < d.columns; ++j) {
      const T value = values[j * d.column_stride];
      found |= value != value;
    }
  }
  return found != 0;
}

template <typename T>
[[gnu::always_inline]] inline bool count_row(const Job<T>& job, std::int64_t row,
                                             Scratch<T>& scratch) {
  if (has_nan(job.block, row)) return false;
  const std::int64_t galleries = job.members.size();
  for (std::int64_t t = 0; t < galleries; ++t) {
    const std::int64_t at = row * galleries + t;
    const std::size_t first = job.matches.start[at], matches = job.matches.start[at + 1] - first;
    const std::size_t begin = job.members.offsets[t], size = job.members.offsets[t + 1] - begin;
    if (matches == 0 || size == 0) continue;
    const Segment<T> segment{
        job.members.columns.subspan(begin, size), job.slots.subspan(begin, size),
        job.matches.distance.subspan(first, matches), job.matches.slot.subspan(first, matches),
        job.ahead.images.subspan(first, matches)};
    gather(job, row, segment, scratch.kept.data());
    if (matches <= kFewMatches) {
      count_each(segment, scratch.kept.data());
    } else {
      count_many(segment, scratch.kept.data(), scratch.crossed);
    }
    count_identities(job, segment, scratch, job.ahead.identities[at], job.ahead.last[at]);
  }
  return true;
}

// Returns the first row with a NaN, or `end`.
FASTREID_VI_CLONES std::int64_t work(const Job<float>& job, std::int64_t begin, std::int64_t end,
                                     Scratch<float>& scratch) {
  while (begin < end && count_row(job, begin, scratch)) ++begin;
  return begin;
}
FASTREID_VI_CLONES std::int64_t work(const Job<double>& job, std::int64_t begin, std::int64_t end,
                                     Scratch<double>& scratch) {
  while (begin < end && count_row(job, begin, scratch)) ++begin;
  return begin;
}

template <typename T>
void check(const Job<T>& job) {
  const auto expect = [](bool good, const char* message) {
    if (!good) throw std::invalid_argument(message);
  };
  const auto rises = [](std::span<const std::int64_t> limits, std::int64_t end) {
    return !limits.empty() && limits.front() == 0 && limits.back() == end &&
           std::is_sorted(limits.begin(), limits.end());
  };
  const auto &block = job.block, &members = job.members;
  expect(std::ssize(job.queries.ids) == block.rows && std::ssize(job.queries.places) == block.rows,
         "query_ids, query_places: expected one entry per row of distance");
  expect(std::ssize(job.pool.ids) == block.columns && std::ssize(job.pool.places) == block.columns,
         "pool_ids, pool_places: expected one entry per column of distance");
  expect(std::is_sorted(job.pool.ids.begin(), job.pool.ids.end()), "pool_ids: expected to ascend");
  expect(rises(members.offsets, std::ssize(members.columns)),
         "offsets: expected to rise from 0 to the length of columns");
  expect(std::ssize(job.slots) == std::ssize(members.columns),
         "slots: expected one entry per entry of columns");
  for (std::int64_t t = 0; t < members.size(); ++t) {
    const auto part =
        members.columns.subspan(members.offsets[t], members.offsets[t + 1] - members.offsets[t]);
    expect(std::is_sorted(part.begin(), part.end()), "columns: expected to ascend");
    expect(part.empty() || (part.front() >= 0 && part.back() < block.columns),
           "columns: expected columns of distance");
  }
  const std::int64_t segments = block.rows * members.size();
  const std::int64_t matches = std::ssize(job.matches.distance);
  expect(std::ssize(job.matches.start) == segments + 1 && rises(job.matches.start, matches),
         "start: expected to rise from 0 to the number of matches");
  expect(std::ssize(job.matches.slot) == matches && std::ssize(job.ahead.images) == matches,
         "match_slots, images: expected one entry per match");
  expect(std::ssize(job.ahead.identities) == segments && std::ssize(job.ahead.last) == segments,
         "identities, last: expected one entry per row and gallery");
}

}  // namespace

template <typename T>
std::int64_t count_ahead(const Distances<T>& block, const Images& queries, const Images& pool,
                         const Galleries& members, std::span<const std::int32_t> slots,
                         CameraRule rule, int threads, const Matches<T>& matches,
                         const Ahead& ahead) {
  const Job<T> job{block, queries, pool, members, slots, rule, matches, ahead};
  check(job);
  const auto longest = [](std::span<const std::int64_t> limits) {
    std::int64_t most = 0;
    for (std::size_t i = 1; i < limits.size(); ++i)
      most = std::max(most, limits[i] - limits[i - 1]);
    return static_cast<std::size_t>(most);
  };
  const std::int64_t workers = workers_for(block.rows, kRowsPerTurn, threads);
  std::vector<Scratch<T>> scratches;
  scratches.reserve(workers);
  for (std::int64_t w = 0; w < workers; ++w) {
    scratches.emplace_back(longest(members.offsets), longest(matches.start));
  }
  std::atomic<std::int64_t> bad_row{block.rows};
  take_turns(
      block.rows, kRowsPerTurn, workers,
      [&](std::int64_t worker, std::int64_t begin, std::int64_t end) {
        const std::int64_t reached = work(job, begin, end, scratches[worker]);
        std::int64_t seen = bad_row.load();
        while (reached < end && reached < seen && !bad_row.compare_exchange_weak(seen, reached)) {
        }
      });
  return bad_row.load() == block.rows ? -1 : bad_row.load();
}

template std::int64_t count_ahead(const Distances<float>&, const Images&, const Images&,
                                  const Galleries&, std::span<const std::int32_t>, CameraRule, int,
                                  const Matches<float>&, const Ahead&);
template std::int64_t count_ahead(const Distances<double>&, const Images&, const Images&,
                                  const Galleries&, std::span<const std::int32_t>, CameraRule, int,
                                  const Matches<double>&, const Ahead&);

}  // namespace fastreid_vi::retrieval
