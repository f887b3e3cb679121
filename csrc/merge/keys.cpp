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
// term is exactly zero. kTargets: their number, whose sums of delta² where the key is `high` or above stay in registers;
// or 0 for any, without sums.
template <int kTargets>
FUSECHAT_INLINE void variance_lanes(const float *deltas, int n_targets, int n, double high, double *keys, double *sums) {
    const int width = kTargets > 0 ? kTargets : n_targets;
    const double count = width;
    Doubles above[kTargets > 0 ? kTargets : 1] = {};
    for (int i = 0; i < n; i += kLanes) {
        Doubles held[kTargets > 0 ? kTargets : 1];
        const Doubles first = widened(deltas + i);
        held[0] = first;
        Doubles sum{}, squares{};
        for (int j = 1; j < width; ++j) {
            const Doubles delta = widened(deltas + static_cast<std::size_t>(j) * kTile + i);
            if constexpr (kTargets > 0) held[j] = delta;
            const Doubles difference = delta - first;
            sum += difference;
            squares += difference * difference;
        }
        const Doubles key = count * squares - sum * sum;
        store(keys + i, where(key > 0.0, key));
        for (int j = 0; j < kTargets; ++j) above[j] += where(key >= high, held[j] * held[j]);
    }
    for (int j = 0; j < kTargets; ++j) sums[j] += add_lanes(above[j]);
}

FUSECHAT_CLONES void variances(const float *deltas, int n_targets, int n, double *keys) {
    variance_lanes<0>(deltas, n_targets, n, 0, keys, nullptr);
}

FUSECHAT_CLONES void energies_above(const float *deltas, int n_targets, int n, double high, const double *keys,
                                    double *sums) {
    for (int j = 0; j < n_targets; ++j) {
        Doubles above{};
        for (int i = 0; i < n; i += kLanes) {
            const Doubles value = widened(deltas + static_cast<std::size_t>(j) * kTile + i);
            above += where(loaded(keys + i) >= high, value * value);
        }
        sums[j] += add_lanes(above);
    }
}

FUSECHAT_CLONES bool variances_and_energies(const float *deltas, int n_targets, int n, double high, double *keys,
                                            double *sums) {
    switch (n_targets) {
        case 2: variance_lanes<2>(deltas, 2, n, high, keys, sums); return true;
        case 3: variance_lanes<3>(deltas, 3, n, high, keys, sums); return true;
        case 4: variance_lanes<4>(deltas, 4, n, high, keys, sums); return true;
        case 5: variance_lanes<5>(deltas, 5, n, high, keys, sums); return true;
        default: return false;
    }
}

using Wides = float __attribute__((vector_size(4 * kPadding)));
using Words = std::int32_t __attribute__((vector_size(4 * kPadding)));

// Variance keys to fp32's precision; returns how many are exactly zero. A difference of fp32 numbers is zero where they
// are equal and nowhere else.
template <int kTargets>
FUSECHAT_INLINE int near_lanes(const float *deltas, int n_targets, int n, float *keys) {
    const int width = kTargets > 0 ? kTargets : n_targets;
    Words zeros{};
    for (int i = 0; i < n; i += kPadding) {
        Wides first, sum{}, squares{};
        load(first, deltas + i);
        Words moved{};
        for (int j = 1; j < width; ++j) {
            Wides difference;
            load(difference, deltas + static_cast<std::size_t>(j) * kTile + i);
            difference -= first;
            sum += difference;
            squares += difference * difference;
            moved |= (Words)difference;
        }
        store(keys + i, static_cast<float>(width) * squares - sum * sum);
        zeros -= (moved & INT32_MAX) == 0;  // ±0
    }
    int count = 0;
    for (int lane = 0; lane < kPadding; ++lane) count += zeros[lane];
    return count;
}

FUSECHAT_CLONES int near_variances(const float *deltas, int n_targets, int n, float *keys) {
    switch (n_targets) {
        case 2: return near_lanes<2>(deltas, 2, n, keys);
        case 3: return near_lanes<3>(deltas, 3, n, keys);
        case 4: return near_lanes<4>(deltas, 4, n, keys);
        case 5: return near_lanes<5>(deltas, 5, n, keys);
        default: return near_lanes<0>(deltas, n_targets, n, keys);
    }
}

// What a key in fp32 is at least where the exact one is `low` or above; -1 where nothing is known of it.
// With u = 2^-24 and Q = Σ d² over the differences d to the first target, the terms J Q and (Σ d)² <= J Q of a key are
// off by at most J (J + 4) u Q and 2 J (J + 2) u Q; the key itself is at least Q, for (Σ d)² <= (J - 1) Q.
float least_near(double low, int n_targets) {
    const double error = n_targets * (n_targets + 4.0) * 0x1p-22;
    const double least = low * (1 - error);
    if (error > 0.1 || least < 0x1p-100) return -1;  // below, squares may vanish
    return std::nextafter(static_cast<float>(std::min(least, 0x1p127)), 0.0f);
}

// A sum of squares that overflows may leave infinity or NaN, which is not below anything.
FUSECHAT_CLONES void flag_near(const float *__restrict keys, int n, float least, std::uint8_t *__restrict flags) {
    for (int i = 0; i < n; ++i) flags[i] = !(keys[i] < least);
}

// Writes the indices of the non-zero flags to `at`, ascending; returns how many.
int indices_of(const std::uint8_t *flags, int padded, std::int32_t *at) {
    int found = 0;
    for (int i = 0; i < padded; i += 64) {
        // The multiplication gathers the low bits of eight bytes: one loop over 64 flags mispredicts once.
        std::uint64_t mask = 0;
        for (int group = 0; group < 8 && i + 8 * group < padded; ++group) {
            std::uint64_t bytes;
            std::memcpy(&bytes, flags + i + 8 * group, 8);
            mask |= (bytes * 0x0102040810204080u >> 56) << 8 * group;
        }
        for (; mask != 0; mask &= mask - 1) at[found++] = i + std::countr_zero(mask);
    }
    return found;
}

FUSECHAT_CLONES void magnitude_lanes(const float *__restrict delta, int n, float *__restrict keys) {
    for (int i = 0; i < n; ++i) keys[i] = std::fabs(delta[i]);
}

template <class T>
FUSECHAT_INLINE void count_items(const T *__restrict keys, int n, T low, T high, int *__restrict counts) {
    int above = 0, from_low = 0, nonzero = 0;
    for (int i = 0; i < n; ++i) {
        above += keys[i] >= high;
        from_low += keys[i] >= low;
        nonzero += keys[i] > T{0};
    }
    counts[0] = above;
    counts[1] = from_low - above;
    counts[2] = nonzero;
}

template <class T>
FUSECHAT_INLINE void flag_items(const T *__restrict keys, int n, T low, T high, std::uint8_t *__restrict flags) {
    for (int i = 0; i < n; ++i) flags[i] = (keys[i] >= low) & (keys[i] < high);
}

FUSECHAT_CLONES void count(const double *keys, int n, double low, double high, int *counts) {
    count_items(keys, n, low, high, counts);
}
FUSECHAT_CLONES void count(const float *keys, int n, float low, float high, int *counts) {
    count_items(keys, n, low, high, counts);
}
FUSECHAT_CLONES void flag(const double *keys, int n, double low, double high, std::uint8_t *flags) {
    flag_items(keys, n, low, high, flags);
}
FUSECHAT_CLONES void flag(const float *keys, int n, float low, float high, std::uint8_t *flags) {
    flag_items(keys, n, low, high, flags);
}

FUSECHAT_CLONES double dot_lanes(const float *a, const float *b, int n) {
    Doubles total{};
    for (int i = 0; i < n; i += kLanes) total += widened(a + i) * widened(b + i);
    return add_lanes(total);
}

template <class T>
void pad_keys(int n, T *keys) {
    std::fill(keys + n, keys + pad(n), T{-1});
}

}  // namespace

void variance_keys(const float *deltas, int n_targets, int n, double *keys) {
    variances(deltas, n_targets, pad(n), keys);
    pad_keys(n, keys);
}

void variance_keys(const float *deltas, int n_targets, int n, double high, double *keys, double *energies) {
    if (!variances_and_energies(deltas, n_targets, pad(n), high, keys, energies)) {
        variances(deltas, n_targets, pad(n), keys);
        energies_above(deltas, n_targets, pad(n), high, keys, energies);
    }
    pad_keys(n, keys);
}

int find_candidates(const float *deltas, int n_targets, int n, double low, std::int32_t *at, std::int64_t &n_nonzero) {
    alignas(64) float keys[kTile];
    alignas(64) std::uint8_t flags[kTile];
    const int padded = pad(n);
    n_nonzero += padded - near_variances(deltas, n_targets, padded, keys);
    flag_near(keys, padded, least_near(low, n_targets), flags);
    int found = indices_of(flags, padded, at);
    while (found > 0 && at[found - 1] >= n) --found;
    return found;
}

void gather(const float *values, const std::int32_t *at, int n, float *packed) {
    for (int i = 0; i < n; ++i) packed[i] = values[at[i]];
    std::fill(packed + n, packed + pad(n), 0.0f);
}

void magnitude_keys(const float *delta, int n, float *keys) {
    magnitude_lanes(delta, n, keys);
    pad_keys(n, keys);
}

template <class T>
KeyCounts count_keys(const T *keys, int padded, T low, T high) {
    int counts[3];
    count(keys, padded, low, high, counts);
    return {counts[0], counts[1], counts[2]};
}
template KeyCounts count_keys(const double *, int, double, double);
template KeyCounts count_keys(const float *, int, float, float);

template <class T>
int find_inside(const T *keys, int padded, T low, T high, std::int32_t *at) {
    alignas(64) std::uint8_t flags[kTile];
    flag(keys, padded, low, high, flags);
    return indices_of(flags, padded, at);
}
template int find_inside(const double *, int, double, double, std::int32_t *);
template int find_inside(const float *, int, float, float, std::int32_t *);

double energy(const float *delta, int padded) { return dot_lanes(delta, delta, padded); }

double dot(const float *base, const float *delta, int padded) { return dot_lanes(base, delta, padded); }

}  // namespace fusechat::merge
