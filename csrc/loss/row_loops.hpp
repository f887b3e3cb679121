// The loops over a row of float, BFloat16 or Float16 logits, each compiled for several instruction sets: one reads the logits and
// keeps their exponentials, one writes the gradient, one only sums.
#pragma once

#include <cstdint>
#include <vector>

#include "vectors.hpp"

namespace fusechat::loss {

// It stays in the L1 cache from its conversion to its exponentials, and is half a page off whole pages: see docs/kernels.md.
constexpr std::int64_t kBlock = 1536;

// How far an exponent may lie above 0 before the exponentials so far are rescaled: e^16 leaves fp32 room for sums.
constexpr float kSlack = 16.0F;

// Coefficients that a pair of the widest vectors holds, and so the most cells whose tokens the loops tell apart.
constexpr int kCoefficients = 32;

constexpr std::int64_t padded(std::int64_t n) { return (n + kMostLanes - 1) / kMostLanes * kMostLanes; }

struct ScanOptions {
    float softcap;      // 0: none
    float inverse_tau;  // of the student's temperature in the soft term
    bool wants_hard;    // whether exp(z − shift) is wanted beside exp((z − shift) / τ)
    bool wants_sums;    // whether the sum of logits is wanted
};

// A row's exponentials e_j = exp((z_j − shift) / τ), 0 at the holes, which are the tokens summed apart from the others.
struct RowScratch {
    explicit RowScratch(std::int64_t vocabulary, const ScanOptions &options)
        : e_hard(options.wants_hard ? padded(vocabulary) : 0),
          slope(options.softcap != 0.0F ? padded(vocabulary) : 0),
          holes((vocabulary + 63) / 64) {}

    float *e = nullptr;  // [n]: the gradient's own memory where that is of fp32, and then maybe the logits', else the caller's
    std::vector<float> e_hard;
    std::vector<float> slope;          // derivative of the softcap
    std::vector<std::uint64_t> holes;  // one bit a token
    float shift = 0;                   // within the slack of the maximum of the tokens that are no holes
    float top = 0;                     // that maximum
    double sum = 0;                    // Σ e_j over the tail
    double sum_hard = 0;               // the same at τ = 1, if wanted
    double sum_z = 0;                  // Σ (z_j − shift) over the tokens that are neither holes nor ruled out, if wanted
    std::int64_t n_finite = 0;         // how many those are, if wanted
    std::vector<std::int64_t> ruled_out;  // the tokens that are no holes and have a logit of −∞, if sums are wanted

    bool is_hole(std::int64_t token) const { return holes[token / 64] >> (token % 64) & 1U; }
    void set_hole(std::int64_t token) { holes[token / 64] |= std::uint64_t{1} << (token % 64); }
    void clear_hole(std::int64_t token) { holes[token / 64] &= ~(std::uint64_t{1} << (token % 64)); }
};

// Where `cell_of` is given, the tail is the tokens whose cell is 0; the others' exponentials are kept, and not summed.
template <class T>
void scan_row(const T *logits, std::int64_t n, const ScanOptions &options, const std::uint8_t *cell_of, RowScratch &row);

// Logits whose maximum is kept for the choice of the k largest.
constexpr std::int64_t kGroup = 128;

// log Σ exp(z_j), and the maximum of every group of kGroup logits.
template <class T>
double logsumexp_row(const T *logits, std::int64_t n, float softcap, float *maxima);

// The maximum of n elements, a multiple of kMostLanes.
float max_cell(const float *z, std::int64_t n);

// e_j = exp((z_j − shift) · inverse_tau) over n elements, a multiple of kMostLanes; returns Σ e.
double exp_cell(const float *z, std::int64_t n, float shift, float inverse_tau, float *e);

// The logit after the softcap, and the softcap's derivative there.
float softcap_one(float z, float cap);

// What a row's gradient is made of: (soft[cell] · e + hard · exp(z − shift) + offset) · slope.
struct DenseGradient {
    float soft[kCoefficients] = {};  // by cell where the tokens have one, else the first for all
    std::size_t n_cells = 1;         // with the tail
    float hard = 0;
    float offset = 0;
};

template <class T>
void write_row(const RowScratch &row, const DenseGradient &dense, const std::uint8_t *cell_of, std::int64_t n, T *gradient);

}  // namespace fusechat::loss
