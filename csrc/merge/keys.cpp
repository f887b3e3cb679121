#include "merge/keys.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "merge/inputs.hpp"
#include "merge/lanes.hpp"

namespace fusechat::merge {
namespace {

// Differences to the first target rather than to the base: the variance is the same, and where all targets agree every
// term is exactly zero.
FUSECHAT_CLONES void variance_lanes(const double *deltas, int n_targets, int n, double *keys) {
    const double count = n_targets;
    for (int i = 0; i < n; i += kLanes) {
        const Doubles first = loaded(deltas + i);
        Doubles sum{}, squares{};
        for (int j = 1; j < n_targets; ++j) {
            const Doubles difference = loaded(deltas + static_cast<std::size_t>(j) * kTile + i) - first;
            sum += difference;
            squares += difference * difference;
        }
        const Doubles key = count * squares - sum * sum;
        store(keys + i, where(key > 0.0, key));
    }
}

FUSECHAT_CLONES void magnitude_lanes(const double *delta, int n, double *keys) {
    for (int i = 0; i < n; ++i) keys[i] = std::fabs(delta[i]);
}

FUSECHAT_CLONES void count_lanes(const double *keys, int n, double low, double high, std::int64_t *counts) {
    Longs above{}, from_low{}, nonzero{};
    for (int i = 0; i < n; i += kLanes) {
        const Doubles key = loaded(keys + i);
        above -= key >= high;  // a true lane is −1
        from_low -= key >= low;
        nonzero -= key > 0.0;
    }
    counts[0] = add_lanes(above);
    counts[1] = add_lanes(from_low);
    counts[2] = add_lanes(nonzero);
}

FUSECHAT_CLONES double energy_lanes(const double *delta, const double *keys, int n, double high) {
    Doubles above{};
    for (int i = 0; i < n; i += kLanes) {
        const Doubles value = loaded(delta + i);
        above += where(loaded(keys + i) >= high, value * value);
    }
    return add_lanes(above);
}

FUSECHAT_CLONES double energy_all(const double *delta, int n) {
    Doubles total{};
    for (int i = 0; i < n; i += kLanes) total += loaded(delta + i) * loaded(delta + i);
    return add_lanes(total);
}

FUSECHAT_CLONES double base_energy(const float *base, int n) {
    Doubles total{};
    for (int i = 0; i < n; i += kLanes) total += widened(base + i) * widened(base + i);
    return add_lanes(total);
}

FUSECHAT_CLONES double dot_lanes(const float *base, const double *delta, int n) {
    Doubles total{};
    for (int i = 0; i < n; i += kLanes) total += widened(base + i) * loaded(delta + i);
    return add_lanes(total);
}

FUSECHAT_CLONES void flag_inside(const double *__restrict keys, int n, double low, double high,
                                 std::uint8_t *__restrict flags) {
    for (int i = 0; i < n; ++i) flags[i] = (keys[i] >= low) & (keys[i] < high);
}

int pad_keys(int n, double *keys) {
    const int padded = pad(n);
    std::fill(keys + n, keys + padded, -1.0);
    return padded;
}

}  // namespace

void variance_keys(const double *deltas, int n_targets, int n, double *keys) {
    variance_lanes(deltas, n_targets, pad(n), keys);
    pad_keys(n, keys);
}

void magnitude_keys(const double *delta, int n, double *keys) {
    magnitude_lanes(delta, n, keys);
    pad_keys(n, keys);
}

KeyCounts count_keys(const double *keys, int n, double low, double high) {
    std::int64_t counts[3];
    count_lanes(keys, n, low, high, counts);
    return {counts[0], counts[1] - counts[0], counts[2]};
}

int find_inside(const double *keys, int n, double low, double high, std::int32_t *at) {
    alignas(8) std::uint8_t flags[kTile];
    flag_inside(keys, pad(n), low, high, flags);
    int found = 0;
    for (int i = 0; i < n; i += 8) {
        std::uint64_t group;
        std::memcpy(&group, flags + i, 8);
        for (; group != 0; group &= group - 1) at[found++] = i + std::countr_zero(group) / 8;
    }
    return found;
}

double energy_above(const double *delta, const double *keys, int n, double high) {
    return energy_lanes(delta, keys, n, high);
}

double energy(const double *delta, int n) { return energy_all(delta, n); }

double dot(const float *base, const double *delta, int n) { return dot_lanes(base, delta, n); }

double energy(const float *base, int n) { return base_energy(base, n); }

}  // namespace fusechat::merge
