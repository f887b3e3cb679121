#include "merge/combine.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "merge/keys.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

FUSECHAT_CLONES void at_least(const double *keys, double threshold, int n, float *mask) {
    for (int i = 0; i < n; ++i) mask[i] = keys[i] >= threshold ? 1.0f : 0.0f;
}

FUSECHAT_CLONES void above(const double *keys, double threshold, int n, float *mask) {
    for (int i = 0; i < n; ++i) mask[i] = keys[i] > threshold ? 1.0f : 0.0f;
}

// Turns keys into a mask of ones and zeros: selected above the threshold, and at it up to the index tie_stop.
void mask_from_keys(const Selection &selection, std::int64_t begin, int n, const double *keys, float *mask) {
    const int n_ties = static_cast<int>(std::clamp<std::int64_t>(selection.tie_stop - begin, 0, n));
    at_least(keys, selection.threshold, n_ties, mask);
    above(keys + n_ties, selection.threshold, n - n_ties, mask + n_ties);
}

FUSECHAT_CLONES void multiply(float *__restrict values, const float *__restrict factors, int n) {
    for (int i = 0; i < n; ++i) values[i] = factors[i] != 0.0f ? values[i] : 0.0f;
}

// Keeps an element with probability `share`, decided by (key, flat index) alone, and divides what is kept by `share`.
FUSECHAT_CLONES void keep_randomly(float *values, std::uint64_t key, std::int64_t begin, double share, int n) {
    const auto limit = static_cast<std::uint64_t>(share * 0x1p32);
    const auto rescale = static_cast<float>(1.0 / share);
    for (int i = 0; i < n; ++i) {
        // The finaliser of SplitMix64 over a Weyl sequence.
        std::uint64_t x = key + static_cast<std::uint64_t>(begin + i) * 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        values[i] = (x ^ x >> 31) >> 32 < limit ? values[i] * rescale : 0.0f;
    }
}

// The arithmetic after the task vectors is in double: near cancellation the sign of a sum decides between two different
// updates, and a sum that should lie halfway between two 16-bit values must not miss the tie.

// sign[i] = +1 where the (weighted) deltas sum to at least zero, else −1.
FUSECHAT_CLONES void elect_signs(const float *deltas, const double *weights, int n_targets, int n, float *sign) {
    for (int i = 0; i < n; i += kLanes) {
        Doubles sum{};
        for (int j = 0; j < n_targets; ++j) sum += weights[j] * widened(deltas + static_cast<std::size_t>(j) * kTile + i);
        const Doubles one = sum * 0.0 + 1.0;
        const Doubles chosen = sum >= 0.0 ? one : -one;
        store(sign + i, __builtin_convertvector(chosen, Floats));
    }
}

// Drops the deltas whose weighted sign is not the elected one; counts how many moved and how many were dropped.
FUSECHAT_CLONES void erase_minority(float *__restrict delta, const float *__restrict sign, float weight_sign, int n,
                                    std::int32_t *counts) {
    std::int32_t moved = 0, kept = 0;
    for (int i = 0; i < n; ++i) {
        const float aligned = delta[i] * sign[i] * weight_sign;
        moved += delta[i] != 0.0f;
        kept += aligned > 0.0f;
        delta[i] = aligned > 0.0f ? delta[i] : 0.0f;
    }
    counts[0] = moved;
    counts[1] = moved - kept;
}

FUSECHAT_CLONES void add_weighted(const float *__restrict delta, double weight, int n, double *__restrict sum) {
    for (int i = 0; i < n; ++i) sum[i] += weight * static_cast<double>(delta[i]);
}

FUSECHAT_CLONES void add_share(const float *__restrict delta, double weight, int n, double *__restrict share) {
    for (int i = 0; i < n; ++i) share[i] += delta[i] != 0.0f ? weight : 0.0;
}

// sum /= share, where a share below `least` counts as `least`, and one of zero as one.
FUSECHAT_CLONES void divide(double *__restrict sum, const double *__restrict share, double least, int n) {
    for (int i = 0; i < n; ++i) {
        const double bounded = share[i] < least ? least : share[i];
        sum[i] /= bounded == 0.0 ? 1.0 : bounded;
    }
}

// Element by element Σ delta³ / Σ delta², the update under weights delta² / Σ delta².
FUSECHAT_CLONES void weigh_by_parameter(const float *deltas, int n_targets, int n, double *sum) {
    for (int i = 0; i < n; i += kLanes) {
        Doubles cubes{}, squares{};
        for (int j = 0; j < n_targets; ++j) {
            const Doubles delta = widened(deltas + static_cast<std::size_t>(j) * kTile + i);
            squares += delta * delta;
            cubes += delta * delta * delta;
        }
        const Doubles zero{};
        store(sum + i, squares > 0.0 ? cubes / squares : zero);
    }
}

// merged = base + scale · sum; returns Σ update² and counts the updates that are not zero.
FUSECHAT_CLONES double finish(const float *base, const double *sum, double scale, int n, float *merged,
                              std::int64_t *touched) {
    std::int32_t nonzero = 0;
    for (int i = 0; i < n; ++i) {
        nonzero += scale * sum[i] != 0.0;
        merged[i] = static_cast<float>(static_cast<double>(base[i]) + scale * sum[i]);
    }
    *touched += nonzero;
    Doubles energy{};
    for (int i = 0; i < n; i += kLanes) {
        Doubles update;
        load(update, sum + i);
        energy += (scale * update) * (scale * update);
    }
    return add_lanes(energy);
}

void apply_mask(const Rule &rule, const std::vector<Selection> &selections, std::int64_t begin, int n, Scratch &scratch) {
    const int n_targets = static_cast<int>(rule.weights.size());
    double keys[kTile];
    float mask[kTile];
    if (rule.mask == Mask::shared) {
        variance_keys(scratch.delta(0), n_targets, n, keys);
        mask_from_keys(selections[0], begin, n, keys, mask);
        for (int j = 0; j < n_targets; ++j) multiply(scratch.delta(j), mask, n);
    }
    for (int j = 0; rule.mask == Mask::each && j < n_targets; ++j) {
        magnitude_keys(scratch.delta(j), n, keys);
        mask_from_keys(selections[j], begin, n, keys, mask);
        multiply(scratch.delta(j), mask, n);
    }
    for (int j = 0; rule.mask == Mask::random && j < n_targets; ++j) {
        if (rule.keep_share[j] < 1) keep_randomly(scratch.delta(j), rule.random_key[j], begin, rule.keep_share[j], n);
    }
}

}  // namespace

void Outcome::add(const Outcome &other) {
    kept_energy.resize(std::max(kept_energy.size(), other.kept_energy.size()), 0.0);
    for (std::size_t j = 0; j < other.kept_energy.size(); ++j) kept_energy[j] += other.kept_energy[j];
    update_energy += other.update_energy;
    n_moved += other.n_moved;
    n_erased += other.n_erased;
    n_touched += other.n_touched;
    n_overflow += other.n_overflow;
}

void combine_tile(const Rule &rule, const std::vector<Selection> &selections, std::int64_t begin, int n, Scratch &scratch,
                  unsigned char *out, Outcome &outcome) {
    const int n_targets = static_cast<int>(rule.weights.size());
    if (!rule.mask_weights_only) apply_mask(rule, selections, begin, n, scratch);
    if (rule.elect != Elect::none) {
        std::vector<double> votes(rule.weights);
        if (rule.elect == Elect::plain) std::fill(votes.begin(), votes.end(), 1.0);
        alignas(64) float sign[kTile];
        elect_signs(scratch.delta(0), votes.data(), n_targets, pad(n), sign);
        for (int j = 0; j < n_targets; ++j) {
            std::int32_t counts[2];
            const float weight_sign = votes[j] > 0 ? 1.0f : votes[j] < 0 ? -1.0f : 0.0f;
            erase_minority(scratch.delta(j), sign, weight_sign, n, counts);
            outcome.n_moved += counts[0];
            outcome.n_erased += counts[1];
        }
    }
    for (int j = 0; j < n_targets; ++j) outcome.kept_energy[j] += energy(scratch.delta(j), pad(n));
    alignas(64) double sum[kTile], share[kTile];
    std::fill(sum, sum + pad(n), 0.0);
    if (rule.per_parameter) {
        weigh_by_parameter(scratch.delta(0), n_targets, pad(n), sum);
    } else {
        for (int j = 0; j < n_targets; ++j) add_weighted(scratch.delta(j), rule.weights[j], n, sum);
    }
    if (rule.divide != Divide::none) {
        std::fill(share, share + n, 0.0);
        for (int j = 0; j < n_targets; ++j) add_share(scratch.delta(j), rule.weights[j], n, share);
        divide(sum, share, rule.divide == Divide::clamped ? 1e-6 : -HUGE_VAL, n);
    }
    float merged[kTile];
    outcome.update_energy += finish(scratch.base(), sum, rule.scale, n, merged, &outcome.n_touched);
    outcome.n_overflow += narrow(merged, scratch.base(), rule.out_dtype, out, n);
}

}  // namespace fusechat::merge
