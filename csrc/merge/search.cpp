#include "merge/search.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <utility>

#include "merge/carry.hpp"
#include "merge/keys.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

constexpr int kBinBits = 14;
constexpr int kBins = 1 << kBinBits;

int shift_of(const Bracket &bracket) {
    return std::max(0, static_cast<int>(std::bit_width(bracket.high - bracket.low - 1)) - kBinBits);
}

// The smallest fp32 number that is not below x.
float ceiled(double x) {
    const auto rounded = static_cast<float>(x);
    return rounded < x ? std::nextafter(rounded, HUGE_VALF) : rounded;
}

template <class Better>
void improve(std::uint64_t &best, std::uint64_t value, Better better) {
    const std::atomic_ref shared(best);
    std::uint64_t seen = shared.load(std::memory_order_relaxed);
    while (better(value, seen) && !shared.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {}
}

}  // namespace

Search::Search(Inputs own, Key key, const Quota &quota, std::int64_t list_bytes, Carry *carry)
    : own_(std::move(own)), key_(key), quota_(quota), width_(key == Key::variance ? own_.n_targets() : 0), carry_(carry) {
    limit_ = list_bytes / static_cast<std::int64_t>(sizeof(Kept) + sizeof(float) * width_);
}

void Search::append_keys(Scratch &scratch, int slot, int n, std::vector<double> &keys) const {
    const std::size_t before = keys.size();
    if (key_ == Key::variance) {
        keys.resize(before + pad(n));
        variance_keys(scratch.delta(slot), width_, n, keys.data() + before);
        keys.resize(before + n);
    } else {
        alignas(64) float magnitudes[kTile];
        magnitude_keys(scratch.delta(slot), n, magnitudes);
        keys.insert(keys.end(), magnitudes, magnitudes + n);
    }
}

void Search::bracket_from(std::vector<double> &sample) {
    const auto n = static_cast<std::int64_t>(sample.size());
    double share = 0;  // of all elements
    if (quota_.k >= 0) {
        share = static_cast<double>(quota_.k) / static_cast<double>(own_.n);
    } else {
        const std::int64_t n_nonzero = n - std::count(sample.begin(), sample.end(), 0.0);
        share = static_cast<double>(quota_.numerator) / static_cast<double>(quota_.denominator) *
                static_cast<double>(n_nonzero) / static_cast<double>(n);
    }
    // Four standard deviations of independent draws: neighbours resemble each other, but a miss costs only time.
    const double deviation = std::sqrt(share * (1 - std::min(share, 1.0)) / static_cast<double>(n));
    const double kept_whole = 0.4 * static_cast<double>(limit_) / static_cast<double>(own_.n);
    double margin = 4 * deviation + 1e-5;
    // A miss costs about three passes, a bracket that is narrowed first one.
    if (kept_whole > 1.5 * deviation) margin = std::min(margin, kept_whole);
    auto bits_at_rank = [&](double from_top) {
        const auto rank = static_cast<std::int64_t>(from_top * static_cast<double>(n));
        if (rank < 0) return Bracket{}.high - 1;
        if (rank >= n) return std::uint64_t{0};
        std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<>());
        return std::bit_cast<std::uint64_t>(sample[static_cast<std::size_t>(rank)]);
    };
    bracket_ = {bits_at_rank(share + margin), bits_at_rank(share - margin) + 1};
}

void Search::begin_pass() {
    held_ = carry_ && bracket_.low >= carried_from_ && carry_->holds_all();
    if (!held_) {
        n_nonzero_ = 0;
        carried_from_ = bracket_.low;
    }
    n_above_ = n_inside_ = 0;
    segments_.clear();
    segments_.resize(static_cast<std::size_t>(n_segments(own_.n)));
    histogram_.clear();
}

Search::Segment &Search::opened(std::int64_t segment) {
    Segment &into = segments_[static_cast<std::size_t>(segment)];
    into.above.resize(width_, 0.0);
    into.inside.resize(width_, 0.0);
    return into;
}

void Search::tally(std::int64_t segment, std::int64_t begin, int n, Scratch &scratch, int slot) {
    Segment &into = opened(segment);
    if (key_ == Key::variance) {
        tally_variances(into, begin, n, scratch);
    } else {
        alignas(64) float keys[kTile];
        magnitude_keys(scratch.delta(slot), n, keys);
        const float low = ceiled(bracket_.low_key()), high = ceiled(bracket_.high_key());
        const KeyCounts counts = count_keys(keys, pad(n), low, high);
        into.n_nonzero += counts.nonzero;
        tally_keys(into, begin, n, nullptr, keys, low, high, counts, nullptr);
    }
}

void Search::tally_held(std::int64_t segment, Scratch &scratch) {
    Segment &into = opened(segment);
    carry_->for_each_tile_of(
        segment, scratch,
        [&](std::int64_t begin, int found, const std::int32_t *at, const unsigned char *) {
            if (found > 0) tally_candidates(into, begin, found, at, scratch.delta(0));
        },
        [](std::int64_t, int) {});
}

// Most keys lie below the bracket, which fp32 can tell: the exact ones are computed for the others.
void Search::tally_variances(Segment &into, std::int64_t begin, int n, Scratch &scratch) {
    std::array<std::int32_t, kTile> at;
    const int found = find_candidates(scratch.delta(0), width_, n, bracket_.low_key(), at.data(), into.n_nonzero);
    if (carry_) carry_->take(begin, n, at.data(), found, is_measured(own_.n, begin), scratch);
    if (found == 0) return;
    for (int c = 0; c < width_; ++c) gather(scratch.delta(c), at.data(), found, scratch.packed(c));
    tally_candidates(into, begin, found, at.data(), scratch.packed(0));
}

void Search::tally_candidates(Segment &into, std::int64_t begin, int found, const std::int32_t *at, const float *deltas) {
    alignas(64) double keys[kTile];
    variance_keys(deltas, width_, found, bracket_.high_key(), keys, into.above.data());
    const KeyCounts counts = count_keys(keys, pad(found), bracket_.low_key(), bracket_.high_key());
    tally_keys(into, begin, found, at, keys, bracket_.low_key(), bracket_.high_key(), counts, deltas);
}

// `places`: where the keys' elements stand in the tile, in order where null.
template <class T>
void Search::tally_keys(Segment &into, std::int64_t begin, int n, const std::int32_t *places, const T *keys, T low,
                        T high, const KeyCounts &counts, const float *deltas) {
    into.n_above += counts.above;
    if (counts.inside == 0) return;
    into.n_inside += counts.inside;
    const bool keep = (n_inside_ += counts.inside) <= limit_;
    if (!keep) open_histogram();
    std::array<std::int32_t, kTile> at;
    const int found = find_inside(keys, pad(n), low, high, at.data());
    for (int i = 0; i < found; ++i) {
        for (int c = 0; c < width_; ++c) {
            const float delta = deltas[static_cast<std::size_t>(c) * kTile + at[i]];
            into.inside[c] += static_cast<double>(delta) * delta;
            if (keep) into.payload.push_back(delta);
        }
        if (keep) {
            into.kept.push_back({begin + (places ? places[at[i]] : at[i]), keys[at[i]]});
        } else {
            add_to_histogram(keys[at[i]]);
        }
    }
}

// Only an overfull bracket needs one.
void Search::open_histogram() {
    const std::lock_guard<std::mutex> hold(histogram_lock_);
    if (histogram_.empty()) histogram_.assign(kBins, Bin{});
}

void Search::add_to_histogram(double key) {
    const auto bits = std::bit_cast<std::uint64_t>(key);
    Bin &bin = histogram_[(bits - bracket_.low) >> shift_of(bracket_)];
    std::atomic_ref(bin.count).fetch_add(1, std::memory_order_relaxed);
    improve(bin.lowest, bits, std::less<>());
    improve(bin.highest, bits, std::greater<>());
}

bool Search::end_pass(ScratchPool &pool) {
    for (const Segment &segment : segments_) {
        n_above_ += segment.n_above;
        n_nonzero_ += segment.n_nonzero;
    }
    const std::int64_t k = quota_.resolve(n_nonzero_);
    if (k == 0) {
        start(0);
        found_.threshold = std::numeric_limits<double>::infinity();
    } else if (k <= n_above_) {
        bracket_ = {bracket_.high, Bracket{}.high};
        return false;
    } else if (k > n_above_ + n_inside_) {
        bracket_ = {0, bracket_.low};
        return false;
    } else if (n_inside_ <= limit_) {
        start(k);
        find_in_kept();
    } else if (bracket_.single()) {
        start(k);
        find_in_ties(pool);
    } else {
        bracket_ = narrowed(k);
        return false;
    }
    segments_.clear();
    return true;
}

Bracket Search::narrowed(std::int64_t k) const {
    // What was kept before the list was full belongs into the histogram, too.
    std::vector<Bin> bins = histogram_;
    for (const Segment &segment : segments_) {
        for (const Kept &kept : segment.kept) {
            const auto bits = std::bit_cast<std::uint64_t>(kept.key);
            Bin &bin = bins[(bits - bracket_.low) >> shift_of(bracket_)];
            bin = {bin.count + 1, std::min(bin.lowest, bits), std::max(bin.highest, bits)};
        }
    }
    auto seen = static_cast<std::uint64_t>(n_above_);
    std::size_t bin = kBins;
    while (seen < static_cast<std::uint64_t>(k)) seen += bins[--bin].count;
    return {bins[bin].lowest, bins[bin].highest + 1};
}

void Search::start(std::int64_t k) {
    found_ = {};
    found_.k = k;
    found_.n_nonzero = n_nonzero_;
    found_.energy.assign(width_, 0.0);
    for (const Segment &segment : segments_) {
        for (int c = 0; c < width_ && k > 0; ++c) found_.energy[c] += segment.above[c];
    }
}

// The bracket was kept whole: rank it exactly.
void Search::find_in_kept() {
    std::vector<double> keys;
    keys.reserve(static_cast<std::size_t>(n_inside_));
    for (const Segment &segment : segments_) {
        for (const Kept &kept : segment.kept) keys.push_back(kept.key);
    }
    const std::int64_t needed = found_.k - n_above_;
    std::nth_element(keys.begin(), keys.begin() + (needed - 1), keys.end(), std::greater<>());
    found_.threshold = keys[static_cast<std::size_t>(needed - 1)];
    const std::int64_t n_greater =
        std::count_if(keys.begin(), keys.begin() + needed, [&](double x) { return x > found_.threshold; });
    std::int64_t ties = needed - n_greater;
    for (const Segment &segment : segments_) {
        for (std::size_t i = 0; i < segment.kept.size(); ++i) {
            const Kept &kept = segment.kept[i];
            const bool tied = kept.key == found_.threshold;
            if (kept.key < found_.threshold || (tied && ties == 0)) continue;
            if (tied) {
                --ties;
                found_.tie_stop = kept.index + 1;
            }
            for (int c = 0; c < width_; ++c) {
                const double delta = segment.payload[i * width_ + c];
                found_.energy[c] += delta * delta;
            }
        }
    }
}

// The bracket is one key that more elements share than can be kept: only the segment the cut falls into is read again.
void Search::find_in_ties(ScratchPool &pool) {
    found_.threshold = bracket_.low_key();
    std::int64_t needed = found_.k - n_above_;
    std::size_t segment = 0;
    while (segments_[segment].n_inside <= needed) {
        for (int c = 0; c < width_; ++c) found_.energy[c] += segments_[segment].inside[c];
        needed -= segments_[segment].n_inside;
        if (++segment == segments_.size()) break;
    }
    found_.tie_stop = std::min(own_.n, static_cast<std::int64_t>(segment) * kSegment);
    if (needed > 0) cut_segment(static_cast<std::int64_t>(segment), needed, pool);
}

void Search::cut_segment(std::int64_t segment, std::int64_t needed, ScratchPool &pool) {
    auto scratch = pool.take();
    std::vector<NonFinite> ignored(own_.targets.size() + 1);
    const std::int64_t stop = std::min(own_.n, (segment + 1) * kSegment);
    std::vector<double> keys;
    for (std::int64_t begin = segment * kSegment; begin < stop && needed > 0; begin += kTile) {
        const int n = static_cast<int>(std::min<std::int64_t>(kTile, stop - begin));
        fetch(own_, begin, n, *scratch);
        open_tile(own_, begin, 0, n, *scratch, ignored);
        keys.clear();
        append_keys(*scratch, 0, n, keys);
        for (int i = 0; i < n && needed > 0; ++i) {
            if (keys[i] != bracket_.low_key()) continue;
            for (int c = 0; c < width_; ++c) {
                const double delta = scratch->delta(c)[i];
                found_.energy[c] += delta * delta;
            }
            found_.tie_stop = begin + i + 1;
            --needed;
        }
    }
    pool.give(std::move(scratch));
}

}  // namespace fusechat::merge
