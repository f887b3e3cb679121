// The inner loops of selection: keys and sums over one tile. Tiles are padded to whole lanes; padding has the key −1,
// which nothing selects.
#pragma once

#include <cstdint>

namespace fusechat::merge {

// keys[i] = J Σ delta² − (Σ delta)² = J² · population variance, exactly 0 where all targets agree. deltas: [J][kTile].
void variance_keys(const double *deltas, int n_targets, int n, double *keys);

// keys[i] = |delta[i]|.
void magnitude_keys(const double *delta, int n, double *keys);

struct KeyCounts {
    std::int64_t above, inside, nonzero;  // key >= high; low <= key < high; key > 0
};
KeyCounts count_keys(const double *keys, int n, double low, double high);

// Writes the indices with low <= key < high to `at`, ascending; returns how many.
int find_inside(const double *keys, int n, double low, double high, std::int32_t *at);

// Σ delta² where key >= high.
double energy_above(const double *delta, const double *keys, int n, double high);

// Σ delta².
double energy(const double *delta, int n);

// Σ base·delta, and Σ base².
double dot(const float *base, const double *delta, int n);
double energy(const float *base, int n);

}  // namespace fusechat::merge
