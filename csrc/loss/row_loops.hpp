// The two loops over a row of logits, each compiled for several instruction sets: one reads the logits and keeps their
// exponentials, one writes the gradient. Scratch rows have `padded(n)` elements.
#pragma once

#include <cstdint>
#include <vector>

#include "vectors.hpp"

namespace fusechat::loss {

// A block of logits stays in the L1 cache from its conversion to its exponentials.
constexpr std::int64_t kBlock = 2048;

constexpr std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct ScanOptions {
    float softcap;      // 0: none
    float inverse_tau;  // of the student's temperature in the soft term
    bool wants_hard;    // whether exp(z − shift) is wanted beside exp((z − shift) / τ)
    bool wants_sums;    // whether the sums of logits are wanted
    bool skip_holes;    // whether the maximum is that of the other tokens
};

// A row's exponentials, block by block: e_j = exp((z_j − shift[j / kBlock]) / τ), 0 at the holes, which are the cells' tokens.
struct RowScratch {
    explicit RowScratch(std::int64_t vocabulary, const ScanOptions &options)
        : e(padded(vocabulary)),
          e_hard(options.wants_hard ? padded(vocabulary) : 0),
          slope(options.softcap != 0.0F ? padded(vocabulary) : 0),
          shift((vocabulary + kBlock - 1) / kBlock),
          holes((vocabulary + 63) / 64) {}

    std::vector<float> e;
    std::vector<float> e_hard;
    std::vector<float> slope;  // derivative of the softcap
    std::vector<float> shift;
    std::vector<std::uint64_t> holes;  // one bit a token
    float top = 0;                     // the row's maximum
    double sum = 0;                    // Σ exp((z_j − top) / τ) over the tokens that are no holes
    double sum_hard = 0;               // the same at τ = 1, if wanted
    double sum_all_z = 0;              // Σ (z_j − top) over all tokens, if wanted
    double sum_rest_z = 0;             // Σ (z_j − top) over the tokens that are no holes, if wanted

    bool is_hole(std::int64_t token) const { return holes[token / 64] >> (token % 64) & 1U; }
    void set_hole(std::int64_t token) { holes[token / 64] |= std::uint64_t{1} << (token % 64); }
    void clear_hole(std::int64_t token) { holes[token / 64] &= ~(std::uint64_t{1} << (token % 64)); }
};

void scan_row(const float *logits, std::int64_t n, const ScanOptions &options, RowScratch &row);
void scan_row(const BFloat16 *logits, std::int64_t n, const ScanOptions &options, RowScratch &row);
void scan_row(const Float16 *logits, std::int64_t n, const ScanOptions &options, RowScratch &row);

// The maximum of n elements, a multiple of kLanes.
float max_cell(const float *z, std::int64_t n);

// e_j = exp((z_j − shift) · inverse_tau) over n elements, a multiple of kLanes; returns Σ e.
double exp_cell(const float *z, std::int64_t n, float shift, float inverse_tau, float *e);

// The logit after the softcap, and the softcap's derivative there.
float softcap_one(float z, float cap);

// What a row's gradient is made of, cells aside: (soft · e · exp((shift − top) / τ) + hard · exp(z − top) + offset) · slope.
struct DenseGradient {
    double soft;
    double hard;
    double offset;
};

void write_row(const RowScratch &row, const DenseGradient &dense, float inverse_tau, std::int64_t n, float *gradient);
void write_row(const RowScratch &row, const DenseGradient &dense, float inverse_tau, std::int64_t n, BFloat16 *gradient);
void write_row(const RowScratch &row, const DenseGradient &dense, float inverse_tau, std::int64_t n, Float16 *gradient);

}  // namespace fusechat::loss
