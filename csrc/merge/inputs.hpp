// The inputs of one tensor's merge: where each model's copy lies, and reading it tile by tile as fp32 task vectors.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "merge/numbers.hpp"
#include "parallel.hpp"

namespace fusechat::merge {

constexpr int kTile = 512;                      // what the arithmetic works on: stays in the first-level cache
constexpr int kChunk = 32 * kTile;              // what one read fetches
constexpr std::int64_t kSegment = 4 * kChunk;   // what one thread takes; sums are kept per segment, then added in order

// A low-rank update scale · B A of a matrix with `columns` columns; a: [rank, columns], b: [rows, rank].
struct LowRank {
    const float *a = nullptr;
    const float *b = nullptr;
    std::int64_t columns = 0;
    int rank = 0;
    float scale = 0;
};

// One model's copy of a tensor. fd < 0 stands for zeros. Items from n_valid on are taken from the base.
struct Source {
    int fd = -1;
    std::int64_t offset = 0;
    Dtype dtype = Dtype::f32;
    std::int64_t n_valid = 0;
    LowRank low_rank{};
};

// Where a source holds NaN or infinity (or its difference to the base overflows fp32).
struct NonFinite {
    std::int64_t count = 0;
    std::int64_t first = -1;
};

struct Inputs {
    Source base;
    std::vector<Source> targets;
    std::int64_t n = 0;

    int n_targets() const { return static_cast<int>(targets.size()); }
};

// One thread's buffers. `base` holds kTile values, `delta(j)` target j minus base, rounded to fp32.
class Scratch {
  public:
    explicit Scratch(int n_targets);
    float *base() { return base_.data(); }
    float *delta(int j) { return delta_.data() + static_cast<std::size_t>(j) * kTile; }
    float *packed(int j) { return packed_.data() + static_cast<std::size_t>(j) * kTile; }  // delta(j), a few of them
    unsigned char *raw(int source) { return raw_.data() + static_cast<std::size_t>(source) * kChunk * 4; }
    unsigned char *out() { return out_.data(); }
    float *values() { return values_.data(); }
    std::vector<unsigned char> &carried() { return carried_; }  // a segment's candidates

  private:
    std::vector<float> base_, values_, delta_, packed_;
    std::vector<unsigned char> raw_, out_, carried_;
};

// Fetches items [begin, begin + n) of every source, n <= kChunk, into the scratch's raw buffers.
// Throws std::runtime_error when a file is shorter than its header said.
void fetch(const Inputs &inputs, std::int64_t begin, int n, Scratch &scratch);

// Widens items [at, at + n) of what was fetched from `begin` on, n <= kTile, subtracts the base, and pads the tile with
// zeros up to a multiple of the lanes. Adds what is not finite to `bad` (base first, then targets).
void open_tile(const Inputs &inputs, std::int64_t begin, int at, int n, Scratch &scratch, std::vector<NonFinite> &bad);

// Lends each thread its own scratch.
class ScratchPool {
  public:
    explicit ScratchPool(int n_targets) : n_targets_(n_targets) {}
    std::unique_ptr<Scratch> take();
    void give(std::unique_ptr<Scratch> scratch);

  private:
    int n_targets_;
    std::mutex lock_;
    std::vector<std::unique_ptr<Scratch>> idle_;
};

inline std::int64_t n_segments(std::int64_t n) { return (n + kSegment - 1) / kSegment; }

// Calls body(segment, scratch, bad) for every segment; returns what was not finite, per source.
template <class Body>
std::vector<NonFinite> for_each_segment(const Inputs &inputs, ScratchPool &pool, int threads, Body &&body) {
    std::vector<NonFinite> all(inputs.targets.size() + 1);
    std::mutex lock;
    parallel_for(n_segments(inputs.n), 1, threads, [&](std::int64_t first, std::int64_t last) {
        auto scratch = pool.take();
        std::vector<NonFinite> bad(all.size());
        for (std::int64_t segment = first; segment < last; ++segment) body(segment, *scratch, bad);
        pool.give(std::move(scratch));
        const std::lock_guard<std::mutex> hold(lock);
        for (std::size_t s = 0; s < all.size(); ++s) {
            all[s].count += bad[s].count;
            if (bad[s].first >= 0 && (all[s].first < 0 || bad[s].first < all[s].first)) all[s].first = bad[s].first;
        }
    });
    return all;
}

// Calls tile(begin, n) for a segment's opened tiles in order, then after_chunk(begin, n) when a fetched chunk is finished.
template <class Tile, class AfterChunk>
void for_each_tile_of(const Inputs &inputs, std::int64_t segment, Scratch &scratch, std::vector<NonFinite> &bad,
                      Tile &&tile, AfterChunk &&after_chunk) {
    const std::int64_t stop = std::min(inputs.n, (segment + 1) * kSegment);
    for (std::int64_t begin = segment * kSegment; begin < stop; begin += kChunk) {
        const int n_chunk = static_cast<int>(std::min<std::int64_t>(kChunk, stop - begin));
        fetch(inputs, begin, n_chunk, scratch);
        for (int at = 0; at < n_chunk; at += kTile) {
            const int n = std::min(kTile, n_chunk - at);
            open_tile(inputs, begin, at, n, scratch, bad);
            tile(begin + at, n);
        }
        after_chunk(begin, n_chunk);
    }
}

// Calls tile(segment, begin, n, scratch) for every tile, in order within a segment; returns what was not finite.
template <class Tile>
std::vector<NonFinite> for_each_tile(const Inputs &inputs, ScratchPool &pool, int threads, Tile &&tile) {
    return for_each_segment(
        inputs, pool, threads, [&](std::int64_t segment, Scratch &scratch, std::vector<NonFinite> &bad) {
            for_each_tile_of(
                inputs, segment, scratch, bad,
                [&](std::int64_t begin, int n) { tile(segment, begin, n, scratch); }, [](std::int64_t, int) {});
        });
}

}  // namespace fusechat::merge
