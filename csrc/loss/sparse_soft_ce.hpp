// λ · cross-entropy with the label + (1 − λ) · divergence from a sparse teacher, per row of logits, the gradient in place.
#pragma once

#include <cstdint>

#include "divergence.hpp"

namespace fusechat::loss {

enum class Format { float32, bfloat16, float16 };
enum class Missing { renormalise, tail, zero, uniform };

constexpr std::int64_t kIgnoreLabel = -100;

struct Options {
    Divergence divergence;
    Missing missing;
    double temperature;
    double student_temperature;
    double beta;
    double label_smoothing;
    double z_loss;
    double softcap;  // 0: none
};

// Logits and where their gradient goes: a null gradient means that none is wanted, it may be the logits themselves.
struct Matrix {
    const void *logits;
    std::int64_t logits_stride;  // elements from one row to the next
    void *gradient;
    std::int64_t gradient_stride;
    std::int64_t n_rows;
    std::int64_t vocabulary;
    Format format;
};

// The row-wise inputs. An entry with high > low is the cell of tokens order[low], …, order[high − 1] that lie in no smaller cell
// of the row; else it is the single token ids[entry], absent when that is negative. Equal entries add up.
struct Rows {
    const std::int64_t *labels;
    const std::int64_t *ids;
    const float *logprobs;
    const float *hard_weight;
    const float *row_scale;
    const bool *partition;
    std::int64_t n_entries;
    const std::int32_t *order;  // null when no row has ranges, else a permutation of the vocabulary
    const std::int32_t *rank;   // its inverse
    const std::int32_t *low;
    const std::int32_t *high;
};

struct Results {
    float *loss;
    float *hard;
    float *soft;
    float *lse;
    bool *correct;
};

// Throws std::invalid_argument naming the row when a label, an id or a range lies outside the vocabulary, or
// `order` is no permutation; nothing is written then. `rows.rank` is filled here.
void sparse_soft_ce(const Matrix &matrix, const Rows &rows, const Options &options, const Results &results, int threads);

}  // namespace fusechat::loss
