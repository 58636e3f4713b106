#include "ranking.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

// The hot loops are compiled once per instruction set; the loader picks. Needs ifunc, thus glibc.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define VECTOR_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define VECTOR_CLONES
#endif

namespace fastreid_vi::retrieval {
namespace {

constexpr std::int64_t kRowsPerTurn = 8;

// Rows are padded to whole blocks of 64 bytes, so that no vector loop has a remainder.
template <typename T>
constexpr std::int64_t kLanes = 64 / sizeof(T);

// As wide as the values compared, so that a comparison's lanes add up without conversion.
template <typename T>
using Count = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

// Up to so many matches, a vectorised pass per match beats one pass of binary searches over all:
// with 3,000 and 20,000 images both take the same time at 400 (SSE2) to 2,000 (AVX-512) matches.
constexpr std::size_t kFewMatches = 512;

// What queries from one place see of one gallery.
struct View {
  std::vector<std::int32_t> columns;  // kept pool columns, gallery order
  std::vector<std::int32_t> ids;      // identity of each kept image
  std::vector<std::int32_t> slots;    // positions in `columns`, grouped by identity, ascending
  std::vector<std::int32_t> start;    // [num_ids + 1], group limits in `slots`
};

View make_view(std::span<const std::int64_t> gallery, const Images& pool, std::int32_t num_ids,
               CameraRule rule, std::int32_t place) {
  View view;
  view.start.assign(static_cast<std::size_t>(num_ids) + 1, 0);
  for (const std::int64_t column : gallery) {
    if (rule == CameraRule::kLocation && pool.places[column] == place) continue;
    view.columns.push_back(static_cast<std::int32_t>(column));
    view.ids.push_back(pool.ids[column]);
    ++view.start[pool.ids[column] + 1];
  }
  std::partial_sum(view.start.begin(), view.start.end(), view.start.begin());
  view.slots.resize(view.columns.size());
  std::vector<std::int32_t> next(view.start.begin(), view.start.end() - 1);
  for (std::size_t slot = 0; slot < view.ids.size(); ++slot) {
    view.slots[next[view.ids[slot]]++] = static_cast<std::int32_t>(slot);
  }
  return view;
}

// The views of all galleries, once per place the queries come from.
struct Plan {
  std::vector<std::vector<View>> views;  // [place, gallery]
  std::vector<std::int32_t> view_of;     // [query] -> first index of `views`
  std::int32_t num_ids = 0;
  std::size_t longest = 0;
};

Plan make_plan(const Images& queries, const Images& pool, const Galleries& galleries,
               CameraRule rule) {
  Plan plan;
  for (const std::int32_t id : pool.ids) plan.num_ids = std::max(plan.num_ids, id + 1);
  std::map<std::int32_t, std::int32_t> known;
  for (std::size_t i = 0; i < queries.ids.size(); ++i) {
    const std::int32_t place = rule == CameraRule::kLocation ? queries.places[i] : 0;
    const auto [entry, added] = known.try_emplace(place, static_cast<std::int32_t>(known.size()));
    plan.view_of.push_back(entry->second);
    if (!added) continue;
    auto& views = plan.views.emplace_back();
    for (std::int64_t t = 0; t < galleries.size(); ++t) {
      const auto begin = galleries.offsets[t], end = galleries.offsets[t + 1];
      views.push_back(make_view(galleries.columns.subspan(begin, end - begin), pool, plan.num_ids,
                                rule, place));
      plan.longest = std::max(plan.longest, views.back().columns.size());
    }
  }
  return plan;
}

// What one thread writes on.
template <typename T>
struct Scratch {
  Scratch(const Plan& plan, std::int64_t columns)
      : row(columns),
        memory(plan.longest + 3 * kLanes<T>),
        seen(plan.num_ids),
        ahead(plan.longest + 1) {
    matches.reserve(plan.longest);
    ranks.reserve(plan.longest);
    crossed.reserve(plan.longest + 1);
    const auto misplaced = reinterpret_cast<std::uintptr_t>(memory.data()) % 64 / sizeof(T);
    kept = memory.data() + (misplaced == 0 ? 0 : kLanes<T> - misplaced);
  }
  Scratch(Scratch&&) = default;  // moving a vector keeps its buffer, so `kept` stays right

  std::vector<T> row;  // a row whose columns are not adjacent in memory
  std::vector<T> memory;
  T* kept;                            // [slots], 64-byte aligned, filled up with NaN
  std::vector<std::int32_t> matches;  // slots of the matches
  std::vector<std::int32_t> ranks;    // their ranks
  std::vector<std::int64_t> crossed;  // kept images between neighbouring matches
  std::vector<std::uint8_t> seen;     // [num_ids]
  std::vector<std::int32_t> ahead;    // identities of the images before the first match
};

template <typename T>
[[gnu::always_inline]] inline bool has_nan(const T* row, std::int64_t columns) {
  Count<T> found = 0;
  for (std::int64_t j = 0; j < columns; ++j) found |= row[j] != row[j];
  return found != 0;
}

// Slots (padded with NaN) that come before slot `at` by the key (distance, slot).
template <typename T>
[[gnu::always_inline]] inline std::int32_t count_before(const T* padded, std::int64_t slots,
                                                        std::int64_t at) {
  const T* kept = std::assume_aligned<64>(padded);
  const T limit = kept[at];
  const std::int64_t own = at / kLanes<T> * kLanes<T>;
  Count<T> count = 0;
  for (std::int64_t k = 0; k < own; ++k) count += kept[k] <= limit;
  for (std::int64_t k = own; k < own + kLanes<T>; ++k) {
    count += (kept[k] < limit) | ((kept[k] == limit) & (k < at));
  }
  for (std::int64_t k = own + kLanes<T>; k < slots; ++k) count += kept[k] < limit;
  return static_cast<std::int32_t>(count);
}

// Ranks of many matches in one pass: a histogram over the gaps between them.
template <typename T>
void rank_many(Scratch<T>& scratch, std::int64_t slots) {
  auto& matches = scratch.matches;
  const T* kept = scratch.kept;
  const auto before = [kept](std::int32_t a, std::int32_t b) {
    return kept[a] < kept[b] || (kept[a] == kept[b] && a < b);
  };
  std::sort(matches.begin(), matches.end(), before);
  scratch.crossed.assign(matches.size() + 1, 0);
  for (std::int32_t slot = 0; slot < slots; ++slot) {
    if (std::isnan(kept[slot])) continue;
    const auto gap = std::upper_bound(matches.begin(), matches.end(), slot, before);
    ++scratch.crossed[gap - matches.begin()];
  }
  std::int64_t ahead = 0;
  for (std::size_t m = 0; m < matches.size(); ++m) {
    ahead += scratch.crossed[m];
    scratch.ranks.push_back(static_cast<std::int32_t>(ahead) + 1);
  }
}

// One plus the number of other identities with an image before the first match.
template <typename T>
[[gnu::always_inline]] inline std::int32_t identity_position(Scratch<T>& scratch, const View& view,
                                                             std::int32_t first) {
  const T* kept = scratch.kept;
  const T limit = kept[first];
  const auto slots = static_cast<std::int64_t>(view.ids.size());
  std::int32_t* ahead = scratch.ahead.data();
  std::int64_t size = 0;
  // Written whether it counts or not: no branch to guess.
  for (std::int64_t k = 0; k < first; ++k) {
    ahead[size] = view.ids[k];
    size += kept[k] <= limit;
  }
  for (std::int64_t k = first + 1; k < slots; ++k) {
    ahead[size] = view.ids[k];
    size += kept[k] < limit;
  }
  std::int32_t identities = 0;
  for (std::int64_t k = 0; k < size; ++k) {
    identities += scratch.seen[ahead[k]] == 0;
    scratch.seen[ahead[k]] = 1;
  }
  for (std::int64_t k = 0; k < size; ++k) scratch.seen[ahead[k]] = 0;
  return identities + 1;
}

struct Result {
  std::int32_t matches = 0, first_image = 0, first_identity = 0, last_image = 0;
  double average_precision = std::numeric_limits<double>::quiet_NaN();
};

// A query and what it sees of one gallery.
struct Search {
  const View& view;
  const Images& pool;
  std::int32_t id, place;
  CameraRule rule;

  std::span<const std::int32_t> own_slots() const {
    const std::size_t begin = view.start[id], end = view.start[id + 1];
    return std::span(view.slots).subspan(begin, end - begin);
  }
  bool drops(std::int32_t own_slot) const {
    return rule == CameraRule::kSameIdAndCamera && pool.places[view.columns[own_slot]] == place;
  }
};

// Copies the kept distances together and returns how many slots they fill. NaN compares false with
// everything, so a dropped match and the padding count nowhere.
template <typename T>
[[gnu::always_inline]] inline std::int64_t gather(const T* row, const Search& search, T* kept) {
  constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  const auto size = static_cast<std::int64_t>(search.view.columns.size());
  const std::int32_t* columns = search.view.columns.data();
  for (std::int64_t k = 0; k < size; ++k) kept[k] = row[columns[k]];
  const std::int64_t slots = (size + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  std::fill(kept + size, kept + slots, kNan);
  for (const std::int32_t slot : search.own_slots()) {
    if (search.drops(slot)) kept[slot] = kNan;
  }
  return slots;
}

template <typename T>
[[gnu::always_inline]] inline Result rank_one(const T* row, const Search& search,
                                              Scratch<T>& scratch) {
  Result result;
  auto& matches = scratch.matches;
  auto& ranks = scratch.ranks;
  matches.clear();
  ranks.clear();
  if (search.id < 0) return result;
  for (const std::int32_t slot : search.own_slots()) {
    if (!search.drops(slot)) matches.push_back(slot);
  }
  if (matches.empty()) return result;

  const T* kept = scratch.kept;
  const std::int64_t slots = gather(row, search, scratch.kept);
  std::int32_t first = matches[0];
  for (const std::int32_t slot : matches) {
    if (kept[slot] < kept[first]) first = slot;
  }
  if (matches.size() <= kFewMatches) {
    for (const std::int32_t slot : matches) ranks.push_back(count_before(kept, slots, slot) + 1);
    std::sort(ranks.begin(), ranks.end());
  } else {
    rank_many(scratch, slots);
  }
  double sum = 0;
  for (std::size_t m = 0; m < ranks.size(); ++m) sum += static_cast<double>(m + 1) / ranks[m];
  result.matches = static_cast<std::int32_t>(ranks.size());
  result.first_image = ranks.front();
  result.last_image = ranks.back();
  result.first_identity =
      result.first_image == 1 ? 1 : identity_position(scratch, search.view, first);
  result.average_precision = sum / result.matches;
  return result;
}

// Everything a thread needs to take rows off the pile.
template <typename T>
struct Job {
  const Distances<T>& distances;
  const Images& queries;
  const Images& pool;
  CameraRule rule;
  const Plan& plan;
  const Counts& counts;
  std::atomic<std::int64_t> next{0};
  std::atomic<std::int64_t> bad_row{std::numeric_limits<std::int64_t>::max()};
};

template <typename T>
[[gnu::always_inline]] inline void rank_row(Job<T>& job, std::int64_t i, Scratch<T>& scratch) {
  const auto& d = job.distances;
  const T* row = d.data + i * d.row_stride;
  if (d.column_stride != 1) {
    for (std::int64_t j = 0; j < d.columns; ++j) scratch.row[j] = row[j * d.column_stride];
    row = scratch.row.data();
  }
  if (has_nan(row, d.columns)) {
    std::int64_t seen = job.bad_row.load();
    while (i < seen && !job.bad_row.compare_exchange_weak(seen, i)) {
    }
    return;
  }
  const auto& views = job.plan.views[job.plan.view_of[i]];
  const std::int32_t place = job.rule == CameraRule::kNone ? 0 : job.queries.places[i];
  for (std::size_t t = 0; t < views.size(); ++t) {
    const Search search{views[t], job.pool, job.queries.ids[i], place, job.rule};
    const Result r = rank_one(row, search, scratch);
    const std::size_t at = t * static_cast<std::size_t>(d.rows) + static_cast<std::size_t>(i);
    job.counts.matches[at] = r.matches;
    job.counts.first_image[at] = r.first_image;
    job.counts.first_identity[at] = r.first_identity;
    job.counts.last_image[at] = r.last_image;
    job.counts.average_precision[at] = r.average_precision;
  }
}

// Turns are handed out in order, so when a NaN stops the work every earlier row has been looked at.
template <typename T>
[[gnu::always_inline]] inline void take_turns(Job<T>& job, Scratch<T>& scratch) {
  constexpr auto kNoBadRow = std::numeric_limits<std::int64_t>::max();
  while (job.bad_row.load() == kNoBadRow) {
    const std::int64_t begin = job.next.fetch_add(kRowsPerTurn);
    if (begin >= job.distances.rows) return;
    const std::int64_t end = std::min(begin + kRowsPerTurn, job.distances.rows);
    for (std::int64_t i = begin; i < end; ++i) rank_row(job, i, scratch);
  }
}

VECTOR_CLONES void work(Job<float>& job, Scratch<float>& scratch) { take_turns(job, scratch); }
VECTOR_CLONES void work(Job<double>& job, Scratch<double>& scratch) { take_turns(job, scratch); }

void check(const Images& queries, const Images& pool, const Galleries& galleries, std::int64_t rows,
           std::int64_t columns) {
  const auto expect = [](bool good, const char* message) {
    if (!good) throw std::invalid_argument(message);
  };
  const auto all = [](auto values, std::int64_t low, std::int64_t high) {
    return std::all_of(values.begin(), values.end(),
                       [=](std::int64_t v) { return low <= v && v < high; });
  };
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - 64;
  expect(columns < kMost, "distance: too many columns");
  expect(std::ssize(queries.ids) == rows && std::ssize(queries.places) == rows,
         "query_ids, query_places: expected one entry per row of distance");
  expect(std::ssize(pool.ids) == columns && std::ssize(pool.places) == columns,
         "pool_ids, pool_places: expected one entry per column of distance");
  const std::int64_t num_ids =
      pool.ids.empty() ? 0 : 1 + *std::max_element(pool.ids.begin(), pool.ids.end());
  expect(all(pool.ids, 0, columns) && all(queries.ids, -1, num_ids),
         "query_ids, pool_ids: expected dense identities");
  const auto& offsets = galleries.offsets;
  expect(!offsets.empty() && offsets.front() == 0 &&
             offsets.back() == std::ssize(galleries.columns) &&
             std::is_sorted(offsets.begin(), offsets.end()),
         "offsets: expected to rise from 0 to the length of columns");
  expect(all(galleries.columns, 0, columns), "columns: expected columns of distance");
}

}  // namespace

template <typename T>
std::int64_t rank_rows(const Distances<T>& distances, const Images& queries, const Images& pool,
                       const Galleries& galleries, CameraRule rule, int threads,
                       const Counts& counts) {
  check(queries, pool, galleries, distances.rows, distances.columns);
  const Plan plan = make_plan(queries, pool, galleries, rule);
  Job<T> job{distances, queries, pool, rule, plan, counts};
  const std::int64_t turns = (distances.rows + kRowsPerTurn - 1) / kRowsPerTurn;
  const auto workers = std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(turns, 1));
  // Memory is claimed here, because an exception inside a thread would end the process.
  std::vector<Scratch<T>> scratches;
  scratches.reserve(workers);
  for (std::int64_t w = 0; w < workers; ++w) scratches.emplace_back(plan, distances.columns);
  {
    std::vector<std::jthread> others;
    others.reserve(workers - 1);
    for (std::int64_t w = 1; w < workers; ++w) {
      others.emplace_back([&job, &scratch = scratches[w]] { work(job, scratch); });
    }
    work(job, scratches[0]);
  }
  const std::int64_t bad = job.bad_row.load();
  return bad == std::numeric_limits<std::int64_t>::max() ? -1 : bad;
}

template std::int64_t rank_rows(const Distances<float>&, const Images&, const Images&,
                                const Galleries&, CameraRule, int, const Counts&);
template std::int64_t rank_rows(const Distances<double>&, const Images&, const Images&,
                                const Galleries&, CameraRule, int, const Counts&);

}  // namespace fastreid_vi::retrieval
