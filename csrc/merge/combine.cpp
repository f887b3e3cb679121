#include "merge/combine.hpp"

#include <algorithm>
#include <cmath>

#include "merge/keys.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

FUSECHAT_CLONES void keep_at_least(const double *keys, double threshold, int n, double *values) {
    for (int i = 0; i < n; ++i) values[i] = keys[i] >= threshold ? values[i] : 0.0;
}

FUSECHAT_CLONES void keep_above(const double *keys, double threshold, int n, double *values) {
    for (int i = 0; i < n; ++i) values[i] = keys[i] > threshold ? values[i] : 0.0;
}

// Zeroes what was not selected: above the threshold all stay, and at it those up to the index tie_stop.
void keep_selected(const Selection &selection, std::int64_t begin, int n, const double *keys, double *values) {
    const int n_ties = static_cast<int>(std::clamp<std::int64_t>(selection.tie_stop - begin, 0, n));
    keep_at_least(keys, selection.threshold, n_ties, values);
    keep_above(keys + n_ties, selection.threshold, n - n_ties, values + n_ties);
}

// Keeps an element with probability `share`, decided by (key, flat index) alone, and divides what is kept by `share`.
FUSECHAT_CLONES void keep_randomly(double *values, std::uint64_t key, std::int64_t begin, double share, int n) {
    const auto limit = static_cast<std::uint64_t>(share * 0x1p32);
    for (int i = 0; i < n; ++i) {
        // The finaliser of SplitMix64 over a Weyl sequence.
        std::uint64_t x = key + static_cast<std::uint64_t>(begin + i) * 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        values[i] = (x ^ x >> 31) >> 32 < limit ? values[i] / share : 0.0f;
    }
}

struct Lanes {
    const float *base;
    double *deltas;  // [target][kTile]; what does not reach the sum is zeroed
    const double *weights, *votes;
    int n_targets, n;
    std::int64_t begin, tie_stop;
    double threshold, below;  // below: the number before it, which ties exceed
    double least_share, scale;
    float *merged;
};

struct Sums {
    double update_energy;
    std::int64_t n_touched, n_conflicts;
};

FUSECHAT_INLINE Doubles choose(const Longs &mask, const Doubles &yes, const Doubles &no) {
    return (Doubles)((mask & (Longs)yes) | (~mask & (Longs)no));
}

// Everything from the deltas to the merged value, lanes at a time. The arithmetic is in double: near cancellation the
// sign of a sum decides between two different updates, and a sum that should lie halfway between two 16-bit values must
// not miss the tie.
template <bool kSelect, bool kElect, bool kDivide>
FUSECHAT_INLINE void combine_lanes(const Lanes &lanes, Sums *sums) {
    Doubles energy{};
    Longs touched{}, conflicts{};
    const Longs sign_bit = Longs{} + INT64_MIN, first_lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    const Doubles one = Doubles{} + 1.0, least = Doubles{} + lanes.least_share;
    const Doubles count = Doubles{} + static_cast<double>(lanes.n_targets), threshold = Doubles{} + lanes.threshold;
    const Doubles below = Doubles{} + lanes.below;
    for (int i = 0; i < lanes.n; i += kLanes) {
        Doubles vote{}, spread{}, squares{};
        const Doubles first = loaded(lanes.deltas + i);
        for (int j = 0; j < lanes.n_targets; ++j) {
            const Doubles delta = loaded(lanes.deltas + static_cast<std::size_t>(j) * kTile + i);
            if constexpr (kElect) vote += lanes.votes[j] * delta;
            if constexpr (kSelect) {  // as variance_keys
                const Doubles difference = delta - first;
                spread += difference;
                squares += difference * difference;
            }
        }
        Longs selected{};
        if constexpr (kSelect) {
            const Doubles key = count * squares - spread * spread;
            const Longs may_tie = first_lanes + (lanes.begin + i) < lanes.tie_stop;
            selected = key > choose(may_tie, below, threshold);
            vote = where(selected, vote);
        }
        const Longs flip = (vote < 0.0) & sign_bit;  // a sum of zero elects plus
        Doubles sum{}, share{}, agreed{};
        for (int j = 0; j < lanes.n_targets; ++j) {
            double *place = lanes.deltas + static_cast<std::size_t>(j) * kTile + i;
            Doubles kept = loaded(place);
            if constexpr (kSelect) kept = where(selected, kept);
            if constexpr (kElect) {
                kept = where(lanes.votes[j] * (Doubles)((Longs)kept ^ flip) > 0.0, kept);
                agreed += lanes.votes[j] * kept;
            }
            if constexpr (kSelect || kElect) store(place, kept);
            sum += lanes.weights[j] * kept;
            if constexpr (kDivide) share += where(kept != 0.0, Doubles{} + lanes.weights[j]);
        }
        if constexpr (kDivide) {
            const Doubles bounded = choose(share < least, least, share);
            sum /= choose(bounded == 0.0, one, bounded);
        }
        const Doubles update = lanes.scale * sum;
        energy += update * update;
        touched -= update != 0.0;
        // Sums over the same terms in the same order differ only where a term was dropped.
        if constexpr (kElect) conflicts -= agreed != vote;
        store(lanes.merged + i, __builtin_convertvector(widened(lanes.base + i) + update, Floats));
    }
    *sums = {add_lanes(energy), add_lanes(touched), add_lanes(conflicts)};
}

using Combine = void(const Lanes &, Sums *);
FUSECHAT_CLONES void combine_000(const Lanes &lanes, Sums *sums) { combine_lanes<false, false, false>(lanes, sums); }
FUSECHAT_CLONES void combine_001(const Lanes &lanes, Sums *sums) { combine_lanes<false, false, true>(lanes, sums); }
FUSECHAT_CLONES void combine_010(const Lanes &lanes, Sums *sums) { combine_lanes<false, true, false>(lanes, sums); }
FUSECHAT_CLONES void combine_011(const Lanes &lanes, Sums *sums) { combine_lanes<false, true, true>(lanes, sums); }
FUSECHAT_CLONES void combine_100(const Lanes &lanes, Sums *sums) { combine_lanes<true, false, false>(lanes, sums); }
FUSECHAT_CLONES void combine_101(const Lanes &lanes, Sums *sums) { combine_lanes<true, false, true>(lanes, sums); }
FUSECHAT_CLONES void combine_110(const Lanes &lanes, Sums *sums) { combine_lanes<true, true, false>(lanes, sums); }
FUSECHAT_CLONES void combine_111(const Lanes &lanes, Sums *sums) { combine_lanes<true, true, true>(lanes, sums); }

// The update Σ delta³ / Σ delta² of weights delta² / Σ delta², element by element.
FUSECHAT_CLONES void combine_by_parameter(const Lanes &lanes, Sums *sums) {
    Doubles energy{};
    Longs touched{};
    for (int i = 0; i < lanes.n; i += kLanes) {
        Doubles cubes{}, squares{};
        for (int j = 0; j < lanes.n_targets; ++j) {
            const Doubles delta = loaded(lanes.deltas + static_cast<std::size_t>(j) * kTile + i);
            squares += delta * delta;
            cubes += delta * delta * delta;
        }
        const Doubles update = lanes.scale * where(squares > 0.0, cubes / squares);
        energy += update * update;
        touched -= update != 0.0;
        store(lanes.merged + i, __builtin_convertvector(widened(lanes.base + i) + update, Floats));
    }
    *sums = {add_lanes(energy), add_lanes(touched), 0};
}

Combine *chosen(const Rule &rule, bool select) {
    if (rule.per_parameter) return combine_by_parameter;
    const bool elect = rule.elect != Elect::none, divide = rule.divide != Divide::none;
    if (select) return elect ? (divide ? combine_111 : combine_110) : (divide ? combine_101 : combine_100);
    return elect ? (divide ? combine_011 : combine_010) : (divide ? combine_001 : combine_000);
}

// The masks that are each target's own.
void mask_each(const Rule &rule, const std::vector<Selection> &selections, std::int64_t begin, int n, Scratch &scratch) {
    alignas(64) double keys[kTile];
    for (std::size_t j = 0; j < rule.weights.size(); ++j) {
        double *delta = scratch.delta(static_cast<int>(j));
        if (rule.mask == Mask::each) {
            magnitude_keys(delta, n, keys);
            keep_selected(selections[j], begin, n, keys, delta);
        } else if (rule.mask == Mask::random && rule.keep_share[j] < 1) {
            keep_randomly(delta, rule.random_key[j], begin, rule.keep_share[j], n);
        }
    }
}

void add_energies(Scratch &scratch, int n, std::vector<double> &sums) {
    for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += energy(scratch.delta(static_cast<int>(j)), pad(n));
}

}  // namespace

void Outcome::add(const Outcome &other) {
    for (std::size_t j = 0; j < energy.size(); ++j) {
        energy[j] += other.energy[j];
        kept_energy[j] += other.kept_energy[j];
    }
    update_energy += other.update_energy;
    n_touched += other.n_touched;
    n_conflicts += other.n_conflicts;
    n_overflow += other.n_overflow;
}

void combine_tile(const Rule &rule, const std::vector<Selection> &selections, std::int64_t begin, int n, Scratch &scratch,
                  bool measured, unsigned char *out, Outcome &outcome) {
    if (measured) add_energies(scratch, n, outcome.energy);
    if (rule.mask == Mask::each || rule.mask == Mask::random) mask_each(rule, selections, begin, n, scratch);
    const bool select = rule.mask == Mask::shared && !rule.mask_weights_only;
    const std::vector<double> ones(rule.elect == Elect::plain ? rule.weights.size() : 0, 1.0);
    alignas(64) float merged[kTile];
    const Lanes lanes{
        .base = scratch.base(),
        .deltas = scratch.delta(0),
        .weights = rule.weights.data(),
        .votes = rule.elect == Elect::plain ? ones.data() : rule.weights.data(),
        .n_targets = static_cast<int>(rule.weights.size()),
        .n = pad(n),
        .begin = begin,
        .tie_stop = select ? selections[0].tie_stop : 0,
        .threshold = select ? selections[0].threshold : 0,
        .below = select ? std::nextafter(selections[0].threshold, -HUGE_VAL) : 0,
        .least_share = rule.divide == Divide::clamped ? 1e-6 : -HUGE_VAL,
        .scale = rule.scale,
        .merged = merged,
    };
    Sums sums;
    chosen(rule, select)(lanes, &sums);
    if (measured) add_energies(scratch, n, outcome.kept_energy);
    outcome.update_energy += sums.update_energy;
    outcome.n_touched += sums.n_touched;
    outcome.n_conflicts += sums.n_conflicts;
    outcome.n_overflow += narrow(merged, scratch.base(), rule.out_dtype, out, n);
}

}  // namespace fusechat::merge
