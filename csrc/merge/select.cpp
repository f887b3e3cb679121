#include "merge/select.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "merge/keys.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

constexpr std::int64_t kListBytes = 4 << 20;  // what may be kept of a bracket
constexpr int kBins = 1 << 16;
constexpr int kSampleRun = 128;               // neighbours taken together: a read costs more than their arithmetic
constexpr std::int64_t kSampledFrom = 1 << 16;  // smaller tensors are kept or narrowed at once

// Keys are non-negative doubles, whose bits order as integers: a bracket is a range of bits.
struct Bracket {
    std::uint64_t low = 0;
    std::uint64_t high = std::bit_cast<std::uint64_t>(std::numeric_limits<double>::infinity());

    bool single() const { return high - low == 1; }
    int shift() const { return std::max(0, static_cast<int>(std::bit_width(high - low - 1)) - 16); }
    double low_key() const { return std::bit_cast<double>(low); }
    double high_key() const { return std::bit_cast<double>(high); }
};

struct Kept {
    std::int64_t index;
    double key;
};

// What one pass learns about a segment.
struct SegmentCount {
    std::int64_t n_above = 0, n_inside = 0, n_nonzero = 0;
    std::vector<double> above, inside;  // per target: sums of delta²
    std::vector<Kept> kept;
    std::vector<float> payload;  // the deltas of what was kept, row by row
};

// How many keys fall into a bin, and between which two they lie: updates of 16-bit models take few distinct values.
struct Bin {
    std::uint64_t count = 0, lowest = UINT64_MAX, highest = 0;
};

template <class Better>
void improve(std::uint64_t &best, std::uint64_t value, Better better) {
    const std::atomic_ref shared(best);
    std::uint64_t seen = shared.load(std::memory_order_relaxed);
    while (better(value, seen) && !shared.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {}
}

struct Pass {
    std::int64_t n_above = 0, n_inside = 0, n_nonzero = 0;
    bool overfull = false;
    std::vector<SegmentCount> segments;
    std::vector<Bin> histogram;  // of the keys inside that were not kept

    void add_to_histogram(double key, const Bracket &bracket) {
        const auto bits = std::bit_cast<std::uint64_t>(key);
        Bin &bin = histogram[(bits - bracket.low) >> bracket.shift()];
        std::atomic_ref(bin.count).fetch_add(1, std::memory_order_relaxed);
        improve(bin.lowest, bits, std::less<>());
        improve(bin.highest, bits, std::greater<>());
    }
};

class Selector {
  public:
    Selector(const Inputs &inputs, ScratchPool &pool, Key key, int threads, std::vector<NonFinite> &bad)
        : inputs_(inputs), pool_(pool), key_(key), width_(inputs.n_targets()), threads_(threads), bad_(bad) {}

    Selection run(const Quota &quota) {
        Bracket bracket = sampled_bracket(quota);
        for (;;) {
            Pass pass = scan(bracket);
            const std::int64_t k = quota.resolve(pass.n_nonzero);
            if (k == 0) return nothing(pass);
            if (k <= pass.n_above) {
                bracket = {bracket.high, Bracket{}.high};
            } else if (k > pass.n_above + pass.n_inside) {
                bracket = {0, bracket.low};
            } else if (!pass.overfull) {
                return from_kept(pass, k);
            } else if (bracket.single()) {
                return from_ties(pass, bracket, k);
            } else {
                bracket = narrowed(pass, k);
            }
        }
    }

  private:
    const Inputs &inputs_;
    ScratchPool &pool_;
    Key key_;
    int width_, threads_;
    std::vector<NonFinite> &bad_;
    bool counted_bad_ = false;

    std::int64_t list_limit() const {
        return kListBytes / static_cast<std::int64_t>(sizeof(Kept) + sizeof(float) * width_);
    }

    void make_keys(Scratch &scratch, int n, double *keys) const {
        if (key_ == Key::variance) {
            variance_keys(scratch.delta(0), width_, n, keys);
        } else {
            magnitude_keys(scratch.delta(0), n, keys);
        }
    }

    // A range of keys that probably holds the threshold and little else.
    Bracket sampled_bracket(const Quota &quota) const {
        if (inputs_.n < kSampledFrom) return {};
        // About n^(2/3) balances the cost of the sample with that of what its bracket keeps.
        const std::int64_t wanted = std::int64_t{1} << 2 * std::bit_width(static_cast<std::uint64_t>(inputs_.n)) / 3;
        const std::int64_t n_runs = wanted / kSampleRun;
        std::vector<double> sample;
        sample.reserve(static_cast<std::size_t>(n_runs * kSampleRun));
        auto scratch = pool_.take();
        std::vector<NonFinite> ignored(inputs_.targets.size() + 1);
        double keys[kTile];
        for (std::int64_t run = 0; run < n_runs; ++run) {
            const auto begin = static_cast<std::int64_t>(static_cast<__int128>(inputs_.n - kSampleRun) * run / n_runs);
            fetch(inputs_, begin, kSampleRun, *scratch);
            open_tile(inputs_, begin, 0, kSampleRun, *scratch, ignored);
            make_keys(*scratch, kSampleRun, keys);
            sample.insert(sample.end(), keys, keys + kSampleRun);
        }
        pool_.give(std::move(scratch));
        const auto n = static_cast<std::int64_t>(sample.size());
        const std::int64_t n_nonzero = n - std::count(sample.begin(), sample.end(), 0.0);
        double share = 0;  // of all elements
        if (quota.k >= 0) {
            share = static_cast<double>(quota.k) / static_cast<double>(inputs_.n);
        } else {
            share = static_cast<double>(quota.numerator) / static_cast<double>(quota.denominator) *
                    static_cast<double>(n_nonzero) / static_cast<double>(n);
        }
        // Four standard deviations of independent draws: neighbours resemble each other, but a miss costs only time.
        double margin = 4 * std::sqrt(share * (1 - std::min(share, 1.0)) / static_cast<double>(n)) + 1e-5;
        margin = std::min(margin, 0.4 * static_cast<double>(list_limit()) / static_cast<double>(inputs_.n));
        auto bits_at_rank = [&](double from_top) {
            const auto rank = static_cast<std::int64_t>(from_top * static_cast<double>(n));
            if (rank < 0) return Bracket{}.high - 1;
            if (rank >= n) return std::uint64_t{0};
            std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<>());
            return std::bit_cast<std::uint64_t>(sample[static_cast<std::size_t>(rank)]);
        };
        return {bits_at_rank(share + margin), bits_at_rank(share - margin) + 1};
    }

    Pass scan(const Bracket &bracket) {
        Pass pass;
        pass.segments.resize(static_cast<std::size_t>(n_segments(inputs_.n)));
        pass.histogram.assign(kBins, Bin{});
        std::atomic<std::int64_t> n_inside{0};
        const double low = bracket.low_key(), high = bracket.high_key();
        const std::int64_t limit = list_limit();
        auto bad = for_each_tile(
            inputs_, pool_, threads_,
            [&](std::int64_t segment, std::int64_t begin, int n, Scratch &scratch) {
                alignas(64) double keys[kTile];
                make_keys(scratch, n, keys);
                SegmentCount &count = pass.segments[static_cast<std::size_t>(segment)];
                if (count.above.empty()) {
                    count.above.assign(width_, 0.0);
                    count.inside.assign(width_, 0.0);
                }
                const int padded = pad(n);
                const KeyCounts counts = count_keys(keys, padded, low, high);
                count.n_above += counts.above;
                count.n_nonzero += counts.nonzero;
                for (int c = 0; c < width_ && key_ == Key::variance; ++c) {
                    count.above[c] += energy_above(scratch.delta(c), keys, padded, high);
                }
                if (counts.inside == 0) return;
                count.n_inside += counts.inside;
                const bool keep = (n_inside += counts.inside) <= limit;
                std::array<std::int32_t, kTile> at;
                const int m = find_inside(keys, n, low, high, at.data());
                for (int i = 0; i < m; ++i) {
                    for (int c = 0; c < width_ && key_ == Key::variance; ++c) {
                        const double delta = scratch.delta(c)[at[i]];
                        count.inside[c] += delta * delta;
                        if (keep) count.payload.push_back(static_cast<float>(delta));
                    }
                    if (keep) {
                        count.kept.push_back({begin + at[i], keys[at[i]]});
                    } else {
                        pass.add_to_histogram(keys[at[i]], bracket);
                    }
                }
            },
            [](std::int64_t, int, Scratch &) {});
        if (!counted_bad_) bad_ = bad;
        counted_bad_ = true;
        for (const SegmentCount &count : pass.segments) {
            pass.n_above += count.n_above;
            pass.n_inside += count.n_inside;
            pass.n_nonzero += count.n_nonzero;
        }
        pass.overfull = pass.n_inside > limit;
        for (SegmentCount &count : pass.segments) {
            for (const Kept &kept : count.kept) {
                if (pass.overfull) pass.add_to_histogram(kept.key, bracket);
            }
        }
        return pass;
    }

    Bracket narrowed(const Pass &pass, std::int64_t k) const {
        std::uint64_t seen = static_cast<std::uint64_t>(pass.n_above);
        std::size_t bin = kBins;
        while (seen < static_cast<std::uint64_t>(k)) seen += pass.histogram[--bin].count;
        return {pass.histogram[bin].lowest, pass.histogram[bin].highest + 1};
    }

    Selection start(const Pass &pass, std::int64_t k) const {
        Selection selection;
        selection.k = k;
        selection.n_nonzero = pass.n_nonzero;
        selection.energy.assign(width_, 0.0);
        for (const SegmentCount &count : pass.segments) {
            for (int c = 0; c < width_ && k > 0; ++c) selection.energy[c] += count.above[c];
        }
        return selection;
    }

    Selection nothing(const Pass &pass) const {
        Selection selection = start(pass, 0);
        selection.threshold = std::numeric_limits<double>::infinity();
        return selection;
    }

    // The bracket was kept whole: rank it exactly.
    Selection from_kept(const Pass &pass, std::int64_t k) const {
        Selection selection = start(pass, k);
        std::vector<double> keys;
        keys.reserve(static_cast<std::size_t>(pass.n_inside));
        for (const SegmentCount &count : pass.segments) {
            for (const Kept &kept : count.kept) keys.push_back(kept.key);
        }
        const std::int64_t needed = k - pass.n_above;
        std::nth_element(keys.begin(), keys.begin() + (needed - 1), keys.end(), std::greater<>());
        selection.threshold = keys[static_cast<std::size_t>(needed - 1)];
        const std::int64_t n_greater =
            std::count_if(keys.begin(), keys.begin() + needed, [&](double x) { return x > selection.threshold; });
        std::int64_t ties = needed - n_greater;
        for (const SegmentCount &count : pass.segments) {
            for (std::size_t i = 0; i < count.kept.size(); ++i) {
                const Kept &kept = count.kept[i];
                const bool tied = kept.key == selection.threshold;
                if (kept.key < selection.threshold || (tied && ties == 0)) continue;
                if (tied) {
                    --ties;
                    selection.tie_stop = kept.index + 1;
                }
                for (int c = 0; c < width_ && key_ == Key::variance; ++c) {
                    const double delta = count.payload[i * width_ + c];
                    selection.energy[c] += delta * delta;
                }
            }
        }
        return selection;
    }

    // The bracket is one key that more elements share than can be kept: only the segment the cut falls into is read again.
    Selection from_ties(const Pass &pass, const Bracket &bracket, std::int64_t k) const {
        Selection selection = start(pass, k);
        selection.threshold = bracket.low_key();
        std::int64_t needed = k - pass.n_above;
        std::size_t segment = 0;
        while (pass.segments[segment].n_inside <= needed) {
            for (int c = 0; c < width_; ++c) selection.energy[c] += pass.segments[segment].inside[c];
            needed -= pass.segments[segment].n_inside;
            if (++segment == pass.segments.size()) break;
        }
        selection.tie_stop = std::min(inputs_.n, static_cast<std::int64_t>(segment) * kSegment);
        if (needed > 0) cut_segment(static_cast<std::int64_t>(segment), bracket, needed, selection);
        return selection;
    }

    void cut_segment(std::int64_t segment, const Bracket &bracket, std::int64_t needed, Selection &selection) const {
        auto scratch = pool_.take();
        std::vector<NonFinite> ignored(inputs_.targets.size() + 1);
        const std::int64_t stop = std::min(inputs_.n, (segment + 1) * kSegment);
        double keys[kTile];
        for (std::int64_t begin = segment * kSegment; begin < stop && needed > 0; begin += kTile) {
            const int n = static_cast<int>(std::min<std::int64_t>(kTile, stop - begin));
            fetch(inputs_, begin, n, *scratch);
            open_tile(inputs_, begin, 0, n, *scratch, ignored);
            make_keys(*scratch, n, keys);
            for (int i = 0; i < n && needed > 0; ++i) {
                if (keys[i] != bracket.low_key()) continue;
                for (int c = 0; c < width_; ++c) {
                    const double delta = scratch->delta(c)[i];
                    selection.energy[c] += delta * delta;
                }
                selection.tie_stop = begin + i + 1;
                --needed;
            }
        }
        pool_.give(std::move(scratch));
    }
};

}  // namespace

std::int64_t Quota::resolve(std::int64_t n_nonzero) const {
    if (k >= 0) return k;
    if (in_fp32) {
        const float share = static_cast<float>(static_cast<double>(numerator) / static_cast<double>(denominator));
        return std::min(n_nonzero, static_cast<std::int64_t>(static_cast<float>(n_nonzero) * share));
    }
    return static_cast<std::int64_t>(static_cast<__int128>(n_nonzero) * numerator / denominator);
}

Selection select(const Inputs &inputs, ScratchPool &pool, Key key, const Quota &quota, int threads,
                 std::vector<NonFinite> &bad) {
    Selection selection = Selector(inputs, pool, key, threads, bad).run(quota);
    if (key == Key::magnitude) selection.energy.clear();
    return selection;
}

Selection select_all(const Inputs &inputs, ScratchPool &pool, int threads, std::vector<NonFinite> &bad) {
    const int width = inputs.n_targets();
    std::vector<std::vector<double>> segments(static_cast<std::size_t>(n_segments(inputs.n)));
    bad = for_each_tile(
        inputs, pool, threads,
        [&](std::int64_t segment, std::int64_t, int n, Scratch &scratch) {
            auto &sums = segments[static_cast<std::size_t>(segment)];
            sums.resize(width, 0.0);
            for (int j = 0; j < width; ++j) sums[j] += energy(scratch.delta(j), pad(n));
        },
        [](std::int64_t, int, Scratch &) {});
    Selection selection;
    selection.k = inputs.n;
    selection.threshold = -1;
    selection.energy.assign(width, 0.0);
    for (const auto &sums : segments) {
        for (int j = 0; j < width; ++j) selection.energy[j] += sums[j];
    }
    return selection;
}

}  // namespace fusechat::merge
