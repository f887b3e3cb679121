// The inner loops of selection: keys and sums over one tile. Tiles are padded to whole lanes; padding has the key −1,
// which nothing selects. Variances are doubles, magnitudes fp32: each is exact in its own.
#pragma once

#include <cstdint>

namespace fusechat::merge {

// keys[i] = J Σ delta² − (Σ delta)² = J² · population variance, exactly 0 where all targets agree. deltas: [J][kTile].
void variance_keys(const float *deltas, int n_targets, int n, double *keys);

// The elements whose variance key may be `low` or above, ascending, to `at`; returns how many. Their keys are computed in
// fp32 here, and whatever its rounding leaves open counts as one. Adds to `n_nonzero` the elements of non-zero key.
int find_candidates(const float *deltas, int n_targets, int n, double low, std::int32_t *at, std::int64_t &n_nonzero);

// packed[i] = values[at[i]] for n items, padded with zeros.
void gather(const float *values, const std::int32_t *at, int n, float *packed);

// keys[i] = |delta[i]|.
void magnitude_keys(const float *delta, int n, float *keys);

struct KeyCounts {
    std::int64_t above, inside, nonzero;  // key >= high; low <= key < high; key > 0
};

template <class T>
KeyCounts count_keys(const T *keys, int padded, T low, T high);

// Writes the indices with low <= key < high to `at`, ascending; returns how many.
template <class T>
int find_inside(const T *keys, int padded, T low, T high, std::int32_t *at);

// variance_keys, and per target Σ delta² where key >= high, added to `energies`.
void variance_keys(const float *deltas, int n_targets, int n, double high, double *keys, double *energies);

// Σ delta².
double energy(const float *delta, int padded);

// Σ base·delta.
double dot(const float *base, const float *delta, int padded);

}  // namespace fusechat::merge
