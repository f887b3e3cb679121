#include "merge/keys.hpp"

#include <algorithm>
#include <cmath>

#include "merge/inputs.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

FUSECHAT_INLINE Doubles where(const Longs &mask, const Doubles &value) {
    return (Doubles)(mask & (Longs)value);
}

// Differences to the first target rather than to the base: the variance is the same, and where all targets agree every
// term is exactly zero.
FUSECHAT_CLONES void variance_lanes(const float *deltas, int n_targets, int n, double *keys) {
    const double count = n_targets;
    for (int i = 0; i < n; i += kLanes) {
        const Doubles first = widened(deltas + i);
        Doubles sum{}, squares{};
        for (int j = 1; j < n_targets; ++j) {
            const Doubles difference = widened(deltas + static_cast<std::size_t>(j) * kTile + i) - first;
            sum += difference;
            squares += difference * difference;
        }
        const Doubles key = count * squares - sum * sum;
        store(keys + i, where(key > 0.0, key));
    }
}

FUSECHAT_CLONES void magnitude_lanes(const float *delta, int n, double *keys) {
    for (int i = 0; i < n; ++i) keys[i] = std::fabs(static_cast<double>(delta[i]));
}

FUSECHAT_CLONES void count_lanes(const double *keys, int n, double low, double high, std::int64_t *counts) {
    Longs above{}, from_low{}, nonzero{};
    for (int i = 0; i < n; i += kLanes) {
        Doubles key;
        load(key, keys + i);
        above -= key >= high;  // a true lane is −1
        from_low -= key >= low;
        nonzero -= key > 0.0;
    }
    counts[0] = add_lanes(above);
    counts[1] = add_lanes(from_low);
    counts[2] = add_lanes(nonzero);
}

FUSECHAT_CLONES void energy_lanes(const float *delta, const double *keys, int n, double high, double *sums) {
    Doubles above{}, total{};
    for (int i = 0; i < n; i += kLanes) {
        Doubles key;
        load(key, keys + i);
        const Doubles value = widened(delta + i), square = value * value;
        total += square;
        above += where(key >= high, square);
    }
    sums[0] = add_lanes(above);
    sums[1] = add_lanes(total);
}

FUSECHAT_CLONES double energy_all(const float *delta, int n) {
    Doubles total{};
    for (int i = 0; i < n; i += kLanes) {
        const Doubles value = widened(delta + i);
        total += value * value;
    }
    return add_lanes(total);
}

FUSECHAT_CLONES double dot_lanes(const float *a, const float *b, int n) {
    Doubles total{};
    for (int i = 0; i < n; i += kLanes) total += widened(a + i) * widened(b + i);
    return add_lanes(total);
}

FUSECHAT_CLONES int find_lanes(const double *keys, int n, double low, double high, std::int32_t *at) {
    int found = 0;
    for (int i = 0; i < n; i += kLanes) {
        Longs inside{};
        Doubles key;
        load(key, keys + i);
        inside = (key >= low) & (key < high);
        std::int64_t any = 0;
        for (int lane = 0; lane < kLanes; ++lane) any |= inside[lane];
        if (any == 0) continue;
        for (int lane = 0; lane < kLanes; ++lane) {
            at[found] = i + lane;
            found += inside[lane] != 0;
        }
    }
    return found;
}

int pad_keys(int n, double *keys) {
    const int padded = pad(n);
    std::fill(keys + n, keys + padded, -1.0);
    return padded;
}

}  // namespace

void variance_keys(const float *deltas, int n_targets, int n, double *keys) {
    variance_lanes(deltas, n_targets, pad(n), keys);
    pad_keys(n, keys);
}

void magnitude_keys(const float *delta, int n, double *keys) {
    magnitude_lanes(delta, n, keys);
    pad_keys(n, keys);
}

KeyCounts count_keys(const double *keys, int n, double low, double high) {
    std::int64_t counts[3];
    count_lanes(keys, n, low, high, counts);
    return {counts[0], counts[1] - counts[0], counts[2]};
}

int find_inside(const double *keys, int n, double low, double high, std::int32_t *at) {
    return find_lanes(keys, pad(n), low, high, at);
}

void add_energy(const float *delta, const double *keys, int n, double high, double &above, double &total) {
    double sums[2];
    energy_lanes(delta, keys, n, high, sums);
    above += sums[0];
    total += sums[1];
}

double energy(const float *delta, int n) { return energy_all(delta, n); }

double dot(const float *a, const float *b, int n) { return dot_lanes(a, b, n); }

}  // namespace fusechat::merge
