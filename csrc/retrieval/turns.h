// Rows of work for threads. What a turn computes never depends on how many threads there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Hot loops are compiled once per instruction set; the loader picks. Needs ifunc, thus glibc.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define FASTREID_VI_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FASTREID_VI_CLONES
#endif

namespace fastreid_vi::retrieval {

// Threads that `count` rows in turns of `grain` can keep busy.
inline std::int64_t workers_for(std::int64_t count, std::int64_t grain, int threads) {
  const std::int64_t turns = (count + grain - 1) / grain;
  return std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(turns, 1));
}

// Calls run(worker) in every worker at once; it may not throw.
template <typename Run>
void run_workers(std::int64_t workers, const Run& run) {
  std::vector<std::jthread> others;
  others.reserve(workers - 1);
  for (std::int64_t w = 1; w < workers; ++w) others.emplace_back([&run, w] { run(w); });
  run(0);
}

// Calls work(worker, begin, end) for all turns of [0, count); it may not throw, so memory is
// claimed before.
template <typename Work>
void take_turns(std::int64_t count, std::int64_t grain, std::int64_t workers, const Work& work) {
  std::atomic<std::int64_t> next{0};
  run_workers(workers, [&](std::int64_t worker) {
    for (;;) {
      const std::int64_t begin = next.fetch_add(grain);
      if (begin >= count) return;
      work(worker, begin, std::min(begin + grain, count));
    }
  });
}

}  // namespace fastreid_vi::retrieval
