// Threads for loops over independent items: torch's own, where torch is loaded, else some that are started and joined here.
// Torch's wait for its next operation by spinning, for milliseconds after the last, so others would share their cores: on two
// cores the loss behind a matrix product took as long with two threads of its own as with one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace fusechat {

// Runs work(data) on up to `threads` threads of torch's OpenMP team, this one among them; false, and nothing run, where
// there is none, or where this process was forked: GNU OpenMP hangs in a child (a DataLoader worker) whose parent used it.
bool run_on_torch_threads(void (*work)(void *), void *data, int threads);

// Calls body(begin, end) for consecutive ranges that cover [0, n), at most `grain` items each, on `threads` threads at most.
// The first exception thrown by a body is rethrown here after all threads have stopped.
template <class Body>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, Body &&body) {
    if (n <= 0) return;
    grain = std::max<std::int64_t>(grain, 1);
    const std::int64_t ranges = (n + grain - 1) / grain;
    const int workers = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), ranges));
    if (workers == 1) {
        for (std::int64_t begin = 0; begin < n; begin += grain) body(begin, std::min(begin + grain, n));
        return;
    }
    std::atomic<std::int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failure_lock;
    auto work = [&] {
        try {
            for (std::int64_t r = next++; r < ranges; r = next++) {
                body(r * grain, std::min((r + 1) * grain, n));
            }
        } catch (...) {
            next = ranges;
            const std::lock_guard<std::mutex> hold(failure_lock);
            if (!failure) failure = std::current_exception();
        }
    };
    const auto call_work = [](void *data) { (*static_cast<decltype(work) *>(data))(); };
    if (!run_on_torch_threads(call_work, &work, workers)) {
        std::vector<std::thread> pool;
        pool.reserve(workers - 1);
        try {
            for (int i = 1; i < workers; ++i) pool.emplace_back(work);
        } catch (const std::exception &) {
            // There are no more threads, or there is no memory for one: those that run, and this one, do all of it.
        }
        work();
        for (auto &thread : pool) thread.join();
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace fusechat
