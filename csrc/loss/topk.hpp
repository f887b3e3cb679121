// The k most probable tokens of every row of logits, with their log-probabilities under the full softmax, in one read of the row.
#pragma once

#include <cstdint>

#include "sparse_soft_ce.hpp"

namespace fusechat::loss {

struct TopK {
    std::int32_t *ids;      // [rows, k], in descending order of logits, equal ones by id
    float *logprobs;        // [rows, k]
    float *lse;             // [rows]
    float *label_logprob;   // [rows], NaN where the label is negative
};

// `labels` may be null; the matrix's gradient is not used. Throws std::invalid_argument when a label lies outside the vocabulary.
void topk_logprob(const Matrix &matrix, const std::int64_t *labels, std::int64_t k, double softcap, const TopK &results,
                  int threads);

}  // namespace fusechat::loss
