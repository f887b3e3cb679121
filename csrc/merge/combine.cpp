#include "merge/combine.hpp"

#include <algorithm>
#include <cmath>

#include "merge/keys.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

FUSECHAT_CLONES void keep_at_least(float *values, float threshold, int n) {
    for (int i = 0; i < n; ++i) values[i] = std::fabs(values[i]) >= threshold ? values[i] : 0.0f;
}

FUSECHAT_CLONES void keep_above(float *values, float threshold, int n) {
    for (int i = 0; i < n; ++i) values[i] = std::fabs(values[i]) > threshold ? values[i] : 0.0f;
}

// Zeroes what was not selected: above the threshold all stay, and at it those up to the index tie_stop.
void keep_largest(const Selection &selection, std::int64_t begin, int n, float *values) {
    const auto threshold = static_cast<float>(selection.threshold);  // exact: it is one of the magnitudes, or infinite
    const int n_ties = static_cast<int>(std::clamp<std::int64_t>(selection.tie_stop - begin, 0, n));
    keep_at_least(values, threshold, n_ties);
    keep_above(values + n_ties, threshold, n - n_ties);
}

// Keeps an element with probability `share`, decided by (key, flat index) alone.
FUSECHAT_CLONES void keep_randomly(float *values, std::uint64_t key, std::int64_t begin, double share, int n) {
    const auto limit = static_cast<std::uint64_t>(share * 0x1p32);
    for (int i = 0; i < n; ++i) {
        // The finaliser of SplitMix64 over a Weyl sequence.
        std::uint64_t x = key + static_cast<std::uint64_t>(begin + i) * 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        values[i] = (x ^ x >> 31) >> 32 < limit ? values[i] : 0.0f;
    }
}

struct Lanes {
    const float *base;
    float *deltas;  // [target][kTile]; what does not reach the sum is zeroed when `write_back`
    const double *weights, *factors;  // factors: the weights of the deltas as they are, over DARE's density
    int n_targets, n;
    std::int64_t begin, tie_stop;
    double threshold, below;  // below: the number before it, which ties exceed
    double least_share, scale;
    bool write_back;
    float *merged;
};

struct Sums {
    double update_energy;
    std::int64_t n_touched, n_conflicts;
};

// Everything from the deltas to the merged value, lanes at a time. The arithmetic is in double: near cancellation the
// sign of a sum decides between two different updates, and a sum that should lie halfway between two 16-bit values must
// not miss the tie.
// kTargets: their number, held in registers, or 0 for any.
template <bool kSelect, Elect kElect, bool kDivide, int kTargets>
FUSECHAT_INLINE void combine_lanes(const Lanes &lanes, Sums *sums) {
    const int n_targets = kTargets > 0 ? kTargets : lanes.n_targets;
    constexpr bool elects = kElect != Elect::none;
    Doubles energy{};
    Longs touched{}, conflicts{};
    const Longs sign_bit = Longs{} + INT64_MIN, first_lanes = {0, 1, 2, 3};
    const Doubles zero{}, one = zero + 1.0, least = zero + lanes.least_share;
    const Doubles count = zero + static_cast<double>(n_targets), threshold = zero + lanes.threshold;
    const Doubles below = zero + lanes.below;
    for (int i = 0; i < lanes.n; i += kLanes) {
        Doubles vote{}, spread{}, squares{};
        Doubles held[kTargets > 0 ? kTargets : 1];
        const Doubles first = widened(lanes.deltas + i);
        for (int j = 0; j < n_targets; ++j) {
            const Doubles delta = widened(lanes.deltas + static_cast<std::size_t>(j) * kTile + i);
            if constexpr (kTargets > 0) held[j] = delta;
            if constexpr (kElect == Elect::plain) vote += delta;
            if constexpr (kElect == Elect::weighted) vote += lanes.factors[j] * delta;
            if constexpr (kSelect) {  // as variance_keys
                const Doubles difference = delta - first;
                spread += difference;
                squares += difference * difference;
            }
        }
        Doubles selected{};  // 1 or 0
        if constexpr (kSelect) {
            const Doubles key = count * squares - spread * spread;
            const Longs exceeds = key > choose(first_lanes + (lanes.begin + i) < lanes.tie_stop, below, threshold);
            selected = where(exceeds, one);
        }
        const Longs flip = (vote < 0.0) & sign_bit;  // a sum of zero elects plus
        Doubles sum{}, share{}, agreed{};
        for (int j = 0; j < n_targets; ++j) {
            float *place = lanes.deltas + static_cast<std::size_t>(j) * kTile + i;
            Doubles kept;
            if constexpr (kTargets > 0) {
                kept = held[j];
            } else {
                kept = widened(place);
            }
            const Doubles weight = zero + lanes.weights[j];
            if constexpr (kElect == Elect::plain) {
                kept = where((Doubles)((Longs)kept ^ flip) > 0.0, kept);
                agreed += kept;
            }
            if constexpr (kElect == Elect::weighted) {
                const Doubles weighted = lanes.factors[j] * kept;
                kept = where((Doubles)((Longs)weighted ^ flip) > 0.0, kept);
                agreed += lanes.factors[j] * kept;
            }
            if (lanes.write_back) {
                if constexpr (kSelect) kept *= selected;
                store(place, __builtin_convertvector(kept, Floats));
            }
            sum += lanes.factors[j] * kept;
            if constexpr (kDivide) share += where(kept != 0.0, weight);
        }
        if constexpr (kDivide) {
            const Doubles bounded = choose(share < least, least, share);
            sum /= choose(bounded == 0.0, one, bounded);
        }
        Doubles update = lanes.scale * sum;
        if constexpr (kSelect) {
            update *= selected;
            vote *= selected;
            agreed *= selected;
        }
        energy += update * update;
        touched -= update != 0.0;
        // Sums over the same terms in the same order differ only where a term was dropped.
        if constexpr (elects) conflicts -= agreed != vote;
        store(lanes.merged + i, __builtin_convertvector(widened(lanes.base + i) + update, Floats));
    }
    *sums = {add_lanes(energy), add_lanes(touched), add_lanes(conflicts)};
}

template <bool kSelect, Elect kElect, bool kDivide>
FUSECHAT_INLINE void combine_any(const Lanes &lanes, Sums *sums) {
    switch (lanes.n_targets) {
        case 2: return combine_lanes<kSelect, kElect, kDivide, 2>(lanes, sums);
        case 3: return combine_lanes<kSelect, kElect, kDivide, 3>(lanes, sums);
        case 4: return combine_lanes<kSelect, kElect, kDivide, 4>(lanes, sums);
        case 5: return combine_lanes<kSelect, kElect, kDivide, 5>(lanes, sums);
        default: return combine_lanes<kSelect, kElect, kDivide, 0>(lanes, sums);
    }
}

// One function, so that the dispatch to an instruction set is one, too; `select` comes with plain votes only.
FUSECHAT_CLONES void combine_all(const Lanes &lanes, bool select, Elect elect, bool divide, Sums *sums) {
    if (select && divide) return combine_any<true, Elect::plain, true>(lanes, sums);
    if (select) return combine_any<true, Elect::plain, false>(lanes, sums);
    switch (elect) {
        case Elect::none: return combine_any<false, Elect::none, false>(lanes, sums);
        case Elect::plain:
            return divide ? combine_any<false, Elect::plain, true>(lanes, sums)
                          : combine_any<false, Elect::plain, false>(lanes, sums);
        case Elect::weighted:
            return divide ? combine_any<false, Elect::weighted, true>(lanes, sums)
                          : combine_any<false, Elect::weighted, false>(lanes, sums);
    }
}

// The update Σ delta³ / Σ delta² of weights delta² / Σ delta², element by element.
FUSECHAT_CLONES void combine_by_parameter(const Lanes &lanes, Sums *sums) {
    Doubles energy{};
    Longs touched{};
    for (int i = 0; i < lanes.n; i += kLanes) {
        Doubles cubes{}, squares{};
        for (int j = 0; j < lanes.n_targets; ++j) {
            const Doubles delta = widened(lanes.deltas + static_cast<std::size_t>(j) * kTile + i);
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

// The masks that are each target's own.
void mask_each(const Rule &rule, const std::vector<Selection> &selections, std::int64_t begin, int n, Scratch &scratch) {
    for (std::size_t j = 0; j < rule.weights.size(); ++j) {
        float *delta = scratch.delta(static_cast<int>(j));
        if (rule.mask == Mask::each) {
            keep_largest(selections[j], begin, n, delta);
        } else if (rule.mask == Mask::random && rule.keep_share[j] < 1) {
            keep_randomly(delta, rule.random_key[j], begin, rule.keep_share[j], n);
        }
    }
}

// Adds Σ delta² of every target.
void add_energies(Scratch &scratch, int n, std::vector<double> &sums) {
    for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += energy(scratch.delta(static_cast<int>(j)), pad(n));
}

void merge_lanes(const Rule &rule, const Selection *selection, std::int64_t begin, int n, Scratch &scratch, bool measured,
                 unsigned char *out, Outcome &outcome) {
    alignas(64) float merged[kTile];
    const Lanes lanes{
        .base = scratch.base(),
        .deltas = scratch.delta(0),
        .weights = rule.weights.data(),
        .factors = rule.factors.data(),
        .n_targets = static_cast<int>(rule.weights.size()),
        .n = pad(n),
        .begin = begin,
        .tie_stop = selection ? selection->tie_stop : 0,
        .threshold = selection ? selection->threshold : 0,
        .below = selection ? std::nextafter(selection->threshold, -HUGE_VAL) : 0,
        .least_share = rule.divide == Divide::clamped ? 1e-6 : -HUGE_VAL,
        .scale = rule.scale,
        .write_back = measured,
        .merged = merged,
    };
    Sums sums;
    if (rule.per_parameter) {
        combine_by_parameter(lanes, &sums);
    } else {
        combine_all(lanes, selection != nullptr, rule.elect, rule.divide != Divide::none, &sums);
    }
    if (measured) add_energies(scratch, n, outcome.kept_energy);
    outcome.update_energy += sums.update_energy;
    outcome.n_touched += sums.n_touched;
    outcome.n_conflicts += sums.n_conflicts;
    outcome.n_overflow += narrow(merged, scratch.base(), rule.out_dtype, out, n);
}

}  // namespace

void Rule::set_factors() {
    factors = weights;
    for (std::size_t j = 0; j < keep_share.size(); ++j) factors[j] /= keep_share[j];
}

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
    merge_lanes(rule, select ? &selections[0] : nullptr, begin, n, scratch, measured, out, outcome);
}

void combine_selected(const Rule &rule, int n, Scratch &scratch, bool measured, unsigned char *out, Outcome &outcome) {
    merge_lanes(rule, nullptr, 0, n, scratch, measured, out, outcome);
}

}  // namespace fusechat::merge
