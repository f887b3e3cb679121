#include "topk.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "parallel.hpp"
#include "row_loops.hpp"

namespace fusechat::loss {
namespace {

struct Entry {
    float z;
    std::int32_t id;
};

// The k-th largest of the groups' maxima is a bound that k logits reach, so only groups that reach it hold the k largest.
template <class T>
void select(const T *logits, std::int64_t n, std::int64_t k, float softcap, const std::vector<float> &maxima,
            std::vector<float> &sorted, std::vector<Entry> &entries) {
    float bound = kMinusInfinity;
    if (static_cast<std::int64_t>(maxima.size()) >= k) {
        sorted = maxima;
        std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
        bound = sorted[k - 1];
    }
    auto collect = [&](float least) {
        entries.clear();
        for (std::size_t group = 0; group < maxima.size(); ++group) {
            if (maxima[group] < least) continue;
            const std::int64_t begin = static_cast<std::int64_t>(group) * kGroup, end = std::min(begin + kGroup, n);
            for (std::int64_t id = begin; id < end; ++id) {
                const float u = widen_one(logits[id]), z = softcap == 0.0F ? u : softcap_one(u, softcap);
                if (z >= least) entries.push_back({z, static_cast<std::int32_t>(id)});
            }
        }
    };
    collect(bound);
    // A softcap that is rounded otherwise here than in the maxima may leave the k-th just below the bound.
    if (static_cast<std::int64_t>(entries.size()) < k) collect(kMinusInfinity);
    // A row with NaN has no log-probability that is a number, but its ids must be tokens.
    for (std::int64_t id = 0; id < n && static_cast<std::int64_t>(entries.size()) < k; ++id) {
        if (std::isnan(widen_one(logits[id]))) entries.push_back({kMinusInfinity, static_cast<std::int32_t>(id)});
    }
    std::partial_sort(entries.begin(), entries.begin() + k, entries.end(),
                      [](const Entry &a, const Entry &b) { return a.z != b.z ? a.z > b.z : a.id < b.id; });
}

template <class T>
void run_rows(const Matrix &matrix, const std::int64_t *labels, std::int64_t k, float softcap, const TopK &results, int threads) {
    const std::int64_t n = matrix.vocabulary;
    const std::int64_t grain = std::clamp<std::int64_t>(matrix.n_rows / (4 * std::max(threads, 1)), 1, 64);
    parallel_for(matrix.n_rows, grain, threads, [&](std::int64_t first, std::int64_t last) {
        std::vector<float> maxima((n + kGroup - 1) / kGroup), sorted;
        std::vector<Entry> entries;
        for (std::int64_t row = first; row < last; ++row) {
            const T *logits = static_cast<const T *>(matrix.logits) + row * matrix.logits_stride;
            const double lse = logsumexp_row(logits, n, softcap, maxima.data());
            select(logits, n, k, softcap, maxima, sorted, entries);
            for (std::int64_t i = 0; i < k; ++i) {
                results.ids[row * k + i] = entries[i].id;
                results.logprobs[row * k + i] = static_cast<float>(entries[i].z - lse);
            }
            results.lse[row] = static_cast<float>(lse);
            results.label_logprob[row] = std::numeric_limits<float>::quiet_NaN();
            if (labels != nullptr && labels[row] >= 0) {
                const float u = widen_one(logits[labels[row]]);
                results.label_logprob[row] = static_cast<float>((softcap == 0.0F ? u : softcap_one(u, softcap)) - lse);
            }
        }
    });
}

}  // namespace

void topk_logprob(const Matrix &matrix, const std::int64_t *labels, std::int64_t k, double softcap, const TopK &results,
                  int threads) {
    for (std::int64_t row = 0; labels != nullptr && row < matrix.n_rows; ++row) {
        if (labels[row] >= matrix.vocabulary) {
            throw std::invalid_argument("label " + std::to_string(labels[row]) + " of row " + std::to_string(row) +
                                        " lies outside the vocabulary of " + std::to_string(matrix.vocabulary));
        }
    }
    const float cap = static_cast<float>(softcap);
    switch (matrix.format) {
        case Format::float32:
            return run_rows<float>(matrix, labels, k, cap, results, threads);
        case Format::bfloat16:
            return run_rows<BFloat16>(matrix, labels, k, cap, results, threads);
        case Format::float16:
            return run_rows<Float16>(matrix, labels, k, cap, results, threads);
    }
}

}  // namespace fusechat::loss
