// The inner loops of selection: keys and sums over one tile. Tiles are padded to whole lanes; padding has the key −1,
// which nothing selects.
#pragma once

#include <cstdint>

namespace fusechat::merge {

// keys[i] = J Σ delta² − (Σ delta)² = J² · population variance, exactly 0 where all targets agree. deltas: [J][kTile].
void variance_keys(const float *deltas, int n_targets, int n, double *keys);

// keys[i] = |delta[i]|.
void magnitude_keys(const float *delta, int n, double *keys);

struct KeyCounts {
    std::int64_t above, inside, nonzero;  // key >= high; low <= key < high; key > 0
};
KeyCounts count_keys(const double *keys, int n, double low, double high);

// Writes the indices with low <= key < high to `at`, ascending; returns how many.
int find_inside(const double *keys, int n, double low, double high, std::int32_t *at);

// above += Σ delta² where key >= high; total += Σ delta².
void add_energy(const float *delta, const double *keys, int n, double high, double &above, double &total);

// Σ delta².
double energy(const float *delta, int n);

// Σ a·b.
double dot(const float *a, const float *b, int n);

}  // namespace fusechat::merge
